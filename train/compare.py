"""Comparisons: several answers to each task, from one model or several, ranked; and the best answer to each.

The rankings are what reward models and preferences learn from, the best answers what rejection sampling fine-tunes on.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from ..data.task import Task, TaskSource
from ..data.tokenizer import Tokenizer
from ..data.verify.pool import VerifierPool
from ..model import sample
from ..model.processing import Sampling
from ..sharding import hosts
from ..sharding import mesh as meshes
from . import bucket, checkpoint, programs, rewards
from .compute import Compute
from .hosted import Hosted
from .judge import Judge
from .metrics import Log
from .rewards import RewardModels
from .rollout import Rollout, Sampler

RANKINGS, BEST = "rankings.jsonl", "best.jsonl"


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """Answers are ranked by what the tasks' verifiers say."""

    def open(self, *_: object) -> rewards.Score:
        """See `rewards.RewardSource`."""
        return lambda _, groups: np.asarray([r.reward for group in groups for r in group], np.float32)


@dataclass(frozen=True, kw_only=True)
class Order:
    """Answers are ranked by who gave them, the models that come first before the others, without any judge.

    Delta learning, https://arxiv.org/abs/2507.06187: a strong model's answer is chosen over a weak one's.
    """

    def open(self, *_: object) -> rewards.Score:
        """See `rewards.RewardSource`."""
        return lambda _, groups: np.asarray([-r.version for group in groups for r in group], np.float32)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """`samples` answers of each of `models` to the first `limit` tasks, ranked by `by`.

    OUT/rankings.jsonl has {"prompt", "responses", "scores"} for each prompt with answers that differ in rank, as
    `data.preferences` reads them; OUT/best.jsonl has the best answer to each prompt as a conversation to fine-tune on,
    if its score is `passing` or more (None: whatever it is). Equal answers are one, and being cut off takes
    `unfinished` off a score: as text such an answer looks finished. An interrupted stage goes on after the last
    `block` of tasks that was completed.
    """

    models: tuple[str, ...]
    tasks: TaskSource
    sampling: Sampling
    by: Verdicts | Order | RewardModels | Judge = field(default_factory=Verdicts)
    samples: int = 4
    limit: int = 1024
    block: int = 256
    passing: float | None = 0.0
    unfinished: float = 1.0
    compute: Compute = field(default_factory=Compute)
    verifiers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.models or self.samples * len(self.models) < 1 or self.limit < 1 or self.block < 1:
            raise ValueError(
                f"{self.samples} answers of {len(self.models)} models to {self.limit} tasks, {self.block} at a time: "
                "give at least one of each"
            )

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Write `out`/rankings.jsonl and `out`/best.jsonl.

        Raises:
            ValueError: if no prompt has answers that differ in rank, or the models have different tokenizers.
        """
        mesh = mesh or meshes.make_mesh()
        tokenizer = checkpoint.open_tokenizer(self.models[0])
        for path in self.models:
            if checkpoint.open_tokenizer(path).fingerprint != tokenizer.fingerprint:
                raise ValueError(f"{self.models[0]} and {path} have different tokenizers: compare them in two stages")
        starts = range(0, min(self.limit, len(self.tasks)), self.block)
        score = self.by.open(tokenizer, self.compute, mesh)
        hosted = Hosted({path: path for path in self.models}, self.compute, mesh)
        with (
            VerifierPool(self.verifiers) as pool,
            Log(out, title=out.name, total=len(starts)) as log,
            jax.set_mesh(mesh),
        ):
            sampler = Sampler(sampling=self.sampling, slots=self.compute.slots, mesh=mesh, pool=pool, log=log)
            for number, start in enumerate(starts):
                part = _part(out, number)
                if not hosts.from_first(part.exists):
                    tasks = [self.tasks[i] for i in range(start, min(start + self.block, starts.stop))]
                    groups = self._answered(sampler, hosted, tokenizer, tasks, number)
                    with log.phase("verify"):
                        scores = score(checkpoint.Model(*hosted(self.models[0]), tokenizer), groups)
                    hosted.leave()
                    _write(part, _ranked(groups, scores, tokenizer, self.unfinished))
                    bucket.refresh()  # one host writes, all read
                log.write(number + 1, {})
        rows = [
            json.loads(line) for number in range(len(starts)) for line in _part(out, number).read_bytes().splitlines()
        ]
        self._finish(out, rows)

    def _answered(
        self, sampler: Sampler, hosted: Hosted, tokenizer: Tokenizer, tasks: Sequence[Task], number: int
    ) -> list[list[Rollout]]:
        """All models' answers to each task; `version` says whose they are."""
        groups: list[list[Rollout]] = [[] for _ in tasks]
        for index, path in enumerate(self.models):
            model = checkpoint.Model(*hosted(path), tokenizer)
            noise = sample.Noise(seed=self.seed, step=number * len(self.models) + index)
            found = sampler.rollouts(model, tasks, num_samples=self.samples, noise=noise, version=index)
            del model
            groups = [group + more for group, more in zip(groups, found, strict=True)]
        return groups

    def _finish(self, out: Path, rows: Sequence[dict]) -> None:
        """Write both files from the ranked answers to every prompt."""
        ranked = [row for row in rows if len(set(row["scores"])) > 1]
        if not ranked:
            raise ValueError(
                f"none of {len(rows)} prompts has answers that differ in rank: ask for more samples, other tasks, or "
                "at a higher temperature"
            )
        best = []
        for row in rows:
            score, response = max(zip(row["scores"], row["responses"], strict=True), key=lambda pair: pair[0])
            if self.passing is None or score >= self.passing:
                best.append({"messages": [*row["prompt"], {"role": "assistant", "content": response}], "score": score})
        _write(out / BEST, best)
        _write(out / RANKINGS, ranked)

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """The programs of the first model's answers; what judges them is planned as little as verifiers are."""
        config = self.compute.configure(checkpoint.open_config(self.models[0]))
        prompts = min(self.limit, len(self.tasks))
        blocks = -(-prompts // self.block)
        answers = min(prompts, self.block) * self.samples
        of = {"group": self.samples, "answers": answers, "times": blocks * len(self.models)}
        return programs.generation(config, self.sampling, self.compute, mesh, **of)

    def result(self) -> None:
        """It makes no model."""
        return None


def _part(out: Path, number: int) -> Path:
    return out / "parts" / f"{number:06d}.jsonl"


def _ranked(
    groups: Sequence[Sequence[Rollout]], scores: np.ndarray, tokenizer: Tokenizer, unfinished: float
) -> list[dict]:
    """The answers to each prompt with their scores, each text once, at its best."""
    values, rows = iter(scores.tolist()), []
    for group in groups:
        found: dict[str, float] = {}
        for r in group:
            score, text = next(values), tokenizer.decode(r.tokens.tolist(), skip_special=True)
            score -= unfinished if r.finish == "length" else 0.0
            if text.strip():
                found[text] = max(score, found.get(text, score))
        if found:
            prompt = [dict(message) for message in group[0].task.messages]
            rows.append({"prompt": prompt, "responses": list(found), "scores": list(found.values())})
    return rows


def _write(path: Path, rows: Sequence[dict]) -> None:
    if not hosts.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    partial.rename(path)
