"""Validation while a stage trains: a score on held-out data now and then, the best model kept, an early end."""

import contextlib
import json
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..data import preferences
from ..data.pack import Group
from ..data.preferences import Paired, Rankings
from ..data.task import TaskSource
from ..data.tokenizer import Tokenizer
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


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a stage is scored: before the first step, after every `every`-th and after the last one.

    OUT/validation.json then has the score after each of those steps, OUT/best the model with the highest, the earliest
    of equals; OUT/model is always the last. After `patience` scores in a row that are no better than the best, the
    stage ends early; 0 lets it run. What was scored is in the checkpoints: a resumed run ends as an uninterrupted one
    does.
    """

    every: int
    limit: int = 64
    patience: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or self.limit < 1:
            raise ValueError(f"validating every {self.every} steps on {self.limit} examples: both must be at least 1")

    def times(self, steps: int) -> int:
        """How often a stage of `steps` is scored."""
        return 2 + (steps - 1) // self.every

    def keep_best(self, out: Path, score: Callable[[Any, Log], float], store: Callable[[Path, Any], None]) -> Validate:
        """What the loop calls between iterations: `score(state, log)`, and `store(folder, state)` for the best."""

        def validate(state: Any, cursor: Cursor, log: Log, is_last: bool) -> Cursor:
            step, scored = cursor["iteration"], cursor.get("validation", [])
            if (step % self.every and not is_last) or (scored and scored[-1][0] == step):
                return cursor
            now = score(state, log)
            if not scored or now > max(value for _, value in scored):
                store(out / "best", state)
            scored = [*scored, [step, now]]
            lines = [{"step": at, "score": value} for at, value in scored]
            if hosts.is_first():
                (out / "validation.json").write_text(json.dumps(lines, indent=2) + "\n")
            return {**cursor, "validation": scored, "stopped": self._is_over([value for _, value in scored])}

        return validate

    def _is_over(self, scores: list[float]) -> bool:
        since = len(scores) - 1 - scores.index(max(scores))
        return bool(self.patience) and since >= self.patience


@dataclass(frozen=True, kw_only=True)
class Validation(Schedule):
    """Answer the first `limit` of `tasks`; the score is the mean of the verifiers' verdicts. See `Schedule`."""

    tasks: TaskSource
    sampling: Sampling
    seed: int = 0

    def start(
        self,
        out: Path,
        start: str,
        compute: Compute,
        mesh: jax.sharding.Mesh,
        pool: VerifierPool,
        *,
        params: Callable[[Any], Any] = operator.attrgetter("params"),
    ) -> Validate:
        """What a stage calls between its iterations; `params` are the language model's in the stage's state."""
        stored, tokenizer = checkpoint.open_config(start), checkpoint.open_tokenizer(start)
        config = compute.configure(stored)

        def score(state: Any, log: Log) -> float:
            sampler = Sampler(sampling=self.sampling, slots=compute.slots, mesh=mesh, pool=pool, log=log)
            chosen = [self.tasks[i] for i in range(min(self.limit, len(self.tasks)))]
            model = checkpoint.Model(config, params(state), tokenizer)
            groups = sampler.rollouts(model, chosen, num_samples=1, noise=sample.Noise(seed=self.seed))
            return float(np.mean([one.reward for (one,) in groups]))

        def store(folder: Path, state: Any) -> None:
            checkpoint.save_model(folder / "model", checkpoint.Model(stored, params(state), tokenizer))

        return self.keep_best(out, score, store)

    def programs(
        self, config: ModelConfig, compute: Compute, mesh: jax.sharding.Mesh, *, steps: int, resident: Any
    ) -> programs.Programs:
        """The programs that it runs during a stage of `steps`."""
        answers = min(self.limit, len(self.tasks))
        of = {"group": 1, "answers": answers, "times": self.times(steps), "resident": resident}
        named = programs.generation(config, self.sampling, compute, mesh, **of)
        return {f"validation {name}": program for name, program in named.items()}


@contextlib.contextmanager
def validating(stage: Any, out: Path, mesh: jax.sharding.Mesh) -> Iterator[Validate | None]:
    """What the loop of a stage calls that has verifiers for its `validation` alone; they live inside."""
    if stage.validation is None:
        yield None
        return
    with VerifierPool(stage.verifiers) as pool:
        yield stage.validation.start(out, stage.start, stage.compute, mesh, pool)


@dataclass(frozen=True, kw_only=True)
class Agreement(Schedule):
    """Score the answers to the first `limit` prompts of `data` with a reward model: how far it agrees. See `Schedule`.

    The score is the share of a prompt's pairs that the model puts in the data's order, ties left out, averaged over
    prompts. An answer that stands alone agrees if sigma(its score) is on its label's side of 1/2.
    """

    data: Rankings | Paired

    def start(
        self,
        out: Path,
        tokenizer: Tokenizer,
        scores: Callable[[Any, Sequence[Group]], np.ndarray],
        store: Callable[[Path, Any], None],
    ) -> Validate:
        """What a stage calls between its iterations; `scores(params, groups)` are those of all answers."""
        data = self.data.open()
        rankings = [data[i] for i in range(min(self.limit, len(data)))]
        groups = [preferences.group(tokenizer, one) for one in rankings]

        def score(state: Any, log: Log) -> float:
            with log.phase("verify"):
                found = iter(scores(state.params, groups).tolist())
                return float(np.mean([agreement(one.scores, [next(found) for _ in one.scores]) for one in rankings]))

        return self.keep_best(out, score, store)


def agreement(wanted: Sequence[float], scores: Sequence[float]) -> float:
    """The share of pairs of answers whose scores are in the wanted order; of a single one, if its sign is."""
    if len(wanted) == 1:
        return float((scores[0] > 0) == (wanted[0] > 0.5))
    pairs = [(i, j) for i in range(len(wanted)) for j in range(len(wanted)) if wanted[i] > wanted[j]]
    if not pairs:
        raise ValueError(f"the scores {list(wanted)} rank no answer above another: leave this prompt out")
    return sum(scores[i] > scores[j] for i, j in pairs) / len(pairs)
