"""Which stages of a recipe may run at the same time, on slices of their own: read off the recipe itself.

A `run` notes the stages instead of training them; a stage depends on those whose folders its settings name. Of the
stages that are ready, those that train get a slice each, with whatever depends on nothing else; where they join, a new
round begins. For one specialist per domain and a student of all: the start; the specialists side by side, each with its
evaluation; the merges and the student.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Lane = tuple[str, ...]
"""Names of stages that run one after the other, on one slice."""


class Noted(NamedTuple):
    """A stage that a recipe asked for: what it depends on, and whether it trains (and so is worth a slice)."""

    needs: frozenset[str]
    trains: bool


class Noting:
    """The `run` that notes stages and what they depend on."""

    def __init__(self, settings: Callable[[Any], Any]) -> None:
        """`settings` makes plain JSON of a stage."""
        self.settings = settings
        self.stages: dict[str, Noted] = {}

    def __call__(self, name: str, stage: Any) -> str:
        """Note the stage; its folder is one that no setting of the user's looks like."""
        found = set(_texts(self.settings(stage)))
        needs = {other for other in self.stages if any(_is_in(text, _folder(other)) for text in found)}
        trains = "steps" in {field.name for field in dataclasses.fields(stage)}
        self.stages[name] = Noted(frozenset(needs), trains)
        return _folder(name)


def _folder(name: str) -> str:
    return f"noted-by-fan-out:/{name}"


def _is_in(text: str, folder: str) -> bool:
    return text == folder or text.startswith(f"{folder}/")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def rounds(stages: Mapping[str, Noted]) -> list[list[Lane]]:
    """Lanes that run side by side, round after round; every stage comes once, after what it needs."""
    found: list[list[Lane]] = []
    done: set[str] = set()
    while len(done) < len(stages):
        lanes = _round(stages, done)
        found.append(lanes)
        done |= {name for lane in lanes for name in lane}
    return found


def launches(name: str, found: Sequence[Sequence[Lane]]) -> list[list[tuple[str, Lane]]]:
    """Names of the launches of each round, with their lanes; the last, of the plain name, also writes the report."""
    named = [
        [(f"{name}-{number}-{i}", lane) for i, lane in enumerate(lanes, 1)] for number, lanes in enumerate(found, 1)
    ]
    if len(found[-1]) == 1:
        named[-1] = [(name, found[-1][0])]
    else:
        named.append([(name, ())])
    return named


def _round(stages: Mapping[str, Noted], done: set[str]) -> list[Lane]:
    ready = _ready(stages, done)
    training = [name for name in ready if stages[name].trains]
    if len(training) < 2:
        return [_alone(stages, done)]
    quick = [name for name in ready if name not in training]
    return [
        tuple(_closed(stages, done, [name, *(quick if i == 0 else [])], apart=set(ready)))
        for i, name in enumerate(training)
    ]


def _ready(stages: Mapping[str, Noted], done: set[str]) -> list[str]:
    return [name for name, noted in stages.items() if name not in done and noted.needs <= done]


def _alone(stages: Mapping[str, Noted], done: set[str]) -> Lane:
    """One slice for what comes next, up to where two or more stages that train are ready."""
    lane: list[str] = []
    while ready := _ready(stages, done | set(lane)):
        if lane and sum(stages[name].trains for name in ready) > 1:
            break
        lane += ready
    return tuple(name for name in stages if name in lane)


def _closed(stages: Mapping[str, Noted], done: set[str], begin: Sequence[str], *, apart: set[str]) -> list[str]:
    """These stages and all that need nothing but them and what is done, in the recipe's order."""
    lane = set(begin)
    for name, noted in stages.items():  # a recipe names a stage after what it needs
        if name not in done | apart and noted.needs & lane and noted.needs <= done | lane:
            lane.add(name)
    return [name for name in stages if name in lane]
