"""Conversations to learn from, as settings: files of them, or tasks answered with their gold answers."""

from dataclasses import dataclass

from . import source
from .shuffle import Indexable
from .task import Message, TaskSource


@dataclass(frozen=True, kw_only=True)
class Files:
    """Conversations in JSON Lines, Parquet or ArrayRecord files (see `source.read`)."""

    paths: tuple[str, ...]
    max_malformed: float = 0.01

    def open(self) -> Indexable[tuple[Message, ...]]:
        """The conversations; raises for files that are missing, empty or too malformed."""
        return source.read(*self.paths, max_malformed=self.max_malformed)


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Tasks as conversations that end with the task's own answer."""

    tasks: TaskSource

    def open(self) -> Indexable[tuple[Message, ...]]:
        """The conversations, made when asked for."""
        return _Answered(self.tasks)


@dataclass(frozen=True)
class _Answered:
    tasks: TaskSource

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> tuple[Message, ...]:
        task = self.tasks[index]
        if task.answer is None:
            raise ValueError(f"task {task.id} of {task.domain} has no answer to show: use a source that has")
        return (*task.messages, {"role": "assistant", "content": task.answer})
