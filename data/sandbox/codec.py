"""Values as JSON and back: plain data alone, so that what an untrusted process sends can be nothing but data.

None, booleans, numbers, text, bytes and the built-in containers of these are copied, and the built-in types are named;
anything else stays where it is, and a reference to it is sent. Dictionaries of the collections module arrive as plain
ones.
"""

import collections
import json
import sys
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 200
_SEQUENCES: dict[type, str] = {list: "l", tuple: "t", set: "s", frozenset: "f", collections.deque: "q"}
_DICTS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)


def _fraction(text: str) -> Any:
    import fractions  # as decimal only where there is one: both take time at every start

    return fractions.Fraction(text)


def _decimal(text: str) -> Any:
    import decimal

    return decimal.Decimal(text)


_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "i": lambda text: int(text, 16),
    "c": complex,
    "b": bytes.fromhex,
    "ba": bytearray.fromhex,
    "r": lambda text: range(*map(int, text.split())),
    "F": _fraction,
    "D": _decimal,
    "T": lambda name: _TYPES[name],
}
_TYPES = {
    kind.__name__: kind
    for kind in (int, float, complex, bool, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, type(None))
}
_BUILD: dict[str, Callable[[list], Any]] = {
    "l": list, "t": tuple, "s": set, "f": frozenset, "q": collections.deque
}  # fmt: skip


def encode(value: Any, refer: Callable[[Any], Any]) -> str:
    """A value as one line of JSON; `refer` gives what stands for an object that is no plain data."""
    return json.dumps(_packed(value, refer, 0))


def decode(line: str | bytes, resolve: Callable[[Any], Any]) -> Any:
    """The value of a line; `resolve` gives the object that a reference stands for."""
    return _unpacked(json.loads(line), resolve)


def _packed(value: Any, refer: Callable[[Any], Any], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"a value is nested more than {MAX_DEPTH} deep")
    kind = type(value)
    if value is None or kind in (bool, float):
        return value
    if kind is str:
        return value
    if kind is int:
        return value if abs(value) < 1 << 60 else ["i", hex(value)]
    if kind in _SEQUENCES:
        return [_SEQUENCES[kind], [_packed(item, refer, depth + 1) for item in value]]
    if kind in _DICTS:
        pairs = [[_packed(key, refer, depth + 1), _packed(item, refer, depth + 1)] for key, item in value.items()]
        return ["d", pairs]
    text = _text(kind, value)
    if text is not None:
        return text
    for base in (int, float, str, tuple, list, dict, set):  # subclasses: IntEnum, numpy.float64, namedtuple
        if isinstance(value, base):
            return _packed(_plain(base, value), refer, depth)
    return ["o", refer(value)]


def _text(kind: type, value: Any) -> list | None:
    if kind is complex:
        return ["c", repr(value)]
    if kind in (bytes, bytearray):
        return ["b" if kind is bytes else "ba", value.hex()]
    if kind is range:
        return ["r", f"{value.start} {value.stop} {value.step}"]
    for tag, module, name in (("F", "fractions", "Fraction"), ("D", "decimal", "Decimal")):
        if kind.__name__ == name and module in sys.modules and kind is vars(sys.modules[module]).get(name):
            return [tag, str(value)]
    if kind is type and _TYPES.get(value.__name__) is value:
        return ["T", value.__name__]
    return None


def _plain(base: type, value: Any) -> Any:
    if base is int:
        return int.__add__(value, 0)
    if base is float:
        return float.__pos__(value)
    return str.__str__(value)[:] if base is str else base(value)


def _unpacked(packed: Any, resolve: Callable[[Any], Any]) -> Any:
    if not isinstance(packed, list):
        return packed
    tag, content = packed
    if tag == "o":
        return resolve(content)
    if tag == "d":
        return {_unpacked(key, resolve): _unpacked(item, resolve) for key, item in content}
    if tag in _BUILD:
        return _BUILD[tag]([_unpacked(item, resolve) for item in content])
    return _FROM_TEXT[tag](content)
