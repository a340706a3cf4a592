"""What a compiled program moves: HBM bytes and collectives, read from its scheduled HLO, loops counted as they turn.

The rules for bytes are those of XLA's HloCostAnalysis (slices count what they touch, aliases nothing), which itself
counts the body of a loop once.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "send-done", "recv", "recv-done", "iota", "add-dependency", "copy-done",
}  # fmt: skip
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


class Array(NamedTuple):
    """Bytes of an array, and whether it lies in HBM (memory space 0) rather than on the core."""

    bytes: float
    in_hbm: bool


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def called(self) -> str | None:
        """The computation that a fusion, a call or an async start runs."""
        found = re.search(r"(?:calls|to_apply|called_computations=\{)=?%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


class Collective(NamedTuple):
    """A transfer between devices.

    `bytes` is what one device gives to it, `times` how often it happens in a call of the program. `group` are the
    partitions that it joins (of one group), empty for a transfer between slices. A `hidden` one runs beside
    computation; others make everything wait.
    """

    kind: str
    bytes: float
    times: float
    group: tuple[int, ...]
    hidden: bool
    across_slices: bool
    source: str


@dataclass(frozen=True)
class Module:
    """Computations of a compiled program by name, and which is the entry."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str
    trips: int = 1
    """Turns of a loop that ends when the data say so."""

    def bytes_accessed(self, *, hbm_only: bool, loops: bool = True) -> float:
        """Bytes that one call reads and writes; with `loops` False, loop bodies are counted once."""
        return math.fsum(
            (times if loops else 1) * self._bytes(self.by_name[computation], one, hbm_only)
            for computation, one, times, _ in self.executed()
        )

    @cached_property
    def by_name(self) -> dict[str, dict[str, Instruction]]:
        """Instructions of every computation by their names."""
        return {name: {one.name: one for one in body} for name, body in self.computations.items()}

    def executed(self) -> Iterator[tuple[str, Instruction, float, int]]:
        """Every instruction that runs by itself: its computation, how often it runs, its place in the schedule."""
        waiting = [(self.entry, 1.0)]
        while waiting:
            name, times = waiting.pop()
            for place, one in enumerate(self.computations[name]):
                yield name, one, times, place
                if one.opcode == "while":
                    body = re.search(r"body=%?([\w.\-]+)", one.attributes)
                    assert body
                    waiting.append((body[1], times * self._turns(name, one)))
                elif one.opcode == "conditional":
                    waiting += [(branch, times) for branch in _branches(one)]
                elif one.opcode == "call" and one.called:
                    waiting.append((one.called, times))

    def _turns(self, computation: str, loop: Instruction) -> int:
        """How often a loop turns: (end - start) / step of the counter that its condition compares, or `trips`."""
        known = re.search(r"known_trip_count[^0-9]*(\d+)", loop.attributes)
        if known:
            return int(known[1])
        names = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", loop.attributes)
        assert names
        condition, body = (self.by_name[name] for name in names.groups())
        found = _compared(condition, self.by_name)
        if found is None:
            return self.trips
        index, end = found
        start = _constant(_element(self.by_name[computation], loop.operands[0], index), self.by_name[computation])
        return max(1, math.ceil((end - (start or 0)) / _step(body, index, self.by_name)))

    def collectives(self) -> list[Collective]:
        """Every transfer between devices of one call."""
        found: dict[tuple[str, str], Collective] = {}
        for computation, one, times, place in self.executed():
            hidden = self._overlapped(computation, place, one)
            for inner, inside in self._with_fused(computation, one):
                transfer = self._collective(inner, inside, times, hidden=hidden or self._asynchronous(one, inside))
                if transfer:
                    if inner.startswith("all-reduce-scatter"):  # how the TPU compiler spells a reduce-scatter
                        transfer = transfer._replace(kind="reduce-scatter")
                    channel = re.search(r"channel_id=(\d+)", inside.attributes)
                    key = (computation, channel[1] if channel else inside.name)
                    # The parts of an asynchronous collective fusion share a channel: it is one transfer.
                    found[key] = transfer._replace(hidden=transfer.hidden or (key in found and found[key].hidden))
        return list(found.values())

    def _with_fused(self, computation: str, one: Instruction) -> Iterator[tuple[str, Instruction]]:
        yield computation, one
        if one.opcode in ("fusion", "async-start") and one.called:
            for inner in self.computations[one.called]:
                yield one.called, inner

    def _asynchronous(self, one: Instruction, inside: Instruction) -> bool:
        """Whether a fusion starts, carries on or ends a collective while it computes something else."""
        if one is inside or not one.called:
            return False
        return one.opcode == "async-start" or any(
            "AsyncCollective" in inner.attributes or "async_collective_fusion" in inner.attributes
            for inner in self.computations[one.called]
        )

    def _collective(self, computation: str, one: Instruction, times: float, *, hidden: bool) -> Collective | None:
        given = math.fsum(a.bytes for name in one.operands[:1] for a in self.by_name[computation][name].arrays)
        if one.opcode == "send" and "_xla_megascale_transfer_type" in one.attributes:
            kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
            assert kind
            return Collective(kind[1].lower().replace("_", "-"), given, times, (), hidden, True, _source(one))
        kind = one.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return None
        given = math.fsum(a.bytes for name in one.operands for a in self.by_name[computation][name].arrays)
        hidden = hidden or one.opcode.endswith("-start")
        return Collective(kind, given, times, _group(one.attributes), hidden, False, _source(one))

    def _overlapped(self, computation: str, place: int, one: Instruction) -> bool:
        """Whether a loop runs between a transfer between slices and its end; inside of loops there is none."""
        if one.opcode != "send":
            return False
        for later in self.computations[computation][place + 1 :]:
            if later.opcode == "while":
                return True
            if later.opcode == "send-done" and one.name in later.operands:
                return False
        return False

    def _bytes(self, body: Mapping[str, Instruction], one: Instruction, hbm_only: bool) -> float:
        if one.opcode in FREE or one.opcode in ("while", "conditional", "call", "send") or one.opcode.endswith("-done"):
            return 0.0

        def size(arrays: Sequence[Array]) -> float:
            return math.fsum(a.bytes for a in arrays if a.in_hbm or not hbm_only)

        operands = [size(body[name].arrays) for name in one.operands]
        if one.opcode == "fusion" and one.called:
            return self._fused(one, operands, hbm_only)
        if one.opcode == "copy-start":
            return size(one.arrays[:2])
        if one.opcode in ("slice-start", "dynamic-slice-start"):
            source, part = one.arrays[0], one.arrays[1]
            return size([part]) + (part.bytes if source.in_hbm or not hbm_only else 0.0)
        if one.opcode.endswith("-start"):
            return math.fsum(operands) + size(one.arrays[1:2])
        return _touched(one.opcode, operands, size(one.arrays))

    def _fused(self, fusion: Instruction, operands: Sequence[float], hbm_only: bool) -> float:
        """A fusion reads of every parameter what its users touch, and writes of its result what is new."""
        assert fusion.called
        body = self.computations[fusion.called]
        names = self.by_name[fusion.called]
        total = 0.0
        for number, whole in enumerate(operands):
            total += min(whole, self._parameter_read(fusion.called, number)) if whole else 0.0
        root = next(one for one in body if one.root)
        parts = [names[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for part, array in zip(parts, fusion.arrays, strict=False):
            if array.in_hbm or not hbm_only:
                total += _written(part, names, array)
        return total

    def _parameter_read(self, computation: str, number: int) -> float:
        """Bytes that a fused computation reads of its parameter of this number."""
        body = self.computations[computation]
        parameter = next(one for one in body if one.opcode == "parameter" and _parameter_number(one) == number)
        return self._read(computation, parameter.name)

    def _read(self, computation: str, name: str) -> float:
        """Bytes of a value in a fused computation that its users read; a user that only passes it on reads nothing."""
        total = 0.0
        for user in self.computations[computation]:
            if name not in user.operands:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += sum(a.bytes for a in user.arrays)
            elif user.opcode == "bitcast":
                total += self._read(computation, user.name)
            elif user.opcode == "fusion" and user.called:
                for number in [place for place, operand in enumerate(user.operands) if operand == name]:
                    total += self._parameter_read(user.called, number)
                    if self._viewed(user.called) == number:
                        total += self._read(computation, user.name)
            elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
                continue  # what it does not overwrite stays where it is
            elif user.opcode in ("tuple", *COLLECTIVES) or "AsyncCollective" in user.attributes:
                continue
            else:
                return math.inf
        return total

    def _viewed(self, computation: str) -> int | None:
        """The number of the parameter that a fused computation gives back as it is."""
        part = next(one for one in self.computations[computation] if one.root)
        while part.opcode == "bitcast":
            part = self.by_name[computation][part.operands[0]]
        return _parameter_number(part) if part.opcode == "parameter" else None


def parse(text: str, *, trips: int = 1) -> Module:
    """The module of `compiled.as_text()`; `trips` is how often a loop without a fixed end turns."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, body = "", "", []
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name, body = head[2], []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = tuple(body)
        elif name and (found := LINE.match(line)):
            body.append(_instruction(found[2], found[3], root=bool(found[1])))
    return Module(computations, entry, trips)


def _instruction(name: str, rest: str, *, root: bool) -> Instruction:
    end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _balanced(rest, start)
    operands, depth = rest[start + 1 : end - 1], rest[:start]
    names = () if depth in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", operands))
    kept = f"({operands})" if depth in ("constant", "parameter") else ""
    return Instruction(name, depth, _arrays(shape), names, kept + rest[end:], root)


def _balanced(text: str, start: int) -> int:
    """One past the bracket that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.end()
    raise ValueError(f"unbalanced brackets in the HLO {text[:80]!r}")


def _arrays(shape: str) -> tuple[Array, ...]:
    return tuple(
        Array(BYTES.get(kind, 0) * math.prod(int(n) for n in sizes.split(",") if n), "S(" not in layout)
        for kind, sizes, layout in ARRAY.findall(shape)
    )


def _group(attributes: str) -> tuple[int, ...]:
    """The first group of a collective; empty if it joins all."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(map(int, listed[1].split(",")))
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return int(pairs[1]), int(pairs[2])
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else list(range(len(shape)))
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        members = _grid([(shape[axis], strides[axis]) for axis in order])
        return members[: int(iota[2])]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[2])
        return _grid([_part(sizes, axis, int(before or 1), int(size or sizes[axis])) for axis, before, size in parts])
    return ()


def _part(sizes: Mapping[str, int], axis: str, before: int, size: int) -> tuple[int, int]:
    """Size and stride of a mesh axis, or of the part of it that follows `before` in it."""
    names = list(sizes)
    inner = math.prod(sizes[name] for name in names[names.index(axis) + 1 :])
    return size, inner * sizes[axis] // (before * size)


def _grid(axes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """All places of a grid whose axes have these sizes and strides, the last axis fastest."""
    places = [0]
    for size, stride in axes:
        places = [place + index * stride for place in places for index in range(size)]
    return tuple(places)


def _source(one: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', one.attributes)
    return found[1] if found else one.name


def _branches(one: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.attributes)


def _parameter_number(one: Instruction) -> int:
    found = re.match(r"\((\d+)\)", one.attributes)
    assert found
    return int(found[1])


def _touched(opcode: str, operands: Sequence[float], out: float) -> float:
    if opcode in ("dynamic-slice", "slice"):
        return 2 * out
    if opcode == "gather":
        return 2 * out + sum(operands[1:])
    if opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if opcode == "scatter":
        return 3 * operands[-1] + operands[1]
    return sum(operands) + out


def _written(part: Instruction, names: Mapping[str, Instruction], array: Array) -> float:
    while part.opcode == "bitcast":
        part = names[part.operands[0]]
    if part.opcode == "parameter" or part.opcode in COLLECTIVES or "AsyncCollective" in part.attributes:
        return 0.0
    if part.opcode in ("dynamic-update-slice", "scatter"):
        return sum(a.bytes for a in names[part.operands[-1 if part.opcode == "scatter" else 1]].arrays)
    return array.bytes


def _compared(
    condition: Mapping[str, Instruction], by_name: Mapping[str, Mapping[str, Instruction]]
) -> tuple[int, int] | None:
    """Which element of a loop's state is compared as `< end`, and the end."""
    root = next(one for one in condition.values() if one.root)
    operands = [condition[name] for name in root.operands]
    if root.opcode == "fusion" and root.called:
        inner = next(one for one in by_name[root.called].values() if one.root)
        parameters = {
            one.name: operands[_parameter_number(one)]
            for one in by_name[root.called].values()
            if one.opcode == "parameter"
        }
        operands = [parameters.get(name, by_name[root.called][name]) for name in inner.operands]
        root = inner
    if root.opcode != "compare" or "direction=LT" not in root.attributes or len(operands) != 2:
        return None
    counter, end = operands[0], _constant(operands[1], condition)
    if counter.opcode != "get-tuple-element" or end is None:
        return None
    return _index(counter), end


def _index(one: Instruction) -> int:
    found = re.search(r"index=(\d+)", one.attributes)
    assert found
    return int(found[1])


def _constant(one: Instruction | None, body: Mapping[str, Instruction]) -> int | None:
    while one is not None and one.opcode in ("copy", "bitcast") and one.operands[0] in body:
        one = body[one.operands[0]]
    found = re.match(r"\((-?\d+)\)", one.attributes) if one is not None and one.opcode == "constant" else None
    return int(found[1]) if found else None


def _element(body: Mapping[str, Instruction], name: str, index: int) -> Instruction | None:
    one = body.get(name)
    return body.get(one.operands[index]) if one is not None and one.opcode == "tuple" else None


def _step(body: Mapping[str, Instruction], index: int, by_name: Mapping[str, Mapping[str, Instruction]]) -> int:
    """What the body adds to element `index` of the loop's state: 1 unless it is written otherwise."""
    root = next(one for one in body.values() if one.root)
    one = body.get(root.operands[index]) if root.opcode == "tuple" else None
    if one is not None and one.opcode == "fusion" and one.called:
        body = by_name[one.called]
        one = next(inner for inner in body.values() if inner.root)
    if one is not None and one.opcode == "add":
        steps = [_constant(body.get(name), body) for name in one.operands]
        return next((step for step in steps if step), 1)
    return 1
