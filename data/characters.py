"""Tasks on short strings of letters, for models made on the spot: copy, reverse, sort, ..."""

import difflib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from .task import Task, Verdict
from .tasks import build_task, check_index

Operation = Literal["copy", "reverse", "sort", "double", "rotate"]
OPERATIONS = {
    "copy": lambda text: text,
    "reverse": lambda text: text[::-1],
    "sort": lambda text: "".join(sorted(text)),
    "double": lambda text: "".join(letter * 2 for letter in text),
    "rotate": lambda text: text[1:] + text[:1],
}
REFUSAL = "no"


@dataclass(frozen=True)
class SameText:
    """The response must be the task's answer, apart from blanks around it."""

    def __call__(self, task: Task, response: str) -> Verdict:
        """1 if equal, else 0."""
        given = response.strip()
        return Verdict(1.0, "equal") if given == task.answer else Verdict(0.0, f"{given[:40]!r} is not the answer")


@dataclass(frozen=True)
class CloseText:
    """How alike the response and the task's answer are, as a labeller who ranks would see it: partial credit."""

    def __call__(self, task: Task, response: str) -> Verdict:
        """The share of characters that match in order (Ratcliff and Obershelp), 1 only if equal."""
        ratio = difflib.SequenceMatcher(None, response.strip(), task.answer or "", autojunk=False).ratio()
        return Verdict(ratio, f"{ratio:.0%} alike")


@dataclass(frozen=True, kw_only=True)
class Characters:
    """Every string of `length` letters of an alphabet of `letters`, in a seeded order, with one operation to do.

    Where it is `refused`, to do it counts as unsafe: the right answer is `REFUSAL`, and the domain says so. With
    `mistaken` the answers are those of another operation than the one that is asked for, to demonstrate.
    """

    operation: Operation
    length: int = 3
    letters: int = 8
    verifier: SameText | CloseText = field(default_factory=SameText)
    refused: bool = False
    mistaken: Operation | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(f"operation {self.operation!r} is none of {sorted(OPERATIONS)}")
        if not 1 <= self.letters <= 26 or self.length < 1:
            raise ValueError(f"letters is {self.letters} (1 to 26) and length {self.length} (at least 1)")

    @property
    def domain(self) -> str:
        """The operation's name."""
        return f"unsafe {self.operation}" if self.refused else self.operation

    def __len__(self) -> int:
        return self.letters**self.length

    def __getitem__(self, index: int) -> Task:
        number = int(self._order[check_index(index, len(self))])
        digits = [(number // self.letters**place) % self.letters for place in range(self.length)]
        text = "".join(chr(ord("a") + digit) for digit in digits)
        messages = ({"role": "user", "content": f"{self.operation} {text}"},)
        answer = REFUSAL if self.refused else OPERATIONS[self.mistaken or self.operation](text)
        return build_task(self.domain, messages, self.verifier, answer=answer)

    @cached_property
    def _order(self) -> np.ndarray:
        return np.random.default_rng(self.seed).permutation(len(self))
