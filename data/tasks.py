"""Task sources put together: one task from its parts, sources one after another, mixed by weight, and split in two.

A source is a frozen dataclass whose fields are plain settings or other sources, so that a stage that trains on it can
be written down and compared; tasks are made when they are asked for.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from . import mixture
from .task import Message, Task, TaskSource, Verdict


def prompt_messages(prompt: str, system: str | None = None) -> tuple[Message, ...]:
    """The conversation that asks `prompt`.

    With `system` None there is no system message, and some chat templates then insert a long one of their own
    (SmolLM2's and Qwen2.5's do). A short one of yours keeps prompts short.
    """
    user: Message = {"role": "user", "content": prompt}
    return (user,) if system is None else ({"role": "system", "content": system}, user)


def build_task(
    domain: str,
    messages: tuple[Message, ...],
    verifier: Callable[[Task, str], Verdict],
    *,
    answer: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    id: str | None = None,
) -> Task:
    """A task; without an `id` of its own, the id is a hash of domain, messages and answer, the same everywhere."""
    return Task(
        id=id or content_hash([domain, list(messages), answer]),
        domain=domain,
        messages=messages,
        verifier=verifier,
        answer=answer,
        metadata=metadata or {},
    )


def content_hash(content: Any) -> str:
    """16 hexadecimal digits that depend on JSON-like content alone: not on process, platform or key order."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_text(task: Task) -> str:
    """What the task asks, without its system message, with blanks and case evened out: what makes it a duplicate."""
    contents = (str(message["content"]) for message in task.messages if message["role"] != "system")
    return "\n".join(" ".join(content.casefold().split()) for content in contents)


@dataclass(frozen=True, kw_only=True)
class Concat:
    """The tasks of several sources, one source after the other."""

    sources: tuple[TaskSource, ...]

    def __post_init__(self):
        if not self.sources:
            raise ValueError("Concat needs at least one source")

    @property
    def domain(self) -> str:
        return "+".join(dict.fromkeys(source.domain for source in self.sources))

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def __getitem__(self, index: int) -> Task:
        rest = check_index(index, len(self))
        for source in self.sources:
            if rest < len(source):
                return source[rest]
            rest -= len(source)
        raise AssertionError("unreachable: the index was checked")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """`size` tasks drawn from several sources in proportion to their weights, evenly all along.

    Each source is gone through in a shuffled order, again and again with a new one, so that no task is drawn twice
    before all of its source have been drawn once, and none more often than `max_epochs` says (see `mixture.Bounded`).
    """

    sources: tuple[TaskSource, ...]
    weights: tuple[float, ...]
    size: int
    max_epochs: float | None = None
    seed: int = 0

    def __post_init__(self):
        weights = np.asarray(self.weights, dtype=np.float64)
        if not self.sources or weights.shape != (len(self.sources),):
            raise ValueError(f"Mixture needs one weight per source, got {len(self.sources)} and {self.weights}")
        if not np.all(np.isfinite(weights)) or np.any(weights < 0) or weights.sum() == 0:
            raise ValueError(f"Mixture weights must be finite, not negative and not all 0, got {self.weights}")
        if self.size < 1:
            raise ValueError(f"Mixture needs a size of at least 1, got {self.size}")

    @property
    def domain(self) -> str:
        return "+".join(dict.fromkeys(source.domain for source in self.sources))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Task:
        return self._order[check_index(index, self.size)]

    @cached_property
    def _order(self) -> mixture.Bounded[Task]:
        weights = {str(i): weight for i, weight in enumerate(self.weights) if weight}
        sources = {name: self.sources[int(name)] for name in weights}
        return mixture.Bounded(sources, weights=weights, size=self.size, max_epochs=self.max_epochs, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Split:
    """One part of a source: the held-out tasks, or those left to train on.

    A hash of what a task asks (`prompt_text`) decides, so that the same question never lies in both parts, not even
    from two sources or under two system messages. `fraction` of the distinct questions are held out. Repeated
    questions stay in the training part and are left out of the held-out part.
    """

    source: TaskSource
    part: Literal["train", "held_out"]
    fraction: float = 0.25

    def __post_init__(self):
        if self.part not in ("train", "held_out"):
            raise ValueError(f"Split part must be 'train' or 'held_out', got {self.part!r}")
        if not 0.0 < self.fraction < 1.0:
            raise ValueError(f"Split fraction must lie between 0 and 1, got {self.fraction}")

    @property
    def domain(self) -> str:
        return self.source.domain

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Task:
        return self.source[self._indices[check_index(index, len(self))]]

    @cached_property
    def _indices(self) -> list[int]:
        indices: list[int] = []
        seen: set[str] = set()
        for index in range(len(self.source)):
            digest = hashlib.sha256(prompt_text(self.source[index]).encode(errors="surrogatepass")).hexdigest()
            is_held_out = int(digest[:16], 16) < self.fraction * 2**64
            if is_held_out != (self.part == "held_out") or (is_held_out and digest in seen):
                continue
            seen.add(digest)
            indices.append(index)
        if not indices:
            raise ValueError(
                f"the {self.part} part of {len(self.source)} tasks at fraction {self.fraction} is empty: "
                "give a larger source or another fraction"
            )
        return indices


def parts(*sources: TaskSource, held_out: float = 0.3) -> tuple[tuple[Split, ...], tuple[Split, ...]]:
    """Of each source the tasks to train on, and the fraction of them that is held out."""
    train = tuple(Split(source=one, part="train", fraction=held_out) for one in sources)
    return train, tuple(Split(source=one, part="held_out", fraction=held_out) for one in sources)


def check_index(index: int, length: int) -> int:
    """The index, if it lies in [0, length); an IndexError otherwise, which also ends a for loop over a source."""
    if not 0 <= index < length:
        raise IndexError(f"task {index} of a source of {length}")
    return index
