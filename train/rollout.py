"""Rollouts: sample answers to tasks, have them judged, keep the very tokens that were sampled."""

import dataclasses
import json
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from ..data import chat
from ..data.pack import Example, Group, pack_groups
from ..data.task import Task, Verdict
from ..data.tokenizer import Tokenizer
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

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One answer to a task, token in, token out: text is never tokenised again.

    `logp` is the sampler's log-probability per token of `tokens`; `finish` is "stop" or "length" (cut, not finished);
    `version` counts the updates of the policy that sampled; `kept`, if asked for, says which tokens could be drawn
    (uint8 [N, ceil(V / 8)]), and `experts` which ones of a mixture each token of prompt and answer went to, but for the
    last (unsigned [P + N - 1, L, k]). `verdict` is the verifier's score where something else gave the reward.
    """

    task: Task
    prompt: list[int]
    tokens: np.ndarray
    logp: np.ndarray
    reward: float
    reason: str
    finish: str
    version: int
    kept: np.ndarray | None = None
    experts: np.ndarray | None = None
    verdict: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Samples and judges for one stage: sampling settings, slots, mesh, verifiers, log. A stop ends it midway.

    `return_kept` asks for the tokens that could be drawn, V / 8 bytes for each that was; `return_experts` for the
    experts that a mixture chose, L k bytes a token. With `score`, (model, groups) -> rewards [N] of all answers, these
    take the place of the verdicts (see `rewards`).
    """

    sampling: Sampling
    slots: int
    mesh: jax.sharding.Mesh
    pool: VerifierPool
    log: Log
    return_kept: bool = False
    return_experts: bool = False
    score: Callable[[Model, list[list[Rollout]]], np.ndarray] | None = None

    def rollouts(
        self, model: Model, tasks: Sequence[Task], *, num_samples: int, noise: sample.Noise, version: int = 0
    ) -> list[list[Rollout]]:
        """`num_samples` judged answers to each task."""
        generated = self.generations(model, tasks, num_samples=num_samples, noise=noise)
        flat = [(task, one) for task, (_, group) in zip(tasks, generated, strict=True) for one in group]
        judged = self.judged(flat, lambda one: model.tokenizer.decode(one.tokens.tolist(), skip_special=True))
        verdicts = iter(judged)
        groups = [
            [self._rollout(task, prompt, answer, next(verdicts), version) for answer in group]
            for task, (prompt, group) in zip(tasks, generated, strict=True)
        ]
        if self.score is None:
            return groups
        with self.log.phase("verify"):
            return rewarded(groups, self.score(model, groups))

    def judged(self, answers: Sequence[tuple[Task, T]], text: Callable[[T], str]) -> list[Verdict]:
        """The verdict on each answer to a task, which `text` reads; each host's workers judge their part of them."""
        with self.log.phase("verify"):
            mine = hosts.share(answers)
            found = self.pool.judge([task for task, _ in mine], [text(one) for _, one in mine])
        with self.log.phase("sync"):
            return [Verdict(*fields) for fields in hosts.together(found)]

    def generations(
        self, model: Model, tasks: Sequence[Task], *, num_samples: int, noise: sample.Noise
    ) -> list[tuple[list[int], list[sample.Generation]]]:
        """The prompt of each task and `num_samples` answers to it, not judged."""
        prompts = [
            chat.render(model.tokenizer, task.messages, add_generation_prompt=True, tools=task.metadata.get("tools"))
            for task in tasks
        ]
        with self.log.phase("rollout"):
            answers = sample.generate(
                model.config,
                model.params,
                prompts,
                num_samples=num_samples,
                sampling=with_stops(self.sampling, model),
                noise=noise,
                slots=self.slots,
                mesh=self.mesh,
                return_kept=self.return_kept,
                return_experts=self.return_experts,
                on_finish=lambda _: check_stop(),
            )
        return list(zip(prompts, answers, strict=True))

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
            kept=answer.kept,
            experts=answer.experts,
        )


def retold(rollouts: Sequence[Rollout], speaker: Tokenizer, listener: Tokenizer) -> list[Rollout]:
    """Answers of a model with another tokenizer, as a model with the `listener`'s learns them: through their text.

    They are rendered as the training text of a conversation is, with its end of turn if they came to one. Their
    log-probabilities, which are of other tokens, become 0. With the same tokenizer nothing is changed.
    """
    if speaker.fingerprint == listener.fingerprint:
        return list(rollouts)
    messages, tools = rollouts[0].task.messages, rollouts[0].task.metadata.get("tools")
    prompt = chat.render(listener, messages, add_generation_prompt=True, tools=tools)

    def heard(one: Rollout) -> Rollout:
        text = speaker.decode(one.tokens.tolist(), skip_special=True)
        tokens, mask = chat.render_with_mask(listener, (*messages, {"role": "assistant", "content": text}), tools=tools)
        stop = len(mask) - mask[::-1].index(1) - (one.finish == "length")
        answer = np.asarray(tokens[len(prompt) : max(stop, len(prompt) + 1)])
        return dataclasses.replace(one, prompt=prompt, tokens=answer, logp=np.zeros(len(answer), np.float32))

    return [heard(one) for one in rollouts]


def rewarded(groups: Sequence[Sequence[Rollout]], rewards: np.ndarray) -> list[list[Rollout]]:
    """The rollouts with these rewards [N] in the place of their verdicts'."""
    values = iter(rewards.tolist())
    return [[dataclasses.replace(r, reward=next(values), verdict=r.reward) for r in group] for group in groups]


def with_stops(sampling: Sampling, model: Model) -> Sampling:
    """The settings with the tokenizer's end-of-response tokens as stop ids, where none are given."""
    stops = sampling.stop_ids or tuple(model.tokenizer.eos_ids)
    return Sampling(**{**sampling.__dict__, "stop_ids": stops})


def group(rollouts: Sequence[Rollout], **fields: Sequence[float] | Sequence[np.ndarray] | np.ndarray) -> Group:
    """The answers to one prompt as a group to pack; `fields` hold one value, or one array per token, per answer.

    Recorded experts are a field too. Those that predicted an answer's token are the ones which the token before it went
    to, so that all but the prompt's last token are left for the prompt; its answers share it, and so the first one's.
    """
    prompt, shared = rollouts[0].prompt, len(rollouts[0].prompt) - 1

    def of(rollout: Rollout, index: int) -> Example:
        given: dict[str, Any] = {"behavior_logp": rollout.logp, **{name: x[index] for name, x in fields.items()}}
        if rollout.experts is not None:
            given["experts"] = rollout.experts[shared:]
        return Example(tokens=rollout.tokens, mask=np.ones(len(rollout.tokens), np.float32), fields=given)

    went = rollouts[0].experts
    return Group(
        prompt=prompt,
        answers=[of(rollout, index) for index, rollout in enumerate(rollouts)],
        fields={} if went is None else {"experts": went[:shared]},
    )


def centered(rewards: Float[Array, "P G"], num_tokens: Int[Array, "P G"]) -> Float[Array, "P G"]:
    """Reward minus the group's mean, whatever the answers' lengths."""
    return advantage.group_centered(rewards)


_advantages = jax.jit(lambda compare, rewards, num_tokens: compare(rewards, num_tokens), static_argnums=0)


def micro_batches(
    groups: Sequence[Sequence[Rollout]],
    compute: Compute,
    mesh: jax.sharding.Mesh,
    *,
    compare: Callable[[Array, Array], Array] = centered,
    fields: Mapping[str, Callable[[Rollout], Any]] = types.MappingProxyType({}),
) -> list[dict[str, jax.Array]]:
    """The groups packed, each prompt once, with the sampler's log-probs, the advantages and any recorded experts.

    Args:
        groups: answers to each prompt.
        compute: of the stage.
        mesh: where they go.
        compare: rewards and lengths of groups, [P, G] each, to advantages.
        fields: further values to carry, by name: a number, or an array with one entry per token, of each answer.
    """
    packed_groups = []
    for one in groups:
        # A group at a time: their number changes from step to step, and a program is compiled for each shape.
        rewards = np.array([[r.reward for r in one]], np.float32)
        lengths = np.array([[len(r.tokens) for r in one]], np.int32)
        further = {name: [value(r) for r in one] for name, value in fields.items()}
        packed_groups.append(group(one, advantage=np.asarray(_advantages(compare, rewards, lengths)[0]), **further))
    recorded = ("experts",) if groups and groups[0][0].experts is not None else ()
    names = ("advantage", "behavior_logp", *fields, *recorded)
    packed = pack_groups(packed_groups, length=compute.row_tokens, fields=names)
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
    if verdicts := [r.verdict for r in flat if r.verdict is not None]:
        numbers["verdict"] = float(np.mean(verdicts))
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
