"""Unit tests in a process of their own: what they call is a stand-in that asks the solution's process (`answering`).

Arguments and results travel as plain data, so a comparison in a test is between data that the tests' interpreter made.
Objects stay with the solution. Where a task is about classes (`objects`), tests may use them through stand-ins;
elsewhere a returned object can be called and iterated and nothing else, so that no method of its own can please a test.
"""

import ast
import builtins
import io
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import codec
from .answering import MUTABLE, write

MAX_LINE = 1 << 26  # bytes of one answer
_PLAIN_VERBS = ("call", "iterate", "names", "global")
_UNARY = ("len", "bool", "str", "repr", "neg", "pos", "abs", "invert")
_BINARY = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lt", "le", "gt", "ge"
)  # fmt: skip
_ITEMS = ("getitem", "setitem", "delitem")


class SolutionError(Exception):
    """What the solution raised, where it is no exception of Python's own; or that it ended, or answered nonsense."""


class Solution:
    """The solution's process, as the tests' process sees it."""

    def __init__(self, reader: io.BufferedReader, writer: int, *, objects: bool):
        self._reader, self._writer, self._objects = reader, writer, objects

    def names(self, wanted: Sequence[str]) -> dict[str, Any]:
        """Those of the wanted global names that the solution has: data as data, anything else as a stand-in."""
        return {name: self.ask("global", None, [name]) for name in self.ask("names", None, [list(wanted)])}

    def ask(self, verb: str, target: Any, arguments: list, keywords: dict | None = None) -> Any:
        """One request; what the solution raises is raised here."""
        if not self._objects and verb not in _PLAIN_VERBS:
            raise TypeError(f"the solution returned an object that is no data, and the test wants its {verb}")
        request = codec.encode((verb, target, arguments, keywords or {}), _number)
        try:
            write(self._writer, request.encode() + b"\n")
        except BrokenPipeError:
            raise SolutionError("the solution ended") from None
        line = self._reader.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise SolutionError("the solution ended" if len(line) < MAX_LINE else "the solution's answer is too long")
        try:
            done, value, rest = codec.decode(line, lambda number: StandIn(self, number))
        except (ValueError, TypeError, KeyError, RecursionError, ArithmeticError) as error:
            raise SolutionError(f"the solution's answer cannot be read: {error}") from None
        if done is not True:
            raise _exception(value, rest)
        _update([argument for argument in arguments if type(argument) in MUTABLE], rest)
        return value


class StandIn:
    """An object that lives in the solution's process."""

    def __init__(self, solution: Solution, number: int):
        object.__setattr__(self, "_solution", solution)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return _ask(self, "call", list(arguments), keywords)

    def __getattr__(self, name: str) -> Any:
        return _ask(self, "get", [name])

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "set", [name, value])

    def __iter__(self) -> Iterator[Any]:
        return iter(_ask(self, "iterate", []))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StandIn) and bool(_ask(self, "eq", [other]))

    def __hash__(self) -> int:
        return _number(self)


def _number(value: Any) -> int:
    if isinstance(value, StandIn):
        return object.__getattribute__(value, "_number")
    raise TypeError(f"tests can hand data and the solution's own objects to the solution, not a {type(value).__name__}")


def _ask(target: StandIn, verb: str, arguments: list, keywords: dict | None = None) -> Any:
    return object.__getattribute__(target, "_solution").ask(verb, target, arguments, keywords)


def _forwarded(verb: str, *, with_data: bool) -> Callable:
    name = {"and": "and_", "or": "or_"}.get(verb, verb)

    def method(self: StandIn, *arguments: Any) -> Any:
        if not with_data and not isinstance(arguments[0], StandIn):
            raise TypeError(f"the solution returned an object that is no data, and the test computes {verb} with it")
        return _ask(self, name, list(arguments))

    return method


for _verb in (*_UNARY, *_BINARY, *_ITEMS):
    setattr(StandIn, f"__{_verb}__", _forwarded(_verb, with_data=_verb not in _BINARY))


def _exception(name: Any, said: Any) -> Exception:
    """The exception of a name; never one that ends a loop of the tests as if all had been seen."""
    kind = getattr(builtins, name, None) if isinstance(name, str) else None
    if isinstance(kind, type) and issubclass(kind, Exception) and kind not in (StopIteration, StopAsyncIteration):
        try:
            return kind(said)
        except TypeError:  # it takes other arguments than one message
            pass
    return SolutionError(f"{name}: {said}")


def _update(arguments: list, changed: Any) -> None:
    """Do to the mutable arguments of a call what the solution did to its copies of them."""
    if not isinstance(changed, list) or [type(each) for each in changed] != [type(each) for each in arguments]:
        raise SolutionError("the solution's answer cannot be read: it changed the types of arguments")
    for mine, theirs in zip(arguments, changed, strict=True):
        if isinstance(mine, dict | set):
            mine.clear()
            mine.update(theirs)
        else:
            mine[:] = theirs


def run_tests(solution: Solution, setup: str, tests: Sequence[str], names: Sequence[str] | None) -> Iterator[str]:
    """Run the tests, one after another in one namespace: an empty text for each that passes, else what went wrong.

    `names` are the solution's names that tests see; None for all that the tests use and do not make themselves, but
    for those of Python: a solution's own `abs` must not judge how close its answer is.
    """
    module = types.ModuleType("__main__")
    wanted = _used([setup, *tests]) if names is None else names
    try:
        module.__dict__.update(solution.names(wanted))
        failure = _failure(setup, module)
    except SolutionError as error:
        failure = str(error)
    for test in tests:
        yield failure or _failure(test, module)


def _used(sources: Sequence[str]) -> list[str]:
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    loaded = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return sorted(loaded - set(dir(builtins)))


def _failure(source: str, module: types.ModuleType) -> str:
    try:
        exec(compile(source, "test.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        return "the test ended its process"
    except AssertionError as error:
        return f"a test failed: {_line(source, error) or error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _line(source: str, error: BaseException) -> str:
    """The line of the test that raised."""
    trace, number = error.__traceback__, 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "test.py":
            number = trace.tb_lineno
        trace = trace.tb_next
    lines = source.splitlines()
    return lines[number - 1].strip() if 0 < number <= len(lines) else ""
