"""What a filter is, and the funnel: filters applied one after the other, with every dropped row and its reason kept.

Filters of single rows commute. Those that compare rows do not: put them after what drops rows for their own faults, or
a wrong row may displace a right one. An order that works: Licensed, Finished, Verified, Length, repetition, language,
Refusals, Identity, KnowledgeDates, Decontaminated, DifficultyBand, NearDuplicateResponses, NearDuplicatePrompts, and
last ShortestCorrect or BestByReward.
"""

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ..row import Row


@runtime_checkable
class Filter(Protocol):
    """Settings that tell which rows of a whole set to drop: a frozen dataclass of plain values.

    What needs no more than a row is a `RowFilter`, what compares a prompt's answers a `PromptFilter`; a filter that is
    neither needs the whole set at once.
    """

    def reasons(self, rows: Sequence[Row], /) -> list[str | None]:
        """For each row, in a few words, why it is dropped; None where it is kept."""
        ...


class RowFilter(ABC):
    """A filter that judges each row by itself."""

    @abstractmethod
    def reason(self, row: Row) -> str | None:
        """Why the row is dropped; None to keep it."""

    def reasons(self, rows: Sequence[Row]) -> list[str | None]:
        """The reason of each row."""
        return [self.reason(row) for row in rows]


class PromptFilter(ABC):
    """A filter that compares the rows of one prompt with each other."""

    @abstractmethod
    def prompt_reasons(self, rows: Sequence[Row]) -> list[str | None]:
        """The reason of each of one prompt's rows."""

    def reasons(self, rows: Sequence[Row]) -> list[str | None]:
        """The reason of each row, prompt by prompt."""
        places: defaultdict[str, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            places[row.prompt_id].append(place)
        reasons: list[str | None] = [None] * len(rows)
        for group in places.values():
            found = self.prompt_reasons([rows[place] for place in group])
            for place, reason in zip(group, found, strict=True):
                reasons[place] = reason
        return reasons


@dataclass(frozen=True, kw_only=True)
class InDomains:
    """Another filter, for the rows of some domains only; it does not see the others."""

    domains: tuple[str, ...]
    filter: Filter

    def reasons(self, rows: Sequence[Row]) -> list[str | None]:
        """The filter's reasons for rows of the domains, None for all others."""
        found = iter(self.filter.reasons([row for row in rows if row.domain in self.domains]))
        return [next(found) if row.domain in self.domains else None for row in rows]


class Dropped(NamedTuple):
    """A row that was dropped, the filter that did it, and why."""

    row: Row
    filter: str
    reason: str


class Step(NamedTuple):
    """How many rows of a domain came to a filter, and how many it dropped."""

    filter: str
    domain: str
    rows: int
    dropped: int


@dataclass(frozen=True, kw_only=True)
class Funnel:
    """What filters made of a set of rows: each row is in `kept` or, once, in `dropped`; both in order of their ids."""

    kept: tuple[Row, ...]
    dropped: tuple[Dropped, ...]
    steps: tuple[Step, ...]


def funnel(rows: Iterable[Row], filters: Sequence[Filter]) -> Funnel:
    """Apply the filters in their order; each sees only what those before it kept.

    The rows are put in order of their ids first, so that the outcome is the same in whatever order they come. `steps`
    has an entry for every filter and every domain of the input, zeros included. Raises ValueError for an id that
    occurs twice.
    """
    kept = sorted(rows, key=lambda row: row.id)
    for row, after in pairwise(kept):
        if row.id == after.id:
            raise ValueError(f"two rows have the id {row.id!r}; give each row an id of its own")
    domains = sorted({row.domain for row in kept})
    dropped: list[Dropped] = []
    steps: list[Step] = []
    for name, step in zip(names(filters), filters, strict=True):
        reasons = step.reasons(kept)
        come = Counter(row.domain for row in kept)
        gone = [Dropped(row, name, why) for row, why in zip(kept, reasons, strict=True) if why is not None]
        kept = [row for row, why in zip(kept, reasons, strict=True) if why is None]
        left = Counter(row.domain for row in kept)
        steps += [Step(name, domain, come[domain], come[domain] - left[domain]) for domain in domains]
        dropped += gone
    dropped.sort(key=lambda item: item.row.id)
    return Funnel(kept=tuple(kept), dropped=tuple(dropped), steps=tuple(steps))


def then(first: Funnel, second: Funnel) -> Funnel:
    """Two funnels as one; the second began with what the first kept, perhaps with more known of the rows."""
    dropped = sorted((*first.dropped, *second.dropped), key=lambda item: item.row.id)
    return Funnel(kept=second.kept, dropped=tuple(dropped), steps=_every_domain(first.steps, second.steps))


def _every_domain(first: Sequence[Step], second: Sequence[Step]) -> tuple[Step, ...]:
    """The steps of both, with zeros for the domains of which nothing came to the second."""
    domains = sorted({step.domain for step in first} | {step.domain for step in second})
    found = {(step.filter, step.domain): step for step in second}
    order = dict.fromkeys(step.filter for step in second)
    return (*first, *(found.get((name, d), Step(name, d, 0, 0)) for name in order for d in domains))


def names(filters: Sequence[Filter]) -> list[str]:
    """A name for each filter: its class, with a number where a class occurs more than once."""
    kinds = [_kind(step) for step in filters]
    count: Counter[str] = Counter()
    found = []
    for kind in kinds:
        count[kind] += 1
        found.append(f"{kind} {count[kind]}" if kinds.count(kind) > 1 else kind)
    return found


def _kind(step: Filter) -> str:
    return f"{_kind(step.filter)} ({', '.join(step.domains)})" if isinstance(step, InDomains) else type(step).__name__


def describe(settings: Any) -> Any:
    """Filters and other settings as plain JSON: a dataclass becomes an object that names its class as `kind`."""
    if is_dataclass(settings) and not isinstance(settings, type):
        values = {item.name: describe(vars(settings)[item.name]) for item in fields(settings)}
        return {"kind": type(settings).__name__, **values}
    if isinstance(settings, Mapping):
        return {str(key): describe(value) for key, value in settings.items()}
    if isinstance(settings, tuple | list):
        return [describe(value) for value in settings]
    if settings is None or isinstance(settings, bool | int | float | str):
        return settings
    raise TypeError(f"settings hold a {type(settings).__name__} ({settings!r:.60}), which cannot be written as JSON")
