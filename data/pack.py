"""Many examples into few rows of equal length, without wasting tokens and without mixing the examples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .batch import BRANCHES, Batch

Tokens = Sequence[int] | np.ndarray


@dataclass(frozen=True, kw_only=True)
class Example:
    """A sequence with a weight, and any further value, per token.

    tokens [N]    token ids
    mask   [N]    1 where the policy chose the token, 0 where it was given
    fields        values per token by name: [N] or [N, K] arrays, or one number for all tokens; `fields["x"][i]`
                  belongs to `tokens[i]` and `pack` puts it at the position that predicts that token
    """

    tokens: Tokens
    mask: Sequence[float] | np.ndarray
    fields: Mapping[str, np.ndarray | Sequence[float] | float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Group:
    """A prompt [P] (P >= 1) and the answers to it; an answer's tokens, mask and fields cover the answer alone.

    `fields` are values at the prompt's tokens but the last, [P - 1, ...], by name: for what is no matter of predicting.
    """

    prompt: Tokens
    answers: Sequence[Example]
    fields: Mapping[str, np.ndarray] = field(default_factory=dict)


class Packed(NamedTuple):
    """A batch, and where each example went.

    spans [N, 3]: row, start, stop of the positions that predict the example's tokens. For `pack` these are tokens
    1..N-1 (nothing predicts the first), for `pack_groups` all tokens of an answer, group by group.
    """

    batch: Batch
    spans: np.ndarray


def pack(
    examples: Sequence[Example],
    *,
    length: int,
    rows: int | None = None,
    multiple: int = 1,
    fields: Sequence[str] = (),
) -> Packed:
    """Pack examples into rows of `length` tokens, longest first into the first row with room.

    The result depends on the examples and their order alone. `rows` fixes the number of rows; otherwise it is
    the smallest bucket, a multiple of `multiple`. `fields` names the per-token fields to carry along. Raises
    ValueError for an example that is longer than a row (see `fitting`), or if `rows` are too few.
    """
    sizes = [len(example.tokens) for example in examples]
    for index, size in enumerate(sizes):
        if size > length:
            raise ValueError(f"example {index} has {size} tokens and a row {length}; raise length, or use fitting()")
    placed = _first_fit(sizes, length)
    batch = _empty(_num_rows(placed, rows, multiple), length, fields, examples)
    spans = np.zeros((len(examples), 3), np.int32)
    numbers = _numbers(placed)
    for index, (row, start) in enumerate(placed):
        example, size = examples[index], sizes[index]
        at = slice(start, start + size)
        batch["tokens"][row, at] = example.tokens
        batch["segments"][row, at] = numbers[index] * BRANCHES
        batch["positions"][row, at] = np.arange(size)
        last = max(start + size - 1, start)
        _put(batch, (row, start, last), example, 1, fields)
        spans[index] = row, start, last
    return Packed(batch, spans)


def pack_groups(
    groups: Sequence[Group],
    *,
    length: int,
    rows: int | None = None,
    multiple: int = 1,
    fields: Sequence[str] = (),
) -> Packed:
    """Pack prompts with their answers, so that a prompt is computed once for all of its answers.

    A prompt of P tokens is branch 0 with its first P-1 tokens; each answer is a branch of its own with the prompt's
    last token and the answer's tokens but the last, at positions P-1, P, ..., and predicts the answer's tokens. A
    group that is longer than a row is split into several, which repeat the prompt. `rows`, `multiple`, `fields` and
    errors as in `pack`; an answer that does not fit in a row with its prompt is an error.
    """
    parts = list(_parts(groups, length))
    sizes = [len(groups[part.group].prompt) - 1 + part.size for part in parts]
    placed = _first_fit(sizes, length)
    answers = [answer for group in groups for answer in group.answers]
    batch = _empty(_num_rows(placed, rows, multiple), length, fields, answers)
    spans = np.zeros((len(answers), 3), np.int32)
    offsets = np.cumsum([0, *(len(group.answers) for group in groups)])
    for part, (row, start), number in zip(parts, placed, _numbers(placed), strict=True):
        prompt = np.asarray(groups[part.group].prompt, np.int32)
        shared = len(prompt) - 1
        at = slice(start, start + shared)
        batch["tokens"][row, at] = prompt[:-1]
        batch["segments"][row, at] = number * BRANCHES
        batch["positions"][row, at] = np.arange(shared)
        for name in groups[part.group].fields.keys() & set(fields):
            batch[name][row, at] = _checked(groups[part.group].fields[name], shared, name)
        begin = start + shared
        for branch, index in enumerate(part.answers, start=1):
            answer = groups[part.group].answers[index]
            stop = begin + len(answer.tokens)
            batch["tokens"][row, begin] = prompt[-1]
            batch["tokens"][row, begin + 1 : stop] = answer.tokens[:-1]
            batch["segments"][row, begin:stop] = number * BRANCHES + branch
            batch["positions"][row, begin:stop] = np.arange(shared, shared + stop - begin)
            _put(batch, (row, begin, stop), answer, 0, fields)
            spans[offsets[part.group] + index] = row, begin, stop
            begin = stop
    return Packed(batch, spans)


def unpack(values: np.ndarray, spans: np.ndarray) -> list[np.ndarray]:
    """The values [B, T, ...] of a packed batch, example by example: one for each token that the example predicts."""
    return [values[row, start:stop] for row, start, stop in spans]


def fitting(examples: Sequence[Example], *, length: int) -> tuple[list[Example], int]:
    """The examples that fit in a row of `length` tokens, and how many do not, for those who leave these out."""
    kept = [example for example in examples if len(example.tokens) <= length]
    return kept, len(examples) - len(kept)


def bucket(size: int, *, multiple: int = 1) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, ... times `multiple` that holds `size`: few shapes, few compilations."""
    units = max(1, -(-size // multiple))
    power = 1 << (units - 1).bit_length()
    return multiple * (power * 3 // 4 if power >= 4 and units <= power * 3 // 4 else power)


class _Part(NamedTuple):
    """A prompt's answers that share a row, by index; `size` is the number of their tokens."""

    group: int
    answers: tuple[int, ...]
    size: int


def _parts(groups: Sequence[Group], length: int) -> Iterator[_Part]:
    for number, group in enumerate(groups):
        if len(group.prompt) == 0 or len(group.answers) == 0:
            raise ValueError(
                f"group {number} has {len(group.prompt)} prompt tokens and {len(group.answers)} answers; "
                "it needs one of each at least"
            )
        room = length - (len(group.prompt) - 1)
        sizes = [len(answer.tokens) for answer in group.answers]
        for index, size in enumerate(sizes):
            if size == 0:
                raise ValueError(f"answer {index} of group {number} has no token; leave it out")
            if size > room:
                raise ValueError(
                    f"answer {index} of group {number} has {size} tokens after a prompt of {len(group.prompt)}, "
                    f"and a row {length}; raise length or leave the answer out"
                )
        members: dict[int, list[int]] = {}
        for index, (row, _) in enumerate(_first_fit(sizes, room, most=BRANCHES - 1)):
            members.setdefault(row, []).append(index)
        for row in sorted(members):
            yield _Part(number, tuple(members[row]), sum(sizes[index] for index in members[row]))


def _first_fit(sizes: Sequence[int], length: int, most: int | None = None) -> list[tuple[int, int]]:
    """Row and start of each item: first-fit decreasing, equal sizes in their order, at most `most` items to a row.

    Eleven ninths of the best possible number of rows at worst (https://doi.org/10.1137/0203025).
    """
    free = np.full(len(sizes), length, np.int64)
    slots = np.full(len(sizes), len(sizes) if most is None else most, np.int64)
    placed = [(0, 0)] * len(sizes)
    for index in np.argsort(-np.asarray(sizes, np.int64), kind="stable"):
        row = int(np.argmax((free >= sizes[index]) & (slots > 0)))
        placed[index] = row, length - int(free[row])
        free[row] -= sizes[index]
        slots[row] -= 1
    return placed


def _numbers(placed: Sequence[tuple[int, int]]) -> list[int]:
    """The place of each item in its row, from left to right, counted from 1."""
    numbers = [0] * len(placed)
    counts: dict[int, int] = {}
    for index in sorted(range(len(placed)), key=lambda index: placed[index]):
        row = placed[index][0]
        numbers[index] = counts[row] = counts.get(row, 0) + 1
    return numbers


def _num_rows(placed: Sequence[tuple[int, int]], rows: int | None, multiple: int) -> int:
    needed = 1 + max((row for row, _ in placed), default=0)
    if rows is None:
        return bucket(needed, multiple=multiple)
    if needed > rows:
        raise ValueError(f"the examples need {needed} rows and rows={rows}; raise rows or length, or pack fewer")
    return rows


def _empty(rows: int, length: int, fields: Sequence[str], examples: Sequence[Example]) -> dict[str, np.ndarray]:
    shape = (rows, length)
    batch: dict[str, np.ndarray] = {
        name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments", "positions")
    }
    batch["mask"] = np.zeros(shape, np.float32)
    for name in fields:
        for index, example in enumerate(examples):
            if name not in example.fields:
                raise ValueError(f"example {index} has the fields {sorted(example.fields)} and no {name!r}; add it")
        first = np.asarray(examples[0].fields[name]) if examples else np.zeros((), np.float32)
        kind = np.int32 if np.issubdtype(first.dtype, np.integer) else np.float32
        kind = first.dtype if first.dtype in (np.uint8, np.uint16) else kind
        batch[name] = np.zeros(shape + first.shape[1:], kind)
    return batch


def _put(
    batch: dict[str, np.ndarray], span: tuple[int, int, int], example: Example, skip: int, fields: Sequence[str]
) -> None:
    """Write targets, mask and fields of tokens `skip`, `skip`+1, ... to the positions that predict them."""
    row, start, stop = span
    size = len(example.tokens)
    if len(example.mask) != size:
        raise ValueError(f"an example has {size} tokens and {len(example.mask)} mask values; give one for each token")
    batch["targets"][row, start:stop] = example.tokens[skip:]
    batch["mask"][row, start:stop] = example.mask[skip:]
    for name in fields:
        values = np.asarray(example.fields[name])
        batch[name][row, start:stop] = _checked(values, size, name)[skip:] if values.ndim else values


def _checked(values: np.ndarray, size: int, name: str) -> np.ndarray:
    if len(values) != size:
        raise ValueError(f"{size} tokens have {len(values)} values of {name!r}; give one for each token")
    return values
