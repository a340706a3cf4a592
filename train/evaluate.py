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


def read(stage: Path) -> dict[str, Score]:
    """The scores that an `Evaluate` stage wrote, by domain."""
    found = json.loads((stage / "scores.json").read_text())
    return {domain: Score(**score) for domain, score in found.items()}
