"""What provenance says of a verifier and of a prompt's source: names and versions that follow from the code."""

import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

from .filters.funnel import describe


def verifier_version(verifier: Callable[..., Any]) -> tuple[str, str]:
    """A verifier's name, and a version that changes whenever the module that defines it, or a setting, does."""
    kind = verifier if inspect.isfunction(verifier) or inspect.isclass(verifier) else type(verifier)
    settings = repr(verifier) if kind is not verifier else ""
    return kind.__name__, hashlib.sha256(f"{_source_of(kind.__module__)}{settings}".encode()).hexdigest()[:12]


def source_name(source: Any) -> str:
    """The settings of a task source as one line of JSON."""
    return json.dumps(describe(source), sort_keys=True, ensure_ascii=False)


@functools.cache
def _source_of(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError):  # a module without source, such as a compiled one
        return module
