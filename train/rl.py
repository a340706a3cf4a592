"""Reinforcement learning with verifiable rewards: groups of answers, advantages without std, clip-higher, TIS.

The defaults are those of OlmoRL (https://arxiv.org/abs/2512.13961, section 4.4.1): advantage = reward - group mean,
clip [0.8, 1.272], loss averaged over the tokens of the whole batch, sampler/trainer ratio truncated at 2, groups whose
answers all earned the same dropped and replaced, no KL term.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..data.shuffle import Shuffled
from ..data.task import Task, TaskSource
from ..data.verify.pool import VerifierPool
from ..model import sample, transformer
from ..model.config import ModelConfig
from ..model.processing import Sampling
from ..sharding import mesh as meshes
from . import checkpoint, loop, programs, rollout, score, state
from .compute import Compute
from .losses import kl, masked, mismatch, policy
from .metrics import Log
from .optimizer import AdamW
from .rollout import Rollout, Sampler
from .step import Loss, State, make_train_step
from .updater import Updater


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Constants of the policy-gradient loss. `kl_weight` above 0 adds a KL penalty towards the starting model."""

    clip_low: float = 0.2
    clip_high: float = 0.272
    cap: float = 2.0
    kl_weight: float = 0.0


def loss(config: ModelConfig, objective: Objective | None = None, *, temperature: float = 1.0) -> Loss:
    """Clipped policy gradient, each token times min(pi_old / mu, cap): `loss(params, batch) -> (sum, weight, metrics)`.

    The batch's fields: advantage, behavior_logp (the sampler's); old_logp when several updates share a rollout (without
    it the policy at hand is the old one); reference_logp when there is a KL term.
    """
    o = objective or Objective()

    def compute(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        mask = batch["mask"]
        hidden, _ = transformer.apply(
            config, params, batch["tokens"], positions=batch["positions"], segments=batch["segments"]
        )
        logp = transformer.token_logp(config, params, hidden, batch["targets"], temperature=temperature)
        old_logp = batch.get("old_logp", jax.lax.stop_gradient(logp))
        clip = {"clip_low": o.clip_low, "clip_high": o.clip_high}
        per_token = policy.clipped_policy_gradient(logp, old_logp, batch["advantage"], **clip)
        per_token *= mismatch.truncated_importance_weight(old_logp, batch["behavior_logp"], cap=o.cap)
        metrics = {"clipped": masked.sum(policy.is_clipped(logp, old_logp, batch["advantage"], **clip), mask)}
        if o.kl_weight:
            per_token += o.kl_weight * kl.importance_weighted_k3(logp, old_logp, batch["reference_logp"])
            metrics["kl"] = masked.sum(kl.k3(logp, batch["reference_logp"]), mask)
        gap = jnp.abs(mismatch.log_ratio(old_logp, batch["behavior_logp"]))
        metrics |= {"mismatch": masked.sum(gap, mask), "entropy_estimate": masked.sum(-logp, mask)}
        return masked.sum(per_token, mask), masked.weight(mask), metrics

    return compute


def train_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    objective: Objective | None = None,
    *,
    accumulate: int = 1,
) -> Callable:
    """`step(state, batch) -> (state, metrics)`, pure; the batch also holds advantage and behavior_logp."""
    return make_train_step(loss(config, objective), optimizer, accumulate=accumulate)


@dataclass(frozen=True, kw_only=True)
class RL:
    """Train `start` on tasks: each step, `prompts` tasks with `group` answers each and one verdict an answer.

    Groups without variance teach nothing: they are dropped and replaced, up to `rounds` times of asking. `updates`
    splits the rollouts of a step into that many optimizer updates.
    """

    start: str
    tasks: TaskSource
    steps: int
    sampling: Sampling
    prompts: int = 8
    group: int = 8
    rounds: int = 3
    updates: int = 1
    objective: Objective = field(default_factory=Objective)
    optimizer: AdamW = field(default_factory=lambda: AdamW(learning_rate=1e-6))
    compute: Compute = field(default_factory=Compute)
    verifiers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        s = self.sampling
        if s.top_k or s.top_p < 1 or s.min_p or not s.temperature:
            raise ValueError(
                f"RL needs answers from the whole distribution, not {s}: the policy gradient of a truncated "
                "or greedy sample is biased; leave top_k, top_p and min_p off and the temperature above 0"
            )
        if self.group < 2 or self.prompts % self.updates:
            raise ValueError(
                f"group is {self.group} (at least 2 answers make an advantage) and prompts {self.prompts} must divide "
                f"into {self.updates} updates"
            )

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Run to the end, from the newest checkpoint in `out`; the model is then in `out`/model."""
        mesh = mesh or meshes.make_mesh()
        config = self.compute.configure(checkpoint.open_config(self.start))
        tokenizer = checkpoint.open_tokenizer(self.start)
        optimizer = self.optimizer.build(self.steps * self.updates)
        updater = Updater(loss(config, self.objective, temperature=self.sampling.temperature), optimizer, mesh)
        reference = checkpoint.open_model(self.start, mesh).params if self.objective.kl_weight else None

        with VerifierPool(self.verifiers) as pool, jax.set_mesh(mesh):

            def iterate(now: State, cursor: loop.Cursor, log: Log) -> tuple[State, loop.Cursor, Any]:
                sampler = Sampler(sampling=self.sampling, slots=self.compute.slots, mesh=mesh, pool=pool, log=log)
                model = checkpoint.Model(config, now.params, tokenizer)
                groups, taken, metrics = self._collect(sampler, model, cursor)
                rollout.write(out / "rollouts", cursor["iteration"], groups, tokenizer.decode)
                with log.phase("train"):
                    now, learned = self._learn(config, updater, (now, reference), self._micro_batches(groups, mesh))
                    jax.block_until_ready(now)  # the next rollouts need it at once; so the time is charged rightly
                return now, {**cursor, "next_task": taken}, metrics | learned

            loop.run(
                out,
                start=self.start,
                steps=self.steps,
                optimizer=optimizer,
                save_every=self.compute.save_every,
                keep=self.compute.keep,
                keep_every=self.compute.keep_every,
                mesh=mesh,
                iterate=iterate,
            )

    @functools.cached_property
    def _order(self) -> Shuffled[Task]:
        return Shuffled(self.tasks, seed=self.seed)

    def _collect(
        self, sampler: Sampler, model: checkpoint.Model, cursor: loop.Cursor
    ) -> tuple[list[list[Rollout]], int, dict[str, Any]]:
        """Groups with variance, the index of the next unused task, and statistics of all that was sampled."""
        taken, step = cursor.get("next_task", 0), cursor["iteration"]
        kept: list[list[Rollout]] = []
        everything: list[list[Rollout]] = []
        for asked in range(self.rounds):
            chosen = [self._order[taken + i] for i in range(self.prompts - len(kept))]
            taken += len(chosen)
            noise = sample.Noise(seed=self.seed, step=step * self.rounds + asked)
            groups = sampler.rollouts(model, chosen, num_samples=self.group, noise=noise, version=step)
            everything += groups
            kept += [one for one in groups if len({r.reward for r in one}) > 1]
            if len(kept) == self.prompts:
                break
        metrics = rollout.statistics(everything)
        metrics |= {"no_variance": 1 - len(kept) / len(everything), "groups": len(kept)}
        return kept, taken, metrics

    def _micro_batches(self, groups: Sequence[Sequence[Rollout]], mesh: jax.sharding.Mesh) -> list[list[dict]]:
        """Per update, the micro-batches of its share of the groups."""
        share = max(1, -(-len(groups) // self.updates))
        return [rollout.micro_batches(groups[i : i + share], self.compute, mesh) for i in range(0, len(groups), share)]

    def _learn(
        self, config: ModelConfig, updater: Updater, models: tuple[State, Any], per_update: list[list[dict]]
    ) -> tuple[State, dict[str, Any]]:
        """One optimizer update per list of micro-batches; old and reference log-probs are those before the first."""
        (now, reference), temperature = models, self.sampling.temperature
        for micro in (micro for micros in per_update for micro in micros):
            if self.updates > 1:
                micro["old_logp"] = score.token_logp(config, now.params, micro, temperature=temperature)
            if reference is not None:
                micro["reference_logp"] = score.token_logp(config, reference, micro, temperature=temperature)
        metrics: dict[str, Any] = {}
        for micros in per_update:
            now, metrics = updater.step(now, micros)
        return now, metrics

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """The compiled programs of this stage; a group of answers shares its prompt, no group is dropped."""
        config = self.compute.configure(checkpoint.open_config(self.start))
        fields = {"advantage": (), "behavior_logp": ()}
        if self.updates > 1:
            fields["old_logp"] = ()
        if self.objective.kl_weight:
            fields["reference_logp"] = ()
        updates, answers, temperature = self.steps * self.updates, self.prompts * self.group, self.sampling.temperature
        tokens = rollout.packed_tokens(self.prompts // self.updates, self.group, self.sampling, self.compute)
        batch = programs.abstract_batch(self.compute, mesh, fields)
        policy_loss = loss(config, self.objective, temperature=temperature)
        optimizer = self.optimizer.build(updates)
        size = {"updates": updates, "tokens": tokens}
        params = state.abstract_params(config, mesh)
        reference = params if self.objective.kl_weight else ()
        named = programs.training(policy_loss, config, optimizer, batch, mesh, **size, resident=reference)
        beside = named["gradients"].resident
        scorings = (self.updates > 1) + bool(self.objective.kl_weight)
        if scorings:
            named["score"] = programs.Program(
                function=score.token_logp,
                static=(config,),
                arguments=(params, batch),
                options={"temperature": temperature},
                resident=beside,
                calls=scorings * named["gradients"].calls,
                tokens=named["gradients"].tokens,
            )
        of = {"group": self.group, "answers": answers, "times": self.steps, "resident": beside}
        return named | programs.generation(config, self.sampling, self.compute, mesh, **of)

    def result(self) -> ModelConfig:
        """The shape of the model that the stage makes."""
        return checkpoint.open_config(self.start)
