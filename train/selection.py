"""Which groups of answers a step of RL learns from, and how often it asks for others in the place of useless ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .rollout import Rollout

Group = list[Rollout]


@runtime_checkable
class Selection(Protocol):
    """Asks up to `rounds` times, each time for as many groups as are missing, and chooses among all that came."""

    @property
    def rounds(self) -> int: ...

    def useful(self, group: Group) -> bool:
        """Whether a group need not be replaced."""
        ...

    def choose(self, groups: Sequence[Group], wanted: int) -> list[Group]:
        """The groups to learn from."""
        ...


def has_variance(group: Group) -> bool:
    """Whether the answers to a prompt earned different rewards: else no advantage is other than 0."""
    return len({rollout.reward for rollout in group}) > 1


@dataclass(frozen=True, kw_only=True)
class Everything:
    """Every group, asked for once."""

    @property
    def rounds(self) -> int:
        """One."""
        return 1

    def useful(self, group: Group) -> bool:
        """All are."""
        return True

    def choose(self, groups: Sequence[Group], wanted: int) -> list[Group]:
        """All that came."""
        return list(groups)


@dataclass(frozen=True, kw_only=True)
class Informative:
    """Groups with variance alone; the others are replaced, and where `rounds` do not suffice the batch is smaller.

    OlmoRL's zero-gradient filter with active sampling, https://arxiv.org/abs/2512.13961, section 4.4.1.
    """

    rounds: int = 3

    def useful(self, group: Group) -> bool:
        """Those with variance."""
        return has_variance(group)

    def choose(self, groups: Sequence[Group], wanted: int) -> list[Group]:
        """Those with variance, at most as many as are wanted."""
        return [group for group in groups if has_variance(group)][:wanted]


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """DAPO's dynamic sampling: groups with variance are asked for until the batch is full, and it always is.

    Where `rounds` do not suffice, because nearly all tasks are solved or none can be, groups without variance fill it
    up: they add no gradient and keep the number of answers that the loss is divided by. It never waits for a task that
    there may not be. https://arxiv.org/abs/2503.14476, eq. 11.
    """

    rounds: int = 10

    def useful(self, group: Group) -> bool:
        """Those with variance."""
        return has_variance(group)

    def choose(self, groups: Sequence[Group], wanted: int) -> list[Group]:
        """Those with variance first, then the others in the order they came, as many as are wanted."""
        return sorted(groups, key=lambda group: not has_variance(group))[:wanted]


def collect(
    selection: Selection, wanted: int, ask: Callable[[int, int], list[Group]]
) -> tuple[list[Group], list[Group]]:
    """The groups to learn from, and all that were sampled; `ask(count, round)` samples some."""
    everything: list[Group] = []
    for index in range(selection.rounds):
        missing = wanted - sum(map(selection.useful, everything))
        if missing <= 0:
            break
        everything += ask(missing, index)
    return selection.choose(everything, wanted), everything
