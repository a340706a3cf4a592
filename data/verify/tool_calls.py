"""A verifier for tool calls: the calls that a response makes, read as data, against the expected ones.

Read are the three ways in which models write calls: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes,
Qwen), the same JSON without marks, and Python syntax, `[weather(city="Paris"), time()]`, which is parsed and never run.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..task import Task, Verdict
from .extract import answer_part, block
from .guard import gold, refusal

MAX_TEXT = 100_000  # characters; deeper and longer texts cost the parser more than any call is worth
_MARKED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_JSON_NAMES = {"true": True, "false": False, "null": None}


class Call(NamedTuple):
    """One call of a tool."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class ToolCalls:
    """1 where the response makes exactly the expected calls, in any order, or in theirs if `ordered`; else 0.

    The task's answer is JSON: a list of {"name": ..., "arguments": {...}}, or, for calls that can be right in several
    ways, of {name: {argument: [accepted values]}}, where an accepted "" means that the argument may be left out
    (the form of the Berkeley Function-Calling Leaderboard). Values are compared as data: 2 equals 2.0, not "2" or true.
    """

    ordered: bool = False

    def check(self, task: Task) -> None:
        """A ValueError for an answer that expects no call."""
        _expected(task)

    def __call__(self, task: Task, response: str) -> Verdict:
        expected = _expected(task)
        refused = refusal(task, response)
        if refused:
            return refused
        try:
            found = calls(response)
        except ValueError as error:
            return Verdict(0.0, str(error))
        if len(found) != len(expected):
            return Verdict(0.0, f"{len(found)} calls, expected {len(expected)}")
        if self.ordered:
            wrong = next((each for each, accept in zip(found, expected, strict=True) if not accept(each)), None)
        else:
            wrong = _unmatched(found, expected)
        return (
            Verdict(1.0, "correct") if wrong is None else Verdict(0.0, f"not expected: {wrong.name}{wrong.arguments}")
        )


def calls(response: str) -> list[Call]:
    """The calls that a response makes, in order.

    Raises:
        ValueError: where it makes none, or writes one that cannot be read.
    """
    text = answer_part(response)
    if len(text) > MAX_TEXT:
        raise ValueError(f"the response has {len(text)} characters, more than {MAX_TEXT}")
    marked = _MARKED.findall(text)
    if marked:
        return [_from_json(part) for part in marked]
    content = (block(text, ("json", "python", "tool_code")) or "").strip()
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _from_python(content)
    return [_call(each) for each in (value if isinstance(value, list) else [value])]


def _from_json(text: str) -> Call:
    try:
        return _call(json.loads(text))
    except (ValueError, RecursionError):
        raise ValueError(f"no tool call: {text.strip()[:80]!r}") from None


def _call(value: Any) -> Call:
    """A call from what a model writes as JSON; arguments may be a text of JSON, as in OpenAI's form."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError(f"no tool call: {str(value)[:80]!r}")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {value['name']} are {str(arguments)[:60]!r}, not an object")
    return Call(value["name"], arguments)


def _from_python(text: str) -> list[Call]:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("no tool call") from None
    nodes = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
    if not nodes:
        raise ValueError("no tool call")
    return [_from_node(node) for node in nodes]


def _from_node(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
        raise ValueError("no tool call")
    name = ast.unparse(node.func)
    if not re.fullmatch(r"[\w.]+", name):
        raise ValueError(f"no tool has the name {name[:60]!r}")
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError(f"{name} is called without the names of its arguments")
    arguments = {keyword.arg: _literal(keyword.value) for keyword in node.keywords if keyword.arg}
    if len(arguments) < len(node.keywords):
        raise ValueError(f"{name} is given an argument twice")
    return Call(name, arguments)


def _literal(node: ast.expr) -> Any:
    try:
        return _as_json(ast.literal_eval(_JsonNames().visit(node)))
    except (ValueError, TypeError, RecursionError, MemoryError, SyntaxError):
        raise ValueError(f"an argument is no literal: {ast.unparse(node)[:60]!r}") from None


class _JsonNames(ast.NodeTransformer):
    """Reads true, false and null, too."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node


def _as_json(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return {key: _as_json(item) for key, item in value.items()} if isinstance(value, dict) else value


class _Exactly(NamedTuple):
    call: Call

    def __call__(self, found: Call) -> bool:
        return found.name == self.call.name and _equal(dict(found.arguments), dict(self.call.arguments))


class _OneOf(NamedTuple):
    name: str
    accepted: Mapping[str, Sequence[Any]]

    def __call__(self, found: Call) -> bool:
        if found.name != self.name or not set(found.arguments) <= set(self.accepted):
            return False
        for argument, values in self.accepted.items():
            if argument not in found.arguments:
                if "" not in values:
                    return False
            elif not any(_equal(found.arguments[argument], value) for value in values):
                return False
        return True


def _expected(task: Task) -> list[_Exactly | _OneOf]:
    try:
        value = json.loads(gold(task))
    except ValueError as error:
        raise ValueError(f"the answer of task {task.id} lists no calls as JSON: {error}") from None
    if not isinstance(value, list) or not value:
        raise ValueError(f"the answer of task {task.id} must list at least one call, got {task.answer!r:.80}")
    return [_accepting(each, task) for each in value]


def _accepting(value: Any, task: Task) -> _Exactly | _OneOf:
    if isinstance(value, dict) and "name" in value:
        return _Exactly(_call(value))
    if isinstance(value, dict) and len(value) == 1:
        name, accepted = next(iter(value.items()))
        if isinstance(accepted, dict) and all(isinstance(values, list) for values in accepted.values()):
            return _OneOf(name, accepted)
    raise ValueError(f"the answer of task {task.id} has a call that cannot be read: {str(value)[:80]!r}")


def _unmatched(found: list[Call], expected: Sequence[_Exactly | _OneOf]) -> Call | None:
    """A call that is left over when calls and expectations are paired as well as can be; None where all pair up."""
    owners: dict[int, int] = {}  # expectation -> call

    def place(call: int, tried: set[int]) -> bool:
        for number, accept in enumerate(expected):
            if number in tried or not accept(found[call]):
                continue
            tried.add(number)
            if number not in owners or place(owners[number], tried):
                owners[number] = call
                return True
        return False

    return next((found[call] for call in range(len(found)) if not place(call, set())), None)


def _equal(one: Any, other: Any) -> bool:
    """Equal as JSON data: True is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return (numbers or type(one) is type(other)) and one == other
