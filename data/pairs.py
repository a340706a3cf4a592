"""Preference pairs from generations that are there anyway: best and worst of a prompt, or a strong model and a weak."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from .row import Row


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A better and a worse row that answer the same prompt. Raises ValueError if they do not, or say the same."""

    chosen: Row
    rejected: Row

    def __post_init__(self):
        if self.chosen.prompt != self.rejected.prompt:
            raise ValueError(
                f"rows {self.chosen.id!r} and {self.rejected.id!r} answer different prompts; pair by prompt"
            )
        if self.chosen.response == self.rejected.response:
            raise ValueError(f"rows {self.chosen.id!r} and {self.rejected.id!r} say the same; leave this pair out")

    @property
    def id(self) -> str:
        return f"{self.chosen.id}>{self.rejected.id}"


def by_score(row: Row) -> float:
    """The verdict's score, to rank rows by. Raises ValueError for a row without."""
    if row.score is None:
        raise ValueError(f"row {row.id!r} has no score to rank by; verify it first, or rank by reward")
    return row.score


def by_reward(row: Row) -> float:
    """The reward model's score, to rank rows by. Raises ValueError for a row without."""
    if row.reward is None:
        raise ValueError(f"row {row.id!r} has no reward to rank by; score it with a reward model first")
    return row.reward


def best_and_worst(rows: Iterable[Row], *, rank: Callable[[Row], float], min_margin: float = 0.0) -> list[Pair]:
    """For each prompt its best row and its worst, where they differ in rank by more than `min_margin`.

    Of equals the first by id is taken, for best and for worst. Prompts in order of their ids.
    """
    if min_margin < 0:
        raise ValueError(f"min_margin is {min_margin}; give 0 or more, so that the better row is the chosen one")
    pairs = []
    for group in _by_prompt(rows).values():
        best = min(group, key=lambda row: (-rank(row), row.id))
        worst = min(group, key=lambda row: (rank(row), row.id))
        if rank(best) - rank(worst) > min_margin and best.response != worst.response:
            pairs.append(Pair(chosen=best, rejected=worst))
    return pairs


def delta(strong: Iterable[Row], weak: Iterable[Row]) -> list[Pair]:
    """For each prompt that both models answered, the strong one's row over the weak one's, without any judge.

    Delta learning: https://arxiv.org/abs/2507.06187; Olmo 3 pairs Qwen3 32B with 0.6B, thinking both
    (https://arxiv.org/abs/2512.13961). Where a model has several rows of a prompt the first by id is taken; give
    filtered rows for the strong model. Prompts in order of their ids. Raises ValueError if a teacher is on both sides.
    """
    chosen, rejected = _by_prompt(strong), _by_prompt(weak)
    both = _teachers(chosen) & _teachers(rejected)
    if both:
        raise ValueError(f"{', '.join(sorted(both))} is both the strong and the weak model; give two models' rows")
    pairs = [(chosen[prompt][0], rejected[prompt][0]) for prompt in sorted(chosen.keys() & rejected.keys())]
    return [Pair(chosen=good, rejected=bad) for good, bad in pairs if good.response != bad.response]


def close_in_length(pairs: Iterable[Pair], *, max_difference: int = 100) -> list[Pair]:
    """The pairs whose rows differ by at most that many tokens, so that length is not what is preferred.

    Olmo 3 drops chat pairs that differ by more than 100 tokens: https://arxiv.org/abs/2512.13961.
    """
    return [pair for pair in pairs if abs(pair.chosen.num_tokens - pair.rejected.num_tokens) <= max_difference]


def _by_prompt(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.prompt_id, row.id)):
        groups[row.prompt_id].append(row)
    return dict(groups)


def _teachers(groups: Mapping[str, list[Row]]) -> set[str]:
    return {row.provenance.teacher_fingerprint for group in groups.values() for row in group}
