"""What a filter is, and the funnel: filters applied one after the other, with every dropped row and its reason kept.

Filters of single rows commute. Those that compare rows do not: put them after what drops rows for their own faults, or
a wrong row may displace a right one. An order that works: Licensed, Finished, Verified, Length, repetition, language,
Refusals, Identity, KnowledgeDates, Decontaminated, DifficultyBand, NearDuplicateResponses, NearDuplicatePrompts, and
last ShortestCorrect or BestByReward.
"""

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

from .. import streams
from ..row import Row

Judge = Callable[[Sequence[Row]], list[str | None]]
"""For each of some rows, in a few words, why it is dropped; None where it is kept."""


class Filter(ABC):
    """Settings that tell which rows of a set to drop: a frozen dataclass of plain values.

    What needs no more than a row is a `RowFilter`, what compares a prompt's answers a `PromptFilter`; a filter that is
    neither remembers, from a batch to the next, what it has to know of those before.
    """

    @abstractmethod
    def begin(self) -> Judge:
        """Begin with a set. The judge is given it in batches of whole prompts, in order of their ids."""

    def reasons(self, rows: Sequence[Row]) -> list[str | None]:
        """The reason of each row of a whole set, in any order."""
        return self.begin()(rows)


class RowFilter(Filter):
    """A filter that judges each row by itself."""

    @abstractmethod
    def reason(self, row: Row) -> str | None:
        """Why the row is dropped; None to keep it."""

    def begin(self) -> Judge:
        """See `Filter`."""
        return lambda rows: [self.reason(row) for row in rows]


class PromptFilter(Filter):
    """A filter that compares the rows of one prompt with each other."""

    @abstractmethod
    def prompt_reasons(self, rows: Sequence[Row]) -> list[str | None]:
        """The reason of each of one prompt's rows."""

    def begin(self) -> Judge:
        """See `Filter`."""
        return self._prompt_by_prompt

    def _prompt_by_prompt(self, rows: Sequence[Row]) -> list[str | None]:
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
class InDomains(Filter):
    """Another filter, for the rows of some domains only; it does not see the others."""

    domains: tuple[str, ...]
    filter: Filter

    def begin(self) -> Judge:
        """The filter's reasons for rows of the domains, None for all others."""
        judge = self.filter.begin()

        def judge_some(rows: Sequence[Row]) -> list[str | None]:
            found = iter(judge([row for row in rows if row.domain in self.domains]))
            return [next(found) if row.domain in self.domains else None for row in rows]

        return judge_some


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
    """What filters made of a set of rows: each row is in `kept` or, once, in `dropped`; both in `streams.order`."""

    kept: tuple[Row, ...]
    dropped: tuple[Dropped, ...]
    steps: tuple[Step, ...]


class Sieve:
    """Filters at work on a set that need not fit in memory: it comes in batches of whole prompts, in order.

    Each filter sees only what those before it kept.
    """

    def __init__(self, filters: Sequence[Filter]) -> None:
        self._judges = [(name, one.begin()) for name, one in zip(names(filters), filters, strict=True)]
        self._come: Counter[tuple[str, str]] = Counter()
        self._gone: Counter[tuple[str, str]] = Counter()
        self.domains: set[str] = set()

    def __call__(self, rows: Sequence[Row]) -> tuple[list[Row], list[Dropped]]:
        """What is kept of a batch, and what is dropped, in the order of the filters."""
        kept, dropped = list(rows), list[Dropped]()
        self.domains.update(row.domain for row in rows)
        for name, judge in self._judges:
            reasons = judge(kept)
            gone = [Dropped(row, name, why) for row, why in zip(kept, reasons, strict=True) if why is not None]
            self._come.update((name, row.domain) for row in kept)
            self._gone.update((name, one.row.domain) for one in gone)
            kept = [row for row, why in zip(kept, reasons, strict=True) if why is None]
            dropped += gone
        return kept, dropped

    def steps(self, domains: Iterable[str] | None = None) -> tuple[Step, ...]:
        """An entry for every filter and every domain (those that came, unless told), zeros included."""
        every = sorted(self.domains if domains is None else domains)
        pairs = [(name, domain) for name, _ in self._judges for domain in every]
        return tuple(Step(name, domain, self._come[name, domain], self._gone[name, domain]) for name, domain in pairs)


def funnel(rows: Iterable[Row], filters: Sequence[Filter]) -> Funnel:
    """Apply filters to rows that fit in memory, whatever their order.

    Raises ValueError for an id that occurs twice.
    """
    sieve = Sieve(filters)
    kept, dropped = sieve(streams.in_order(rows))
    return Funnel(kept=tuple(kept), dropped=tuple(sort_dropped(dropped)), steps=sieve.steps())


def sort_dropped(dropped: Iterable[Dropped]) -> list[Dropped]:
    """Dropped rows in `streams.order`."""
    return sorted(dropped, key=lambda one: streams.order(one.row))


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
