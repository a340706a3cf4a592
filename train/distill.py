"""On-policy distillation from one or many teachers: the student answers, the teacher of the domain says how it would.

What is minimised is one of the objectives of `teaching`. MOPD: MiMo-V2-Flash, https://arxiv.org/abs/2601.02780,
section 4. Full vocabulary: DeepSeek-V4, https://arxiv.org/abs/2606.19348, section 5.1. Every answer counts the same
unless told, whatever its length (eq. 7's 1/|y|).
"""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..data.endpoint import Endpoint
from ..data.task import Task, TaskSource
from ..data.verify.pool import VerifierPool
from ..model import sample
from ..model.config import ModelConfig
from ..model.processing import Sampling
from ..model.speaker import Mixed
from ..sharding import mesh as meshes
from . import checkpoint, loop, programs, rollout, state
from .compute import Compute
from .metrics import Log
from .optimizer import AdamW, Optimizer
from .rollout import Rollout, Sampler
from .step import State, Sums, make_train_step
from .teachers import Teachers
from .teaching import FullVocabulary, MiniLLM, Objective, SampledToken, SequenceLevel
from .updater import Updater
from .validation import Validation

Teacher = str | Endpoint
"""A checkpoint, or a server that says how likely given tokens are."""


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
    """Distil `teachers` (a checkpoint or an endpoint per domain) into `start` on tasks of those domains.

    Each step samples `samples` answers to the next `prompts` tasks from the student (in the order of `tasks`, again and
    again), has each scored by the teacher of its task's domain, and updates once. Gradients are added up teacher by
    teacher: one at a time is on the device. `weights` are those of teachers in the loss, by domain, 1 unless given.

    `on_policy` is GKD's lambda: the share of steps whose answers are the student's own; in the others the teachers
    answer (https://arxiv.org/abs/2306.13649, algorithm 1). With `SequenceLevel` it must be 0. With `teacher_share` each
    token of the student's own answers is drawn from that share of the teacher's distribution and the rest of its own
    (MiniLLM has 0.2, https://arxiv.org/abs/2306.08543, section 2.2); policy gradients weigh by student / mixture.
    """

    start: str
    teachers: Mapping[str, Teacher]
    tasks: TaskSource
    steps: int
    sampling: Sampling
    prompts: int = 24
    samples: int = 1
    objective: Objective = field(default_factory=FullVocabulary)
    weights: Mapping[str, float] = field(default_factory=dict)
    on_policy: float = 1.0
    teacher_share: float = 0.0
    optimizer: Optimizer = field(default_factory=lambda: AdamW(learning_rate=1e-5))
    compute: Compute = field(default_factory=Compute)
    validation: Validation | None = None
    verifiers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective.outcome and self.samples < 2:
            raise ValueError(
                f"an outcome weight of {self.objective.outcome} needs at least 2 samples to a prompt, not "
                f"{self.samples}: one answer has nothing to be better than"
            )
        if strangers := sorted(set(self.weights) - set(self.teachers)):
            raise ValueError(f"weights for {strangers}, and teachers are for {sorted(self.teachers)}: name the same")
        self._check_sampler()
        self._check_endpoints()

    def _check_sampler(self) -> None:
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"on_policy is {self.on_policy}: it is a share of steps, from 0 to 1")
        if isinstance(self.objective, SequenceLevel) and self.on_policy:
            raise ValueError(
                f"on_policy is {self.on_policy}: sequence-level distillation learns the teachers' answers; set it to 0"
            )
        if not 0 <= self.teacher_share < 1:
            raise ValueError(f"teacher_share is {self.teacher_share}: it is a part of a mixture, from 0 up to below 1")
        samples_its_own = isinstance(self.objective, SampledToken | MiniLLM) or self.objective.outcome
        if self.on_policy < 1 and samples_its_own:
            raise ValueError(
                f"on_policy is {self.on_policy} and {type(self.objective).__name__} has a policy gradient, which is "
                "one of the student's own answers: set it to 1, or use FullVocabulary or TopK without an outcome"
            )

    def _check_endpoints(self) -> None:
        remote = sorted(domain for domain, teacher in self.teachers.items() if isinstance(teacher, Endpoint))
        if remote and self.teacher_share:
            raise ValueError(
                f"teacher_share is {self.teacher_share} and the teachers of {remote} are endpoints, whose distribution "
                "cannot be mixed with the student's token by token: set it to 0, or give checkpoints"
            )
        if remote and not (isinstance(self.objective, SampledToken) and self.sampling.temperature == 1):
            raise ValueError(
                f"the teachers of {remote} are endpoints, which give log-probabilities of sampled tokens at "
                f"temperature 1 alone: use SampledToken and sample at 1, not {type(self.objective).__name__} at "
                f"{self.sampling.temperature}"
            )

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Run to the end, from the newest checkpoint in `out`; the model is then in `out`/model."""
        mesh = mesh or meshes.make_mesh()
        config = self.compute.configure(checkpoint.open_config(self.start))
        tokenizer = checkpoint.open_tokenizer(self.start)
        optimizer = self.optimizer.build(self.steps)
        updater = Updater(self.objective.loss(config, temperature=self._temperature), optimizer, mesh)
        with VerifierPool(self.verifiers) as pool, jax.set_mesh(mesh):
            any_tokenizer = isinstance(self.objective, SequenceLevel)
            teachers = Teachers(self.teachers, tokenizer, self.compute, mesh, any_tokenizer=any_tokenizer)

            def iterate(now: State, cursor: loop.Cursor, log: Log) -> tuple[State, loop.Cursor, Any]:
                sampler = Sampler(sampling=self.sampling, slots=self.compute.slots, mesh=mesh, pool=pool, log=log)
                step = cursor["iteration"]
                first = step * self.prompts
                chosen = [self.tasks[index % len(self.tasks)] for index in range(first, first + self.prompts)]
                model = checkpoint.Model(config, now.params, tokenizer)
                groups = self._answers(sampler, (model, teachers), chosen, step)
                rollout.write(out / "rollouts", step, groups, tokenizer.decode)
                sums = None
                for domain, own in _by_domain(groups, self.teachers).items():
                    sums = self._add(sums, now, (updater, teachers, log), domain, own)
                with log.phase("train"):
                    now, metrics = updater.finish(now, sums)  # pyright: ignore[reportArgumentType]
                return now, cursor, {**rollout.statistics(groups), **metrics}

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

    @property
    def _temperature(self) -> float:
        return self.sampling.temperature or 1.0

    def _answers(
        self, sampler: Sampler, models: tuple[checkpoint.Model, Teachers], tasks: Sequence[Task], step: int
    ) -> list[list[Rollout]]:
        """The student's answers, mixed with the teacher's if asked for, or on a share of the steps the teachers'."""
        student, teachers = models
        how = {"num_samples": self.samples, "noise": sample.Noise(seed=self.seed, step=step), "version": step}
        is_own = random.Random(f"{self.seed}/{step}").random() < self.on_policy
        if is_own and not self.teacher_share:
            return sampler.rollouts(student, tasks, **how)
        found: dict[str, list[Rollout]] = {}
        for domain in sorted({task.domain for task in tasks}):
            own = [task for task in tasks if task.domain == domain]
            teacher = teachers.model(domain)
            speaker = _mixed(student, teacher, self.teacher_share) if is_own else teacher
            for group in sampler.rollouts(speaker, own, **how):
                found[group[0].task.id] = rollout.retold(group, teacher.tokenizer, student.tokenizer)
        return [found[task.id] for task in tasks]

    def _add(
        self,
        sums: Sums | None,
        now: State,
        tools: tuple[Updater, Teachers, Log],
        domain: str,
        groups: Sequence[Sequence[Rollout]],
    ) -> Sums | None:
        """Gradients of one domain's answers added; on return nothing here holds its teacher on the device."""
        updater, teachers, log = tools
        with log.phase("teacher"):
            micros, constants, teach = self._lesson(teachers, domain, groups, updater.mesh)
        for micro in micros:
            with log.phase("teacher"):
                micro |= jax.block_until_ready(teach(micro))
            if self.weights:
                micro["teacher_weight"] = jnp.full_like(micro["mask"], self.weights.get(domain, 1.0))
            with log.phase("train"):
                sums = jax.block_until_ready(updater.add(sums, now, micro, *constants))
        return sums

    def _lesson(
        self, teachers: Teachers, domain: str, groups: Sequence[Sequence[Rollout]], mesh: jax.sharding.Mesh
    ) -> tuple[list[dict], tuple[Any, ...], Callable[[dict], dict]]:
        """Micro-batches of one domain, the loss's constants, and what adds the teacher's fields to a micro-batch."""
        if isinstance(self.teachers[domain], Endpoint):
            fields = {"teacher_logp": teachers.scores(domain, [one for group in groups for one in group])}
            return rollout.micro_batches(groups, self.compute, mesh, fields=fields), (), lambda _: {}
        config, params = teachers(domain)
        teach = functools.partial(self.objective.teach, config, params, temperature=self._temperature)
        return rollout.micro_batches(groups, self.compute, mesh), self.objective.constants(params), teach

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """The compiled programs of this stage, the first teacher's for all; domains are evenly drawn."""
        config = self.compute.configure(checkpoint.open_config(self.start))
        local = [teacher for teacher in self.teachers.values() if isinstance(teacher, str)]
        teacher = self.compute.configure(checkpoint.open_config(local[0] if local else self.start))
        params = state.abstract_params(teacher, mesh) if local else ()
        fields = {"advantage": (), "behavior_logp": (), **self.objective.fields(teacher)}
        if self.weights:
            fields["teacher_weight"] = ()
        constants = jax.eval_shape(self.objective.constants, params)
        batch = programs.abstract_batch(self.compute, mesh, fields)
        loss, optimizer = self.objective.loss(config, temperature=self._temperature), self.optimizer.build(self.steps)
        tokens = rollout.packed_tokens(self.prompts, self.samples, self.sampling, self.compute)
        size = {"updates": self.steps, "tokens": tokens}
        named = programs.training(loss, config, optimizer, batch, mesh, *constants, **size, resident=params)
        beside = named["gradients"].resident
        if self.objective.fields(teacher) and local:
            named["teacher"] = programs.Program(
                function=jax.jit(lambda p, b: self.objective.teach(teacher, p, b, temperature=self._temperature)),
                arguments=(params, batch),
                calls=named["gradients"].calls,
                tokens=named["gradients"].tokens,
                resident=(state.abstract_params(config, mesh), beside[0]),
            )
        answers, own = self.prompts * self.samples, round(self.on_policy * self.steps)
        of = {"group": self.samples, "answers": answers, "resident": beside}
        if own:
            speaker = _speaker(config, teacher, self.teacher_share) if self.teacher_share else config
            named |= programs.generation(speaker, self.sampling, self.compute, mesh, **of, times=own)
        if own < self.steps:
            told = programs.generation(teacher, self.sampling, self.compute, mesh, **of, times=self.steps - own)
            named |= {f"teacher {name}": program for name, program in told.items()}
        if self.validation:
            named |= self.validation.programs(config, self.compute, mesh, steps=self.steps, resident=beside)
        return named

    def result(self) -> ModelConfig:
        """The shape of the model that the stage makes."""
        return checkpoint.open_config(self.start)


def _speaker(student: ModelConfig, teacher: ModelConfig, share: float) -> Mixed:
    return Mixed(student=student, teacher=teacher, teacher_share=share)


def _mixed(student: checkpoint.Model, teacher: checkpoint.Model, share: float) -> checkpoint.Model:
    """A student whose tokens are partly its teacher's."""
    config = _speaker(student.config, teacher.config, share)
    return student._replace(config=config, params=(student.params, teacher.params))


def _by_domain(
    groups: Sequence[Sequence[Rollout]], teachers: Mapping[str, Teacher]
) -> dict[str, list[Sequence[Rollout]]]:
    """Groups by the domain of their task, sorted so that each teacher is put on the device once."""
    routed: dict[str, list[Sequence[Rollout]]] = {}
    for one in groups:
        domain = one[0].task.domain
        if domain not in teachers:
            raise ValueError(
                f"task {one[0].task.id} is of domain {domain!r} and teachers are for {sorted(teachers)}: add one"
            )
        routed.setdefault(domain, []).append(one)
    return dict(sorted(routed.items(), key=lambda item: (str(teachers[item[0]]), item[0])))
