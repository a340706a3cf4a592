"""Evaluation: a model's score on held-out tasks of each domain, with 95% intervals."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax

from ..data.task import TaskSource
from ..data.verify.pool import VerifierPool
from ..model import sample
from ..model.processing import Sampling
from ..sharding import hosts
from ..sharding import mesh as meshes
from . import checkpoint, programs, rollout
from .compute import Compute
from .metrics import Log
from .rollout import Sampler


class Score(NamedTuple):
    """Mean score of `n` answers and its 95% interval."""

    mean: float
    low: float
    high: float
    n: int


def wilson(scores: Sequence[float], *, z: float = 1.959964) -> Score:
    """Mean of scores in [0, 1] with Wilson's 95% interval, which stays in [0, 1] and is honest near the ends.

    E. B. Wilson, https://doi.org/10.1080/01621459.1927.10502953. Exact for 0/1 scores, wide for others.
    """
    n = len(scores)
    mean = math.fsum(scores) / n
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return Score(mean, max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean)), n)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Answer the first `limit` tasks of every source once and have the answers judged.

    Sources of one domain share a score.
    """

    model: str
    tasks: tuple[TaskSource, ...]
    sampling: Sampling
    limit: int = 64
    compute: Compute = field(default_factory=Compute)
    verifiers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit < 1 or not self.tasks:
            raise ValueError(
                f"an evaluation of {len(self.tasks)} sources with a limit of {self.limit} tasks each asks nothing: "
                "give at least one of both"
            )

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Write `out`/scores.json and every answer to `out`/rollouts."""
        mesh = mesh or meshes.make_mesh()
        rewards: dict[str, list[float]] = {}
        with VerifierPool(self.verifiers) as pool, Log(out, title=out.name, total=len(self.tasks)) as log:
            with log.phase(log.opening):
                model = checkpoint.open_model(self.model, mesh)
                model = model._replace(config=self.compute.configure(model.config))
            sampler = Sampler(sampling=self.sampling, slots=self.compute.slots, mesh=mesh, pool=pool, log=log)
            for index, source in enumerate(self.tasks):
                chosen = [source[i] for i in range(min(self.limit, len(source)))]
                noise = sample.Noise(seed=self.seed, step=index)
                groups = sampler.rollouts(model, chosen, num_samples=1, noise=noise)
                rollout.write(out / "rollouts", index, groups, model.tokenizer.decode)
                rewards.setdefault(source.domain, []).extend(one[0].reward for one in groups)
                log.write(index + 1, rollout.statistics(groups))
        text = json.dumps({domain: wilson(found)._asdict() for domain, found in rewards.items()}, indent=2)
        if hosts.is_first():
            (out / "scores.json").write_text(text + "\n")

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """The compiled programs of this stage and their abstract arguments."""
        config = self.compute.configure(checkpoint.open_config(self.model))
        answers = min(self.limit, max(map(len, self.tasks)))
        of = {"group": 1, "answers": answers, "times": len(self.tasks)}
        return programs.generation(config, self.sampling, self.compute, mesh, **of)

    def result(self) -> None:
        """It makes no model."""
        return None


@dataclass(frozen=True, kw_only=True)
class OverSeeds:
    """The mean of the scores of several `Evaluate` stages, one a seed, with a 95% interval by Student's t.

    The interval is that of the mean over seeds on these very tasks: it says nothing of other tasks.
    """

    evaluations: tuple[str, ...]

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Write `out`/scores.json, in which n counts the answers of all seeds."""
        found = [read(Path(one)) for one in self.evaluations]
        scores = {domain: over_seeds([one[domain] for one in found]) for domain in found[0]}
        text = json.dumps({domain: score._asdict() for domain, score in scores.items()}, indent=2)
        (out / "scores.json").write_text(text + "\n")

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """Nothing is compiled."""
        return {}

    def result(self) -> None:
        """It makes no model."""
        return None


T_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""The 97.5% point of Student's t with 1 to 9 degrees of freedom."""


def over_seeds(scores: Sequence[Score]) -> Score:
    """Mean over up to ten seeds with its 95% interval by Student's t, cut to [0, 1]; of one seed, its own score."""
    if len(scores) == 1:
        return scores[0]
    mean, half = mean_over_seeds([score.mean for score in scores])
    return Score(mean, max(0.0, mean - half), min(1.0, mean + half), sum(score.n for score in scores))


def mean_over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean of one number per seed, and half of its 95% interval by Student's t; infinite for a single seed.

    Raises:
        ValueError: for more than ten seeds, or none.
    """
    if not 1 <= len(values) <= len(T_95) + 1:
        raise ValueError(f"the interval is over 1 to {len(T_95) + 1} seeds, not {len(values)}")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.inf
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, T_95[len(values) - 2] * math.sqrt(variance / len(values))


def read(stage: Path) -> dict[str, Score]:
    """The scores that an `Evaluate` stage wrote, by domain."""
    found = json.loads((stage / "scores.json").read_text())
    return {domain: Score(**score) for domain, score in found.items()}
