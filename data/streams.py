"""Rows that need not fit in memory: in order of prompts, merged from several folders, a batch of prompts at a time.

Folders of rows are written in one order, by (prompt_id, id), and read in it: so the answers to a prompt meet, from
however many generations, and no more of the rows is held than a batch.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, repeat

from .row import Row


def order(row: Row) -> tuple[str, str]:
    """What rows are sorted by."""
    return row.prompt_id, row.id


def merged(*streams: Iterable[Row]) -> Iterator[Row]:
    """Rows of several streams, each in order, as one in order.

    Raises ValueError for an id that occurs twice, or rows that are not in order.
    """
    last: Row | None = None
    for row in heapq.merge(*streams, key=order):
        if last is not None:
            _check(last, row)
        yield row
        last = row


def batches(rows: Iterable[Row], *, size: int) -> Iterator[list[Row]]:
    """Rows in order, in lists of at least `size` (but the last) that hold all rows of a prompt or none."""
    batch: list[Row] = []
    for _, group in groupby(rows, key=lambda row: row.prompt_id):
        batch += group
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def by_prompt(streams: Sequence[Iterable[Row]]) -> Iterator[list[list[Row]]]:
    """For each prompt of any of several streams in order, its rows of each of them."""
    tagged = (zip(stream, repeat(number)) for number, stream in enumerate(streams))
    every = heapq.merge(*tagged, key=lambda item: order(item[0]))
    for _, group in groupby(every, key=lambda item: item[0].prompt_id):
        found: list[list[Row]] = [[] for _ in streams]
        for row, number in group:
            found[number].append(row)
        yield found


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows that do fit, sorted. Raises ValueError for an id that occurs twice."""
    return list(merged(sorted(rows, key=order)))


def _check(row: Row, after: Row) -> None:
    if row.id == after.id:
        raise ValueError(f"two rows have the id {row.id!r}; give each row an id of its own")
    if order(after) < order(row):
        raise ValueError(
            f"row {after.id!r} comes after {row.id!r}; write rows in order of (prompt_id, id), as write_rows does"
        )
