"""On-policy distillation from one or many teachers: the student answers, the teacher of the domain says how it would.

MOPD: MiMo-V2-Flash, https://arxiv.org/abs/2601.02780, section 4. Full vocabulary: DeepSeek-V4,
https://arxiv.org/abs/2606.19348, section 5.1. Every answer counts the same, whatever its length (eq. 7's 1/|y|).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import optax

from ..data.task import TaskSource
from ..data.verify.pool import VerifierPool
from ..model import sample, transformer
from ..model.config import ModelConfig
from ..model.processing import Sampling
from ..sharding import mesh as meshes
from . import checkpoint, loop, programs, rollout, score, state
from .compute import Compute
from .losses import distill, masked, policy
from .metrics import Log
from .optimizer import AdamW
from .rollout import Rollout, Sampler
from .step import Loss, State, Sums, make_train_step
from .teachers import Teachers
from .updater import Updater


@runtime_checkable
class Objective(Protocol):
    """What the student minimises, and what it needs of the teacher."""

    def loss(self, config: ModelConfig, *, temperature: float = 1.0) -> Loss:
        """`loss(params, batch, *constants) -> (sum, weight, metrics)`."""
        ...

    def teach(self, config: ModelConfig, params: Any, batch: Any, *, temperature: float = 1.0) -> dict[str, jax.Array]:
        """The teacher's per-token fields for a batch."""
        ...

    def fields(self, teacher: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Names of those fields, with what follows [B, T] of their shape."""
        ...

    def constants(self, params: Any) -> tuple[Any, ...]:
        """What else the loss takes after the batch, from the teacher's parameters."""
        ...


@dataclass(frozen=True, kw_only=True)
class SampledToken:
    """MOPD on the sampled tokens: advantage log(teacher / student), weight pi / mu where in [low, high], else 0.

    MiMo-V2-Flash eq. 7-9. `limit` bounds the teacher's advantage; `outcome` is alpha, the weight of the outcome
    advantage (reward minus the group's mean; it needs more than one answer to a prompt). Teacher and student are both
    taken at the sampling temperature.
    """

    low: float = 0.5
    high: float = 2.0
    limit: float = 20.0
    outcome: float = 0.0

    def loss(self, config: ModelConfig, *, temperature: float = 1.0) -> Loss:
        """See `Objective`."""

        def compute(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
            hidden, weights = _student(config, params, batch)
            logp = transformer.token_logp(config, params, hidden, batch["targets"], temperature=temperature)
            gap = distill.sampled_token_advantage(batch["teacher_logp"], logp)
            total = distill.clip_advantage(gap, limit=self.limit) + self.outcome * batch["advantage"]
            per_token = distill.mopd(logp, batch["behavior_logp"], total, low=self.low, high=self.high)
            return masked.sum(per_token, weights), masked.weight(weights), {"kl": masked.sum(-gap, weights)}

        return compute

    def teach(self, config: ModelConfig, params: Any, batch: Any, *, temperature: float = 1.0) -> dict[str, jax.Array]:
        """The teacher's log-probabilities of the sampled tokens."""
        return {"teacher_logp": score.token_logp(config, params, batch, temperature=temperature)}

    def fields(self, teacher: ModelConfig) -> dict[str, tuple[int, ...]]:
        """See `Objective`."""
        return {"teacher_logp": ()}

    def constants(self, params: Any) -> tuple[Any, ...]:
        """See `Objective`."""
        return ()


@dataclass(frozen=True, kw_only=True)
class FullVocabulary:
    """KL(student || teacher) over the whole vocabulary at every sampled position, in vocabulary chunks.

    Both are taken at the sampling temperature.

    The teacher's last hidden states stand for its logits, which its head makes at training time. `outcome` as in
    `SampledToken`: it adds a policy gradient of the outcome advantage.
    """

    chunk: int = 8192
    outcome: float = 0.0

    def loss(self, config: ModelConfig, *, temperature: float = 1.0) -> Loss:
        """See `Objective`; the constant is the teacher's head, [E, V]."""

        def compute(params: Any, batch: Any, teacher_head: Any) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
            hidden, weights = _student(config, params, batch)
            head = transformer.head(config, params)
            split = {"chunk": self.chunk, "vocab_shards": meshes.current_parts("vocab", head.shape[1])}
            teacher_hidden = batch["teacher_hidden"] / temperature
            gap = distill.chunked_reverse_kl(hidden / temperature, head, teacher_hidden, teacher_head, **split)
            per_token = gap
            if self.outcome:
                logp = transformer.token_logp(config, params, hidden, batch["targets"], temperature=temperature)
                per_token = gap + self.outcome * policy.policy_gradient(logp, batch["advantage"])
            return masked.sum(per_token, weights), masked.weight(weights), {"kl": masked.sum(gap, weights)}

        return compute

    def teach(self, config: ModelConfig, params: Any, batch: Any, *, temperature: float = 1.0) -> dict[str, jax.Array]:
        """The teacher's last hidden states, from which its logits are made where they are needed."""
        return {"teacher_hidden": score.last_hidden(config, params, batch)}

    def fields(self, teacher: ModelConfig) -> dict[str, tuple[int, ...]]:
        """See `Objective`."""
        return {"teacher_hidden": (teacher.embed_dim,)}

    def constants(self, params: Any) -> tuple[Any, ...]:
        """The teacher's head, [E, V]."""
        return (params["head"] if "head" in params else params["embedding"].T,)


def _student(config: ModelConfig, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    hidden, _ = transformer.apply(
        config, params, batch["tokens"], positions=batch["positions"], segments=batch["segments"]
    )
    return hidden, masked.per_sequence(batch["mask"], batch["segments"])


def train_step(
    config: ModelConfig, optimizer: optax.GradientTransformation, objective: Objective, *, accumulate: int = 1
) -> Callable:
    """`step(state, batch, *constants) -> (state, metrics)`, pure.

    For `SampledToken` the batch also holds teacher_logp, behavior_logp and advantage, and there are no constants; for
    `FullVocabulary` it holds teacher_hidden (and advantage), and the constant is the teacher's head [E, V].
    """
    return make_train_step(objective.loss(config), optimizer, accumulate=accumulate)


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Distil `teachers` (a checkpoint per domain) into `start` on tasks of those domains.

    Each step samples `samples` answers to the next `prompts` tasks from the student (in the order of `tasks`, again and
    again), has each scored by the teacher of its task's domain, and updates once. Gradients are added up teacher by
    teacher: one at a time is on the device.
    """

    start: str
    teachers: Mapping[str, str]
    tasks: TaskSource
    steps: int
    sampling: Sampling
    prompts: int = 24
    samples: int = 1
    objective: SampledToken | FullVocabulary = field(default_factory=FullVocabulary)
    optimizer: AdamW = field(default_factory=lambda: AdamW(learning_rate=1e-5))
    compute: Compute = field(default_factory=Compute)
    verifiers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective.outcome and self.samples < 2:
            raise ValueError(
                f"an outcome weight of {self.objective.outcome} needs at least 2 samples to a prompt, not "
                f"{self.samples}: one answer has nothing to be better than"
            )

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Run to the end, from the newest checkpoint in `out`; the model is then in `out`/model."""
        mesh = mesh or meshes.make_mesh()
        config = self.compute.configure(checkpoint.open_config(self.start))
        tokenizer = checkpoint.open_tokenizer(self.start)
        optimizer = self.optimizer.build(self.steps)
        temperature = self.sampling.temperature or 1.0
        updater = Updater(self.objective.loss(config, temperature=temperature), optimizer, mesh)
        with VerifierPool(self.verifiers) as pool, jax.set_mesh(mesh):
            teachers = Teachers(self.teachers, tokenizer, self.compute, mesh)

            def iterate(now: State, cursor: loop.Cursor, log: Log) -> tuple[State, loop.Cursor, Any]:
                sampler = Sampler(sampling=self.sampling, slots=self.compute.slots, mesh=mesh, pool=pool, log=log)
                step = cursor["iteration"]
                first = step * self.prompts
                chosen = [self.tasks[index % len(self.tasks)] for index in range(first, first + self.prompts)]
                model = checkpoint.Model(config, now.params, tokenizer)
                noise = sample.Noise(seed=self.seed, step=step)
                groups = sampler.rollouts(model, chosen, num_samples=self.samples, noise=noise, version=step)
                rollout.write(out / "rollouts", step, groups, tokenizer.decode)
                sums = None
                for domain, own in _by_domain(groups, self.teachers).items():
                    micros = rollout.micro_batches(own, self.compute, mesh)
                    sums = self._add(sums, now, (updater, teachers, log), domain, micros)
                with log.phase("train"):
                    now, metrics = updater.finish(now, sums)  # pyright: ignore[reportArgumentType]
                return now, cursor, {**rollout.statistics(groups), **metrics}

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

    def _add(
        self, sums: Sums | None, now: State, tools: tuple[Updater, Teachers, Log], domain: str, micros: list[dict]
    ) -> Sums | None:
        """Gradients of one domain's answers added; on return nothing here holds its teacher on the device."""
        updater, teachers, log = tools
        with log.phase("teacher"):
            config, params = teachers(domain)
            constants = self.objective.constants(params)
        for micro in micros:
            with log.phase("teacher"):
                fields = self.objective.teach(config, params, micro, temperature=self.sampling.temperature or 1.0)
                jax.block_until_ready(fields)
            with log.phase("train"):
                sums = jax.block_until_ready(updater.add(sums, now, {**micro, **fields}, *constants))
        return sums

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """The compiled programs of this stage, the first teacher's for all; domains are evenly drawn."""
        config = self.compute.configure(checkpoint.open_config(self.start))
        teacher = self.compute.configure(checkpoint.open_config(next(iter(self.teachers.values()))))
        temperature = self.sampling.temperature or 1.0
        params = state.abstract_params(teacher, mesh)
        fields = {"advantage": (), "behavior_logp": (), **self.objective.fields(teacher)}
        constants = jax.eval_shape(self.objective.constants, params)
        batch = programs.abstract_batch(self.compute, mesh, fields)
        loss, optimizer = self.objective.loss(config, temperature=temperature), self.optimizer.build(self.steps)
        tokens = rollout.packed_tokens(self.prompts, self.samples, self.sampling, self.compute)
        size = {"updates": self.steps, "tokens": tokens}
        named = programs.training(loss, config, optimizer, batch, mesh, *constants, **size, resident=params)
        beside = named["gradients"].resident
        named["teacher"] = programs.Program(
            function=jax.jit(lambda p, b: self.objective.teach(teacher, p, b, temperature=temperature)),
            arguments=(params, batch),
            calls=named["gradients"].calls,
            tokens=named["gradients"].tokens,
            resident=(state.abstract_params(config, mesh), beside[0]),
        )
        of = {"group": self.samples, "answers": self.prompts * self.samples, "times": self.steps, "resident": beside}
        return named | programs.generation(config, self.sampling, self.compute, mesh, **of)

    def result(self) -> ModelConfig:
        """The shape of the model that the stage makes."""
        return checkpoint.open_config(self.start)


def _by_domain(groups: Sequence[Sequence[Rollout]], teachers: Mapping[str, str]) -> dict[str, list[Sequence[Rollout]]]:
    """Groups by the domain of their task, sorted so that each teacher is put on the device once."""
    routed: dict[str, list[Sequence[Rollout]]] = {}
    for one in groups:
        domain = one[0].task.domain
        if domain not in teachers:
            raise ValueError(
                f"task {one[0].task.id} is of domain {domain!r} and teachers are for {sorted(teachers)}: add one"
            )
        routed.setdefault(domain, []).append(one)
    return dict(sorted(routed.items(), key=lambda item: (teachers[item[0]], item[0])))
