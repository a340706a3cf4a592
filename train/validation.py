"""Validation while a stage trains: a score on held-out tasks now and then, the best model kept, an early end."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..data.task import TaskSource
from ..data.verify.pool import VerifierPool
from ..model import sample
from ..model.config import ModelConfig
from ..model.processing import Sampling
from ..sharding import hosts
from . import checkpoint, programs
from .compute import Compute
from .loop import Cursor, Validate
from .metrics import Log
from .rollout import Sampler
from .step import State


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Answer the first `limit` of `tasks` before the first step, after every `every`-th and after the last one.

    OUT/validation.json then has the mean reward after each of those steps, OUT/best the model with the highest, the
    earliest of equals; OUT/model is always the last. After `patience` scores in a row that are no better than the best,
    the stage ends early; 0 lets it run. What was scored is in the checkpoints: a resumed run ends as an uninterrupted
    one does.
    """

    tasks: TaskSource
    sampling: Sampling
    every: int
    limit: int = 64
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or self.limit < 1:
            raise ValueError(f"validating every {self.every} steps on {self.limit} tasks: both must be at least 1")

    def start(self, out: Path, start: str, compute: Compute, mesh: jax.sharding.Mesh, pool: VerifierPool) -> Validate:
        """What a stage calls between its iterations."""
        stored, tokenizer = checkpoint.open_config(start), checkpoint.open_tokenizer(start)
        config = compute.configure(stored)

        def score(state: State, log: Log) -> float:
            sampler = Sampler(sampling=self.sampling, slots=compute.slots, mesh=mesh, pool=pool, log=log)
            chosen = [self.tasks[i] for i in range(min(self.limit, len(self.tasks)))]
            model = checkpoint.Model(config, state.params, tokenizer)
            groups = sampler.rollouts(model, chosen, num_samples=1, noise=sample.Noise(seed=self.seed))
            return float(np.mean([one.reward for (one,) in groups]))

        def validate(state: State, cursor: Cursor, log: Log, is_last: bool) -> Cursor:
            step, scored = cursor["iteration"], cursor.get("validation", [])
            if (step % self.every and not is_last) or (scored and scored[-1][0] == step):
                return cursor
            now = score(state, log)
            if not scored or now > max(value for _, value in scored):
                checkpoint.save_model(out / "best" / "model", checkpoint.Model(stored, state.params, tokenizer))
            scored = [*scored, [step, now]]
            lines = [{"step": at, "score": value} for at, value in scored]
            if hosts.is_first():
                (out / "validation.json").write_text(json.dumps(lines, indent=2) + "\n")
            return {**cursor, "validation": scored, "stopped": self._is_over([value for _, value in scored])}

        return validate

    def _is_over(self, scores: list[float]) -> bool:
        since = len(scores) - 1 - scores.index(max(scores))
        return bool(self.patience) and since >= self.patience

    def programs(
        self, config: ModelConfig, compute: Compute, mesh: jax.sharding.Mesh, *, steps: int, resident: Any
    ) -> programs.Programs:
        """The programs that it runs during a stage of `steps`."""
        answers, times = min(self.limit, len(self.tasks)), 2 + (steps - 1) // self.every
        of = {"group": 1, "answers": answers, "times": times, "resident": resident}
        named = programs.generation(config, self.sampling, compute, mesh, **of)
        return {f"validation {name}": program for name, program in named.items()}
