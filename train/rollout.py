"""Rollouts: sample answers to tasks, have them judged, keep the very tokens that were sampled."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from ..data import chat
from ..data.pack import Example, Group, pack_groups
from ..data.task import Task, Verdict
from ..data.verify.pool import VerifierPool
from ..model import sample
from ..model.processing import Sampling
from ..sharding import hosts
from . import updater
from .checkpoint import Model
from .compute import Compute
from .losses import advantage
from .metrics import Log
from .stop import check_stop


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One answer to a task, token in, token out: text is never tokenised again.

    `logp` is the sampler's log-probability per token of `tokens`; `finish` is "stop" or "length" (cut, not finished);
    `version` counts the updates of the policy that sampled.
    """

    task: Task
    prompt: list[int]
    tokens: np.ndarray
    logp: np.ndarray
    reward: float
    reason: str
    finish: str
    version: int


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Samples and judges for one stage: sampling settings, slots, mesh, verifiers, log. A stop ends it midway."""

    sampling: Sampling
    slots: int
    mesh: jax.sharding.Mesh
    pool: VerifierPool
    log: Log

    def rollouts(
        self, model: Model, tasks: Sequence[Task], *, num_samples: int, noise: sample.Noise, version: int = 0
    ) -> list[list[Rollout]]:
        """`num_samples` judged answers to each task."""
        prompts = [chat.render(model.tokenizer, task.messages, add_generation_prompt=True) for task in tasks]
        sampling = with_stops(self.sampling, model)
        with self.log.phase("rollout"):
            answers = sample.generate(
                model.config,
                model.params,
                prompts,
                num_samples=num_samples,
                sampling=sampling,
                noise=noise,
                slots=self.slots,
                mesh=self.mesh,
                on_finish=lambda _: check_stop(),
            )
        flat = [(task, answer) for task, group in zip(tasks, answers, strict=True) for answer in group]
        with self.log.phase("verify"):
            mine = hosts.share(flat)  # each host's workers judge their part of the answers
            texts = [model.tokenizer.decode(answer.tokens.tolist(), skip_special=True) for _, answer in mine]
            judged = self.pool.judge([task for task, _ in mine], texts)
        with self.log.phase("sync"):
            verdicts = (Verdict(*fields) for fields in hosts.together(judged))
        return [
            [self._rollout(task, prompt, answer, next(verdicts), version) for answer in group]
            for task, prompt, group in zip(tasks, prompts, answers, strict=True)
        ]

    def _rollout(self, task, prompt, answer, verdict, version) -> Rollout:
        return Rollout(
            task=task,
            prompt=prompt,
            tokens=answer.tokens,
            logp=answer.logp,
            reward=float(verdict.score),
            reason=verdict.reason,
            finish=answer.finish,
            version=version,
        )


def with_stops(sampling: Sampling, model: Model) -> Sampling:
    """The settings with the tokenizer's end-of-response tokens as stop ids, where none are given."""
    stops = sampling.stop_ids or tuple(model.tokenizer.eos_ids)
    return Sampling(**{**sampling.__dict__, "stop_ids": stops})


def group(rollouts: Sequence[Rollout], **fields: Sequence[float] | Sequence[np.ndarray] | np.ndarray) -> Group:
    """The answers to one prompt as a group to pack; `fields` hold one value, or one array per token, per answer."""
    answers = [
        Example(
            tokens=rollout.tokens,
            mask=np.ones(len(rollout.tokens), np.float32),
            fields={"behavior_logp": rollout.logp, **{name: values[index] for name, values in fields.items()}},
        )
        for index, rollout in enumerate(rollouts)
    ]
    return Group(prompt=rollouts[0].prompt, answers=answers)


_centered = jax.jit(advantage.group_centered)


def micro_batches(
    groups: Sequence[Sequence[Rollout]], compute: Compute, mesh: jax.sharding.Mesh
) -> list[dict[str, jax.Array]]:
    """The groups packed, each prompt once, with the sampler's log-probs and the group-centred advantages."""
    # A group at a time: their number changes from step to step, and a program is compiled for each shape.
    advantages = [_centered(np.array([[r.reward for r in one]], np.float32))[0] for one in groups]
    packed = pack_groups(
        [group(one, advantage=np.asarray(values)) for one, values in zip(groups, advantages, strict=True)],
        length=compute.row_tokens,
        fields=("advantage", "behavior_logp"),
    )
    return updater.micro_batches(packed.batch, compute.rows(mesh), mesh)


def packed_tokens(prompts: int, group: int, sampling: Sampling, compute: Compute) -> int:
    """Tokens that the answers to some prompts take when packed, if both are as long as they may be."""
    prompt = max(1, compute.row_tokens - sampling.max_tokens)
    fitting = max(1, (compute.row_tokens - prompt) // sampling.max_tokens)  # answers that share a row with their prompt
    return prompts * -(-group // fitting) * compute.row_tokens


def statistics(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Mean reward and length, share cut at the limit, reward by domain."""
    flat = [rollout for one in groups for rollout in one]
    numbers = {
        "reward": float(np.mean([r.reward for r in flat])),
        "response_tokens": float(np.mean([len(r.tokens) for r in flat])),
        "truncated": float(np.mean([r.finish == "length" for r in flat])),
    }
    for domain in sorted({r.task.domain for r in flat}):
        numbers[f"reward/{domain}"] = float(np.mean([r.reward for r in flat if r.task.domain == domain]))
    return numbers


def write(folder: Path, step: int, groups: Sequence[Sequence[Rollout]], decode: Callable[[list[int]], str]) -> None:
    """Write the rollouts of a step to `folder`/STEP.jsonl, as text that people can read. One host does."""
    if not hosts.is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{step:06d}.jsonl").open("w") as file:
        for one in groups:
            for r in one:
                row = {
                    "id": r.task.id, "domain": r.task.domain, "prompt": r.task.messages[-1]["content"],
                    "response": decode(r.tokens.tolist()), "reward": r.reward, "reason": r.reason,
                    "finish": r.finish, "version": r.version, "tokens": len(r.tokens),
                }  # fmt: skip
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
