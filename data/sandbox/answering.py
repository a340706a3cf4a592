"""The code under test in a process of its own: it answers what tests in another process ask, and sees nothing of them.

So nothing that a solution does to its own interpreter - a patched `__eq__`, an early exit, a printed pass mark, a look
at the stack - reaches a comparison: all that it can do is answer, and expected values never come here.
"""

import io
import operator
import os
from collections.abc import Callable
from typing import Any

from . import codec

MAX_ITEMS = 1_000_000  # of an iterator that is listed
MUTABLE = (list, dict, set, bytearray)
_WAYS: dict[str, Callable] = {"len": len, "bool": bool, "str": str, "repr": repr, "get": getattr, "set": setattr}


def serve(namespace: dict[str, Any], reader: io.BufferedReader, writer: int) -> None:
    """Answer the requests about a namespace until they end: (verb, target, arguments, keywords) a line.

    A reply is (True, value, what became of the mutable arguments) or (False, name of the exception, its message).
    """
    objects: list[Any] = []

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    while line := reader.readline():
        verb, target, arguments, keywords = codec.decode(line, objects.__getitem__)
        try:
            value = _answer(namespace, verb, target, arguments, keywords)
            changed = [argument for argument in arguments if type(argument) in MUTABLE]
            reply = codec.encode((True, value, changed), refer)
        except Exception as error:
            reply = codec.encode((False, type(error).__name__, _said(error)), refer)
        write(writer, reply.encode() + b"\n")


def _answer(namespace: dict[str, Any], verb: str, target: Any, arguments: list, keywords: dict) -> Any:
    if verb == "names":
        return [name for name in arguments[0] if name in namespace]
    if verb == "global":
        return namespace[arguments[0]]
    if verb == "call":
        return target(*arguments, **keywords)
    if verb == "iterate":
        return [item for _, item in zip(range(MAX_ITEMS), target, strict=False)]
    return (_WAYS[verb] if verb in _WAYS else getattr(operator, verb))(target, *arguments)


def _said(error: Exception) -> str:
    try:
        return str(error)[:1000]
    except Exception:
        return "an error that cannot be shown"


def write(descriptor: int, data: bytes) -> None:
    """All the bytes, however many the pipe takes at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
