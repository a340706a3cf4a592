"""Several sources in fixed proportions, in an order that is a pure function of (seed, index); epochs and their cap."""

import math
import sys
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Generic, NamedTuple, TypeVar

from .shuffle import Indexable, Shuffled

T = TypeVar("T")


class Drawn(NamedTuple):
    """An item and the name of the source it came from."""

    source: str
    item: Any


class Mixture:
    """An endless sequence of items from named sources, each repeated in ever new orders.

    Any prefix holds each source in its proportion, to within three items. `mixture[i]` depends on the
    weights, the seed and i alone. (grain.MapDataset.mix rounds: it makes 0.3003 of a weight of 0.3 beside 0.7.)
    """

    def __init__(
        self, sources: Mapping[str, Indexable[Any]], *, weights: Mapping[str, float | Fraction], seed: int
    ) -> None:
        if set(sources) != set(weights) or not sources:
            raise ValueError(f"the sources are {sorted(sources)} and the weights {sorted(weights)}; name the same ones")
        for name, weight in weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight of {name!r} is {weight}; give a positive number, or leave the source out")
        # The heaviest first: 150 random mixtures of up to 16 sources strayed by 2.2 items at most, unsorted by 5.2.
        self._names = tuple(sorted(sources, key=lambda name: -weights[name]))
        self._sources = {name: Shuffled(source, seed=f"{seed}/{name}") for name, source in sources.items()}
        exact = [Fraction(str(weights[name])) for name in self._names]
        unit = math.lcm(*(weight.denominator for weight in exact))
        self._shares = tuple(int(weight * unit) for weight in exact)

    def __len__(self) -> int:
        return sys.maxsize

    def locate(self, index: int) -> tuple[str, int]:
        """The source of item `index`, and how many items of that source come before it.

        From the first source to the last, of the items that are left each takes its share of what is left of the
        whole, rounded up; the source whose count grows from `index` to `index` + 1 is the one.
        """
        before, after, left = index, index + 1, sum(self._shares)
        for name, share in zip(self._names, self._shares, strict=True):
            rest_before = before * (left - share) // left
            rest_after = after * (left - share) // left
            if after - rest_after != before - rest_before:
                return name, before - rest_before
            before, after, left = rest_before, rest_after, left - share
        raise AssertionError("the last source takes all that is left")

    def __getitem__(self, index: int) -> Drawn:
        name, place = self.locate(index)
        return Drawn(name, self._sources[name][place])

    def drawn(self, count: int) -> dict[str, int]:
        """How many of the first `count` items are each source's."""
        found, left, rest = {}, sum(self._shares), count
        for name, share in zip(self._names, self._shares, strict=True):
            after = rest * (left - share) // left
            found[name], rest, left = rest - after, after, left - share
        return found


class Bounded(Generic[T]):
    """The first `size` items of a mixture, without their sources' names.

    `epochs` says how often each source is gone through. With `max_epochs` none is more often than that: see `capped`.
    """

    def __init__(
        self,
        sources: Mapping[str, Indexable[T]],
        *,
        weights: Mapping[str, float],
        size: int,
        max_epochs: float | None = None,
        seed: int = 0,
    ) -> None:
        lengths = {name: len(source) for name, source in sources.items()}
        shares = weights if max_epochs is None else capped(weights, lengths, size=size, max_epochs=max_epochs)
        self._mixture = Mixture(sources, weights=shares, seed=seed)
        self._size = size
        self.epochs = {name: count / lengths[name] for name, count in self._mixture.drawn(size).items()}

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> T:
        if not 0 <= index < self._size:
            raise IndexError(f"item {index} of a mixture of {self._size}")
        return self._mixture[index].item


def capped(
    weights: Mapping[str, float], lengths: Mapping[str, int], *, size: int, max_epochs: float
) -> dict[str, Fraction]:
    """Weights, adding up to `size`, under which `size` items hold each source's at most `max_epochs` times.

    A source that would is held at what it has; the others share what is left, in proportion to their weights. Raises
    ValueError if all sources together have too few.
    """
    if set(weights) != set(lengths) or not max_epochs > 0:
        raise ValueError(
            f"weights are for {sorted(weights)}, sources are {sorted(lengths)}, max_epochs is {max_epochs}: name the "
            "same ones, and give a positive cap"
        )
    room = {name: math.floor(max_epochs * length) for name, length in lengths.items()}
    if sum(room.values()) < size:
        raise ValueError(
            f"{size} items are wanted, and {max_epochs:g} epochs of {dict(lengths)} are {sum(room.values())}: take "
            "fewer, raise max_epochs, or add data"
        )
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    held: dict[str, Fraction] = {}
    while True:
        free = {name: weight for name, weight in exact.items() if name not in held}
        left, total = size - sum(held.values()), sum(free.values())
        over = [name for name, weight in free.items() if left * weight > room[name] * total]
        if not over:
            return {**held, **{name: left * weight / total for name, weight in free.items()}}
        held |= {name: Fraction(room[name]) for name in over}
