"""A verifier for answers that are JSON of a given schema, judged by the jsonschema package."""

import json
import reprlib
from dataclasses import dataclass
from typing import Any

from ..task import Task, Verdict
from .extract import block
from .guard import refusal

try:
    import jsonschema
    import jsonschema.validators
    import referencing
    from jsonschema.protocols import Validator
except ImportError as error:
    raise ImportError("JsonSchema needs the jsonschema package: pip install 'posttrain[tasks]'") from error


@dataclass(frozen=True)
class JsonSchema:
    """1 where the response is JSON that is valid by `metadata["schema"]`; else 0.

    The JSON is the whole response or its last fenced block. Formats ("date", "email") are checked; references to
    schemas elsewhere are not fetched, and an error. NaN and repeated keys, which JSON does not have, are refused.
    """

    def check(self, task: Task) -> None:
        """A ValueError for a schema that is none, or that everything satisfies."""
        _validator(task)

    def __call__(self, task: Task, response: str) -> Verdict:
        validator = _validator(task)
        refused = refusal(task, response)
        if refused:
            return refused
        text = block(response, ("json",))
        try:
            value = json.loads(text or "", object_pairs_hook=_unique, parse_constant=_constant)
        except (ValueError, RecursionError) as error:
            return Verdict(0.0, f"no JSON: {error}")
        first = next(iter(validator.iter_errors(value)), None)
        if first is None:
            return Verdict(1.0, "valid")
        return Verdict(0.0, f"at {first.json_path}: {first.message[:160]}")


def _validator(task: Task) -> Validator:
    schema = task.metadata.get("schema")
    if not isinstance(schema, dict) or not schema:
        raise ValueError(f'task {task.id} needs "schema", a JSON Schema that is not empty, got {reprlib.repr(schema)}')
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"the schema of task {task.id} is none: {error.message}") from None
    made = kind(schema, registry=referencing.Registry(), format_checker=kind.FORMAT_CHECKER)
    if all(made.is_valid(value) for value in (None, False, 0, "text", [], {})):
        raise ValueError(f"the schema of task {task.id} accepts everything, as one without a type would")
    return made


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is repeated")
    return made


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
