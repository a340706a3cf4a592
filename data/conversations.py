"""Conversations to learn from, as settings: files, generated rows, tasks with gold answers, mixtures of these."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from . import columns, mixture, shards, source, variants
from .chat import Conversation
from .row import Row
from .shuffle import Indexable
from .task import TaskSource


@runtime_checkable
class Conversations(Protocol):
    """Settings of a set of conversations."""

    def open(self) -> Indexable[Conversation]:
        """The conversations. Raises ValueError or FileNotFoundError for what cannot be used."""
        ...


@dataclass(frozen=True, kw_only=True)
class Files:
    """Conversations in JSON Lines, Parquet or ArrayRecord files (see `source.read`)."""

    paths: tuple[str, ...]
    max_malformed: float = 0.01

    def open(self) -> Indexable[Conversation]:
        """The conversations; raises for files that are missing, empty or too malformed."""
        return source.read(*self.paths, max_malformed=self.max_malformed)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Generated rows of the folders of `Generate` or `Curate` stages, with the tools that they were offered.

    Their checksums are compared first.
    """

    folders: tuple[str, ...]

    def open(self) -> Indexable[Conversation]:
        """The rows as conversations, in order of folders and in each of prompts."""
        return self._read(lambda row: row)

    def _read(self, variant: Callable[[Row], Row]) -> Indexable[Conversation]:
        files = [path for folder in self.folders for path in shards.paths(shards.rows_folder(folder))]
        return source.read(*files, parse=lambda record: columns.conversation(variant(columns.row(record))))


@dataclass(frozen=True, kw_only=True)
class WithoutThinking(Rows):
    """The same rows with the assistant's answers alone: see `variants.without_thinking`."""

    def open(self) -> Indexable[Conversation]:
        """The rows as conversations, in order of folders and in each of prompts."""
        return self._read(lambda row: variants.without_thinking(row, count_tokens=len))


@dataclass(frozen=True, kw_only=True)
class EmptyThinking(Rows):
    """The same rows, told not to think, with an empty thinking: see `variants.with_empty_thinking`."""

    def open(self) -> Indexable[Conversation]:
        """The rows as conversations, in order of folders and in each of prompts."""
        return self._read(lambda row: variants.with_empty_thinking(row, count_tokens=len))


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Tasks as conversations that end with the task's own answer."""

    tasks: TaskSource

    def open(self) -> Indexable[Conversation]:
        """The conversations, made when asked for."""
        return _Answered(self.tasks)


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """`size` conversations from several sets in proportion to their weights, evenly all along; sets by name.

    Each set is gone through in a shuffled order, again and again with a new one. With `max_epochs`, no set gives any
    conversation more often than that: the others make up for it (see `mixture.capped`).
    """

    parts: Mapping[str, Conversations]
    weights: Mapping[str, float]
    size: int
    max_epochs: float | None = None
    seed: int = 0

    def open(self) -> Indexable[Conversation]:
        """The mixture. Raises ValueError for weights of other names, or where the cap leaves fewer than `size`."""
        return mixture.Bounded(
            {name: part.open() for name, part in self.parts.items()},
            weights=self.weights,
            size=self.size,
            max_epochs=self.max_epochs,
            seed=self.seed,
        )


@dataclass(frozen=True)
class _Answered:
    tasks: TaskSource

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Conversation:
        task = self.tasks[index]
        if task.answer is None:
            raise ValueError(f"task {task.id} of {task.domain} has no answer to show: use a source that has")
        return (*task.messages, {"role": "assistant", "content": task.answer})
