"""Task sources by the words that name them on the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ..data.arithmetic import Arithmetic
from ..data.characters import Characters
from ..data.instruction_tasks import ALL_KINDS, Instructions
from ..data.jsonl_tasks import JsonlTasks
from ..data.task import Task, TaskSource, Verdict
from ..data.verify.choice import Choice
from ..data.verify.code import CodeOutput, UnitTests
from ..data.verify.ifeval import IFEval
from ..data.verify.maths import FinalNumber
from ..data.verify.rewards import Citations
from ..data.verify.sql import SqlRows
from ..data.verify.text import ExactText
from ..data.verify.tool_calls import ToolCalls

Verifier = Literal[
    "number",
    "formula",
    "text",
    "choice",
    "code",
    "unit-tests",
    "sql",
    "json-schema",
    "tool-calls",
    "ifeval",
    "citations",
]
VERIFIERS = {
    "number": FinalNumber, "text": ExactText, "choice": Choice, "code": CodeOutput, "unit-tests": UnitTests,
    "sql": SqlRows, "tool-calls": ToolCalls, "ifeval": IFEval, "citations": Citations,
}  # fmt: skip


def judge(name: Verifier) -> Callable[[Task, str], Verdict]:
    """The verifier of a name; those of optional packages are imported when they are asked for."""
    if name == "formula":
        from ..data.verify.symbolic import MathVerify

        return MathVerify()
    if name == "json-schema":
        from ..data.verify.json_schema import JsonSchema

        return JsonSchema()
    return VERIFIERS[name]()


def source(spec: str, *, verifier: Verifier = "number") -> TaskSource:
    """The tasks that a word on the command line stands for.

    Raises:
        ValueError, FileNotFoundError: with what may be given instead.
    """
    name, _, rest = spec.partition(":")
    if spec.endswith(".jsonl"):
        found = JsonlTasks(path=spec, verifier=judge(verifier), name=Path(spec).stem)
        len(found)  # reads the file: what is wrong with it is said before a model is loaded
        return found
    if name == "arithmetic" and (not rest or rest.isdecimal()):
        return Arithmetic(digits=int(rest or 1))
    if name == "instructions":
        return Instructions(kinds=(rest,) if rest else ALL_KINDS)
    if name == "characters" and rest:
        return Characters(operation=rest)  # pyright: ignore[reportArgumentType]  # checked by Characters
    if name == "reasoning-gym" and rest:
        from ..data.reasoning_gym import ReasoningGym  # an optional dependency

        return ReasoningGym(name=rest, size=1000)
    raise ValueError(
        f"no tasks {spec!r}: give FILE.jsonl, arithmetic, arithmetic:DIGITS, instructions, instructions:KIND, "
        "characters:OPERATION or reasoning-gym:NAME"
    )
