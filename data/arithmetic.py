"""Sums a small model can learn: all pairs of numbers with a given count of digits."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .task import Task
from .tasks import build_task, check_index, prompt_messages
from .verify.maths import FinalNumber

_NAMES = {"+": "+", "-": "-", "*": "×"}


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """ "What is 7 + 5?" for every pair of numbers with `digits` digits and every operation, once, in a seeded order.

    Operations are "+", "-" and "*". 0 is not among the numbers of one digit: 81 pairs for digits=1, 8,100 for 2,
    810,000 for 3.
    """

    digits: int = 1
    operations: tuple[str, ...] = ("+",)
    system: str | None = "Answer with a number."
    seed: int = 0

    def __post_init__(self):
        if self.digits not in (1, 2, 3):
            raise ValueError(f"Arithmetic digits must be 1, 2 or 3, got {self.digits}")
        unknown = [operation for operation in self.operations if operation not in _NAMES]
        if unknown or not self.operations or len(set(self.operations)) != len(self.operations):
            raise ValueError(f"Arithmetic operations must be distinct ones of '+', '-', '*', got {self.operations}")

    @property
    def domain(self) -> str:
        return "arithmetic"

    def __len__(self) -> int:
        return self._num_operands**2 * len(self.operations)

    def __getitem__(self, index: int) -> Task:
        rest, which = divmod(int(self._order[check_index(index, len(self))]), len(self.operations))
        first, second = (10 ** (self.digits - 1) + number for number in divmod(rest, self._num_operands))
        operation = self.operations[which]
        result = {"+": first + second, "-": first - second, "*": first * second}[operation]
        prompt = f"What is {first} {_NAMES[operation]} {second}?"
        return build_task(self.domain, prompt_messages(prompt, self.system), FinalNumber(), answer=str(result))

    @property
    def _num_operands(self) -> int:
        return 9 * 10 ** (self.digits - 1)

    @cached_property
    def _order(self) -> np.ndarray:
        return np.random.default_rng(self.seed).permutation(len(self))
