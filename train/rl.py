"""Reinforcement learning with verifiable rewards: groups of answers, judged, compared, learned from.

What is minimised is an `objective.Objective`; the default is OlmoRL's, https://arxiv.org/abs/2512.13961, section 4.4.1.
"""

import functools
import operator
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
from ..model import sample
from ..model.config import ModelConfig
from ..model.processing import Sampling
from ..sharding import mesh as meshes
from . import checkpoint, correction, loop, programs, rollout, score, selection, state
from .compute import Compute
from .judge import Judge
from .losses import advantage
from .metrics import Log
from .objective import Objective
from .optimizer import AdamW, Optimizer, reference_of, with_reference
from .rewards import RewardModels
from .rollout import Rollout, Sampler
from .step import Loss, State, make_train_step
from .surrogate import Tokens
from .updater import Updater
from .validation import Validation


def loss(config: ModelConfig, objective: Objective | None = None, *, temperature: float = 1.0) -> Loss:
    """The objective's loss: `loss(params, batch) -> (sum, divisor, metrics)`.

    The batch's fields are those of `objective.fields`: advantage, behavior_logp (the sampler's); old_logp when several
    updates share a rollout (without it the policy at hand is the old one); reference_logp when there is a KL term; kept
    when the sampling mask is, experts when the routing is. Sampler and trainer are compared in the metrics whether that
    is corrected or not.
    """
    parts = objective or Objective()

    def compute(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        hidden = score.hidden(config, params, batch)
        logp = score.target_logp(config, params, hidden, batch, temperature=temperature)
        tokens = Tokens(
            logp=logp,
            old_logp=parts.old_policy(logp, batch),
            behavior_logp=batch["behavior_logp"],
            advantage=batch["advantage"],
            mask=batch["mask"],
            segments=batch["segments"],
            age=batch.get("age", jnp.zeros_like(batch["tokens"])),
        )
        total, divisor, metrics = parts.loss(tokens, batch.get("reference_logp"))
        given = correction.scored(logp, batch), batch["behavior_logp"], batch["mask"]
        bounds = {"low": parts.correction.low, "high": parts.correction.high}
        return total, divisor, metrics | correction.measured(*given, **bounds)

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

    `updates` splits the rollouts of a step into that many optimizer updates. The reference of a KL term is `start`, or
    with `reference_every` N the policy as it was after the last multiple of N steps (R1-Zero has 400,
    https://arxiv.org/abs/2501.12948, section 2). With `rewards`, answers earn what these say, and the verifiers'
    verdicts are only reported.
    """

    start: str
    tasks: TaskSource
    steps: int
    sampling: Sampling
    prompts: int = 8
    group: int = 8
    updates: int = 1
    objective: Objective = field(default_factory=Objective)
    reference_every: int = 0
    optimizer: Optimizer = field(default_factory=lambda: AdamW(learning_rate=1e-6))
    compute: Compute = field(default_factory=Compute)
    validation: Validation | None = None
    verifiers: int = 1
    seed: int = 0
    rewards: RewardModels | Judge | None = None

    def __post_init__(self) -> None:
        s = self.sampling
        if not s.temperature:
            raise ValueError(f"RL needs answers that are drawn, not {s}: a greedy sample has no policy gradient")
        if (s.top_k or s.top_p < 1 or s.min_p) and not self.objective.keep_sampling_mask:
            raise ValueError(
                f"RL needs answers from the whole distribution, not {s}: the policy gradient of a truncated sample is "
                "biased; leave top_k, top_p and min_p off, or use an objective with keep_sampling_mask"
            )
        if (self.group < 2 and self.objective.baseline is not advantage.raw) or self.prompts % self.updates:
            raise ValueError(
                f"group is {self.group} (at least 2 answers make an advantage) and prompts {self.prompts} must divide "
                f"into {self.updates} updates"
            )
        if self.reference_every and self.objective.kl is None:
            raise ValueError(
                f"reference_every is {self.reference_every} and the objective has no KL term that a reference is for"
            )

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Run to the end, from the newest checkpoint in `out`; the model is then in `out`/model."""
        mesh = mesh or meshes.make_mesh()
        config = self._config()
        tokenizer = checkpoint.open_tokenizer(self.start)
        optimizer = self._optimizer()
        updater = Updater(loss(config, self.objective, temperature=self.sampling.temperature), optimizer, mesh)
        fixed = self.objective.kl is not None and not self.reference_every
        start = checkpoint.open_model(self.start, mesh).params if fixed else None

        earned = self.rewards.open(tokenizer, self.compute, mesh) if self.rewards else None
        with VerifierPool(self.verifiers) as pool, jax.set_mesh(mesh):

            def iterate(now: State, cursor: loop.Cursor, log: Log) -> tuple[State, loop.Cursor, Any]:
                sampler = Sampler(
                    sampling=self.sampling,
                    slots=self.compute.slots,
                    mesh=mesh,
                    pool=pool,
                    log=log,
                    return_kept=self.objective.keep_sampling_mask,
                    return_experts=self.objective.keep_routing,
                    score=earned,
                )
                model = checkpoint.Model(config, self.behavior(now.params, cursor["iteration"]), tokenizer)
                groups, taken, metrics = self._collect(sampler, model, cursor)
                rollout.write(out / "rollouts", cursor["iteration"], groups, tokenizer.decode)
                with log.phase("train"):
                    per_update = self._micro_batches(groups, mesh)
                with log.phase("teacher"):
                    self._score(config, (now, start), per_update)
                with log.phase("train"):
                    now, learned = self._learn(updater, now, per_update)
                    jax.block_until_ready(now)  # the next rollouts need it at once; so the time is charged rightly
                return now, {**cursor, "next_task": taken}, metrics | learned

            loop.run(
                out,
                start=self.start,
                steps=self.steps,
                optimizer=optimizer,
                compute=self.compute,
                mesh=mesh,
                iterate=iterate,
                validate=self.validation and self.validation.start(out, self.start, self.compute, mesh, pool),
            )

    def behavior(self, params: Any, step: int) -> Any:
        """The weights that answer at a step: the policy's own. For experiments with samplers that are off, override."""
        return params

    def _config(self) -> ModelConfig:
        config = self.compute.configure(checkpoint.open_config(self.start))
        if self.objective.keep_routing and not config.num_experts:
            raise ValueError(
                f"the objective has keep_routing and {self.start} is a dense model, which routes nothing: leave it off"
            )
        return config

    def _optimizer(self) -> optax.GradientTransformation:
        optimizer = self.optimizer.build(self.steps * self.updates)
        every = self.reference_every * self.updates
        return with_reference(optimizer, every=every) if every else optimizer

    @functools.cached_property
    def _order(self) -> Shuffled[Task]:
        return Shuffled(self.tasks, seed=self.seed)

    def _collect(
        self, sampler: Sampler, model: checkpoint.Model, cursor: loop.Cursor
    ) -> tuple[list[list[Rollout]], int, dict[str, Any]]:
        """Groups to learn from, the index of the next unused task, and statistics of all that was sampled."""
        taken, step, rounds = cursor.get("next_task", 0), cursor["iteration"], self.objective.selection.rounds

        def ask(count: int, asked: int) -> list[list[Rollout]]:
            nonlocal taken
            chosen = [self._order[taken + i] for i in range(count)]
            taken += count
            noise = sample.Noise(seed=self.seed, step=step * rounds + asked)
            return sampler.rollouts(model, chosen, num_samples=self.group, noise=noise, version=step)

        kept, everything = selection.collect(self.objective.selection, self.prompts, ask)
        varied = sum(map(selection.has_variance, everything))
        metrics = rollout.statistics(everything)
        return kept, taken, metrics | {"no_variance": 1 - varied / len(everything), "groups": len(kept)}

    def _micro_batches(self, groups: Sequence[Sequence[Rollout]], mesh: jax.sharding.Mesh) -> list[list[dict]]:
        """Per update, the micro-batches of its share of the groups."""
        share = max(1, -(-len(groups) // self.updates))
        fields = {"kept": operator.attrgetter("kept")} if self.objective.keep_sampling_mask else {}
        how = {"compare": self.objective.advantages, "fields": fields}
        return [
            rollout.micro_batches(groups[i : i + share], self.compute, mesh, **how)
            for i in range(0, len(groups), share)
        ]

    def _score(self, config: ModelConfig, models: tuple[State, Any], per_update: list[list[dict]]) -> None:
        """Give micro-batches the log-probs that the objective needs: old and reference ones before the first update."""
        (now, reference), temperature = models, self.sampling.temperature
        reference = reference_of(now.opt_state) if self.reference_every else reference
        fields = self.objective.fields(self.updates)
        for age, micros in enumerate(per_update):
            for micro in micros:
                given = dict(micro)  # one program scores for both, unless experts are given
                routed = {name: x for name, x in given.items() if name != "experts"}
                if "old_logp" in fields:
                    micro["old_logp"] = score.token_logp(config, now.params, given, temperature=temperature)
                if "reference_logp" in fields:
                    micro["reference_logp"] = score.token_logp(config, reference, routed, temperature=temperature)
                if "age" in fields:
                    micro["age"] = jnp.full_like(micro["tokens"], age)
        micros = [micro for micros in per_update for micro in micros]
        self.objective.finish(micros)
        jax.block_until_ready(micros)  # so the time is charged rightly

    def _learn(self, updater: Updater, now: State, per_update: list[list[dict]]) -> tuple[State, dict[str, Any]]:
        """One optimizer update per list of micro-batches."""
        metrics: dict[str, Any] = {}
        for micros in per_update:
            now, metrics = updater.step(now, micros)
        return now, metrics

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """The compiled programs of this stage; a group of answers shares its prompt, no group is dropped."""
        config = self._config()
        fields: dict[str, tuple[int, ...]] = dict.fromkeys(self.objective.fields(self.updates), ())
        if self.objective.keep_sampling_mask:
            fields["kept"] = (-(-config.vocab_size // 8),)
        if self.objective.keep_routing:
            fields["experts"] = (config.num_layers, config.experts_per_token)
        updates, answers, temperature = self.steps * self.updates, self.prompts * self.group, self.sampling.temperature
        tokens = rollout.packed_tokens(self.prompts // self.updates, self.group, self.sampling, self.compute)
        batch = programs.abstract_batch(self.compute, mesh, fields, kinds={"experts": config.expert_dtype})
        policy_loss = loss(config, self.objective, temperature=temperature)
        size = {"updates": updates, "tokens": tokens}
        params = state.abstract_params(config, mesh)
        reference = params if self.objective.kl is not None and not self.reference_every else ()
        named = programs.training(policy_loss, config, self._optimizer(), batch, mesh, **size, resident=reference)
        beside = named["gradients"].resident
        given = {name: x for name, x in batch.items() if name not in ("old_logp", "reference_logp", "age")}
        routed = {name: x for name, x in given.items() if name != "experts"}
        scorings = [x for name, x in (("old_logp", given), ("reference_logp", routed)) if name in fields]
        for scored in scorings[:1] if given.keys() == routed.keys() else scorings:
            named["score" if scored is scorings[0] else "score_reference"] = programs.Program(
                function=score.token_logp,
                static=(config,),
                arguments=(params, scored),
                options={"temperature": temperature},
                resident=beside,
                calls=scorings.count(scored) * named["gradients"].calls,
                tokens=named["gradients"].tokens,
            )
        if self.validation:
            named |= self.validation.programs(config, self.compute, mesh, steps=self.steps, resident=beside)
        of = {"group": self.group, "answers": answers, "times": self.steps, "resident": beside}
        return named | programs.generation(config, self.sampling, self.compute, mesh, **of)

    def result(self) -> ModelConfig:
        """The shape of the model that the stage makes."""
        return checkpoint.open_config(self.start)
