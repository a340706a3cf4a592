"""Verifiers for instruction following: does the response keep every constraint that its prompt states.

In the manner of IFEval (https://arxiv.org/abs/2311.07911), strict: the response is judged as it is, but for blanks at
its ends. The constraints are in `constraints` and `formats`; any object with `describe()` and `holds(response)` is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..task import Task, Verdict
from .guard import refusal


class Constraint(Protocol):
    """A demand on a response that a program can check."""

    def describe(self) -> str:
        """The demand as one sentence for the prompt; empty where the prompt's question already says it."""
        ...

    def holds(self, response: str) -> bool:
        """Whether the response, which is not blank, keeps to it."""
        ...


@dataclass(frozen=True)
class Follow:
    """1 where the response satisfies all constraints, else 0 (IFEval's strict prompt-level accuracy)."""

    constraints: tuple[Constraint, ...]

    def __post_init__(self):
        _check(self.constraints)

    def __call__(self, task: Task, response: str) -> Verdict:
        refused = refusal(task, response)
        if refused:
            return refused
        broken = violations(self.constraints, response)
        return Verdict(0.0, f"broken: {'; '.join(broken)}") if broken else Verdict(1.0, "all constraints hold")


@dataclass(frozen=True)
class FollowShare:
    """The share of the constraints that the response satisfies (IFEval's strict instruction-level accuracy)."""

    constraints: tuple[Constraint, ...]

    def __post_init__(self):
        _check(self.constraints)

    def __call__(self, task: Task, response: str) -> Verdict:
        refused = refusal(task, response)
        if refused:
            return refused
        num_kept = len(self.constraints) - len(violations(self.constraints, response))
        return Verdict(num_kept / len(self.constraints), f"{num_kept} of {len(self.constraints)} constraints hold")


def violations(constraints: Sequence[Constraint], response: str) -> list[str]:
    """What the response breaks, in words; empty where all constraints hold."""
    text = response.strip()
    return [each.describe() or repr(each) for each in constraints if not (text and each.holds(text))]


def describe(constraints: Sequence[Constraint]) -> str:
    """The constraints as sentences to put into a prompt."""
    return " ".join(sentence for each in constraints if (sentence := each.describe()))


def _check(constraints: tuple[Constraint, ...]) -> None:
    if not constraints:
        raise ValueError("at least one constraint is needed: with none, every response would pass")
