"""A task: a prompt, the verifier that judges answers to it, its domain and a stable id."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant" | "tool", "content": str, ...}


class Verdict(NamedTuple):
    """What a verifier says of a response: a score in [0, 1] and the reason in a few words."""

    score: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A prompt with its verifier. Picklable: verifiers run in other processes."""

    id: str
    domain: str
    messages: tuple[Message, ...]
    verifier: Callable[["Task", str], Verdict]
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class TaskSource(Protocol):
    """A finite, indexable set of tasks; the same index gives the same task in every process."""

    @property
    def domain(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Task: ...
