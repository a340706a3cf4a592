"""PPO from a reward model or verifiers: a critic that begins as the reward model, KL in the reward, GAE, ptx mixing.

InstructGPT, https://arxiv.org/abs/2203.02155, section 3.5 and appendix C.4, whose settings are the defaults. Policy and
critic with their optimizers' states stay on the device; the reference and the reward models lie in host memory, and
each comes to the device only to score a step's answers.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..data.batch import FIELDS
from ..data.conversations import Demonstrations, Files
from ..data.pack import pack_groups
from ..data.shuffle import Shuffled
from ..data.task import Task, TaskSource
from ..data.verify.pool import VerifierPool
from ..model import sample
from ..model.config import ModelConfig
from ..model.processing import Sampling
from ..sharding import mesh as meshes
from . import checkpoint, loop, programs, reward, rewards, rollout, score, sft, state, updater
from .compute import Compute
from .hosted import Hosted
from .judge import Judge
from .metrics import Log
from .optimizer import AdamW, Optimizer
from .ppo_objective import CRITIC_FIELDS, POLICY_FIELDS, Objective, critic_loss, estimate, policy_loss
from .rewards import RewardModels
from .rollout import Rollout, Sampler
from .step import Loss, State, make_train_step
from .updater import Updater
from .validation import Validation


@dataclass(frozen=True, kw_only=True)
class Ptx:
    """Pretraining mixed in: the NLL of `batch_size` conversations an update, `coefficient` times its mean per token."""

    data: Files | Demonstrations
    coefficient: float = 27.8
    batch_size: int = 32


class Models(NamedTuple):
    """What PPO trains."""

    policy: State
    critic: State


def train_step(
    config: ModelConfig, optimizer: optax.GradientTransformation, objective: Objective | None = None
) -> Callable:
    """The policy's `step(state, batch) -> (state, metrics)`, pure; see `policy_loss`. `critic_step` is the other."""
    return make_train_step(policy_loss(config, objective), optimizer)


def critic_step(
    config: ModelConfig, optimizer: optax.GradientTransformation, objective: Objective | None = None
) -> Callable:
    """The critic's `step(state, batch) -> (state, metrics)`, pure; see `critic_loss`."""
    return make_train_step(critic_loss(config, objective), optimizer)


_estimated = jax.jit(estimate, static_argnums=1)


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Train `start` by PPO: each step, `group` answers to each of `prompts` tasks, then `epochs` over `minibatches`.

    What answers earn are the verdicts of the tasks' verifiers, or `rewards`; verdicts are then only reported. The
    critic starts from `critic`, a reward model or a language model with a new scalar head (unless given, the first of
    the reward models, or else `start`). A minibatch is one update of policy and critic. The reference of the KL term is
    `start`. The trained critic is in OUT/critic, for a run that goes on from this one.
    """

    start: str
    tasks: TaskSource
    steps: int
    sampling: Sampling
    rewards: RewardModels | Judge | None = None
    critic: str | None = None
    prompts: int = 64
    group: int = 1
    epochs: int = 1
    minibatches: int = 8
    objective: Objective = field(default_factory=Objective)
    ptx: Ptx | None = None
    optimizer: Optimizer = field(default_factory=lambda: AdamW(learning_rate=1e-6, warmup_steps=10))
    critic_optimizer: Optimizer = field(default_factory=lambda: AdamW(learning_rate=9e-6, warmup_steps=10))
    compute: Compute = field(default_factory=Compute)
    validation: Validation | None = None
    verifiers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        s = self.sampling
        if s.top_k or s.top_p < 1 or s.min_p or not s.temperature:
            raise ValueError(
                f"PPO needs answers from the whole distribution, not {s}: the policy gradient of a truncated or greedy "
                "sample is biased; leave top_k, top_p and min_p off and the temperature above 0"
            )
        if self.minibatches < 1 or self.epochs < 1 or self.prompts % self.minibatches:
            raise ValueError(
                f"{self.prompts} prompts must divide into {self.minibatches} minibatches, for {self.epochs} epochs: "
                "give at least 1 of each, and prompts a multiple of minibatches"
            )

    @property
    def critic_start(self) -> str:
        """What the critic starts from."""
        return self.critic or (self.rewards.models[0] if isinstance(self.rewards, RewardModels) else self.start)

    @property
    def policy_fields(self) -> tuple[str, ...]:
        """What the policy's batch holds beside the usual."""
        return (*POLICY_FIELDS, "ptx") if self.ptx else POLICY_FIELDS

    @property
    def _updates(self) -> int:
        return self.steps * self.epochs * self.minibatches

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Run to the end, from the newest checkpoint in `out`; the model is then in `out`/model."""
        mesh = mesh or meshes.make_mesh()
        with VerifierPool(self.verifiers) as pool, jax.set_mesh(mesh):
            run = _Run(self, mesh, pool, out)
            validate = self.validation and self.validation.start(
                out, self.start, self.compute, mesh, pool, params=operator.attrgetter("policy.params")
            )
            of = {"compute": self.compute, "iterate": run.iterate, "validate": validate}
            loop.train(out, run.trained(), steps=self.steps, **of)

    def configs(self) -> tuple[ModelConfig, ModelConfig]:
        """Of policy and critic, as they compute."""
        policy, critic = (checkpoint.open_config(path) for path in (self.start, self.critic_start))
        return self.compute.configure(policy), self.compute.configure(critic.replace(output="score"))

    def losses(self) -> tuple[Loss, Loss]:
        """Of policy and critic."""
        policy, critic = self.configs()
        temperature = self.sampling.temperature
        ptx = self.ptx.coefficient if self.ptx else 0.0
        return (
            policy_loss(policy, self.objective, temperature=temperature, ptx=ptx),
            critic_loss(critic, self.objective),
        )

    def optimizers(self) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
        """Of policy and critic."""
        return self.optimizer.build(self._updates), self.critic_optimizer.build(self._updates)

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """The compiled programs of this stage; policy and critic stay, reference and reward models come to score."""
        configs, losses, optimizers = self.configs(), self.losses(), self.optimizers()
        tokens = rollout.packed_tokens(self.prompts // self.minibatches, self.group, self.sampling, self.compute)
        scalars = [jax.ShapeDtypeStruct((), jnp.float32)] * 2 if self.ptx else []
        named: programs.Programs = {}
        states = [state.abstract(*pair, mesh) for pair in zip(configs, optimizers, strict=True)]
        for index, (name, fields) in enumerate((("policy", self.policy_fields), ("critic", CRITIC_FIELDS))):
            batch = programs.abstract_batch(self.compute, mesh, dict.fromkeys(fields, ()))
            constants = () if index else scalars
            settings = {"updates": self._updates, "tokens": tokens, "resident": states[1 - index]}
            of = losses[index], configs[index], optimizers[index], batch, mesh
            found = programs.training(*of, *constants, **settings)
            named |= {f"{name} {kind}": one for kind, one in found.items()}
        plain = programs.abstract_batch(self.compute, mesh)
        micros = self.steps * self.minibatches * -(-tokens // plain["tokens"].size)
        judges = len(self.rewards.models) if isinstance(self.rewards, RewardModels) else 0
        scorings = {
            "score": (score.token_logp, {"temperature": self.sampling.temperature}, 1 + bool(self.objective.kl_weight)),
            "value": (score.values, {}, 1 + judges),
        }
        for index, (name, (function, options, times)) in enumerate(scorings.items()):
            named[name] = programs.Program(
                function=function,
                static=(configs[index],),
                arguments=(state.abstract_params(configs[index], mesh), plain),
                options=options,
                calls=times * micros,
                tokens=plain["tokens"].size,
                resident=states,
            )
        answers = self.prompts * self.group
        beside = states[0].opt_state, states[1]
        of = {"group": self.group, "answers": answers, "times": self.steps, "resident": beside}
        if self.validation:
            how = {"steps": self.steps, "resident": beside}
            named |= self.validation.programs(configs[0], self.compute, mesh, **how)
        return named | programs.generation(configs[0], self.sampling, self.compute, mesh, **of)

    def earned(self, answer: Rollout) -> float:
        """What an answer's last token is rewarded with."""
        penalty = self.objective.unfinished
        return answer.reward if penalty is None or answer.finish != "length" else penalty

    def result(self) -> ModelConfig:
        """The shape of the model that the stage makes."""
        return checkpoint.open_config(self.start)


class _Minibatch(NamedTuple):
    """Micro-batches of one update, each with all fields, and how many tokens count in them."""

    micros: list[dict[str, jax.Array]]
    weight: float


class _Run:
    """A stage at work: what it keeps between steps, and the phases of one."""

    def __init__(self, stage: PPO, mesh: jax.sharding.Mesh, pool: VerifierPool, out: Path) -> None:
        self.stage, self.mesh, self.pool, self.out = stage, mesh, pool, out
        self.configs, self.optimizers = stage.configs(), stage.optimizers()
        self.tokenizer = checkpoint.open_tokenizer(stage.start)
        rewards.check_tokenizer(stage.critic_start, self.tokenizer)
        self.policy, self.critic = (
            Updater(loss, optimizer, mesh) for loss, optimizer in zip(stage.losses(), self.optimizers, strict=True)
        )
        self.order: Shuffled[Task] = Shuffled(stage.tasks, seed=stage.seed)
        self.pretraining = Shuffled(stage.ptx.data.open(), seed=stage.seed) if stage.ptx else None
        self.reference = Hosted({"reference": stage.start}, stage.compute, mesh) if stage.objective.kl_weight else None
        self.score = stage.rewards.open(self.tokenizer, stage.compute, mesh) if stage.rewards else None

    def trained(self) -> loop.Trained:
        """Policy and critic, as the loop wants them."""
        stage, mesh = self.stage, self.mesh

        def create() -> Models:
            policy = checkpoint.open_model(stage.start, mesh)
            critic = reward.open_scoring(stage.critic_start, mesh, seed=stage.seed)
            both = zip((policy, critic), self.optimizers, strict=True)
            return Models(*(state.create(model.params, optimizer, mesh) for model, optimizer in both))

        def store(out: Path, models: Models) -> None:
            critic = checkpoint.open_config(stage.critic_start).replace(output="score")
            of = checkpoint.Model(critic, models.critic.params, self.tokenizer)
            checkpoint.save_model(out / "critic" / "model", of)
            checkpoint.save_model(out / "model", of._replace(config=stage.result(), params=models.policy.params))

        def abstract() -> Models:
            return Models(*(state.abstract(*both, mesh) for both in zip(self.configs, self.optimizers, strict=True)))

        return loop.Trained(create, abstract, store)

    def iterate(self, models: Models, cursor: loop.Cursor, log: Log) -> tuple[Models, loop.Cursor, Any]:
        """One step: answers, their rewards, advantages, updates."""
        step = cursor["iteration"]
        groups, sampled = self._collect(models.policy.params, step, log)
        rollout.write(self.out / "rollouts", step, groups, self.tokenizer.decode)
        with log.phase("teacher"):
            minibatches, estimated = self._estimate(models, groups)
        with log.phase("train"):
            models, learned = self._learn(models, minibatches, step)
            jax.block_until_ready(models)  # the next rollouts need it at once; so the time is charged rightly
        return models, cursor, {**sampled, **estimated, **learned}

    def _collect(self, params: Any, step: int, log: Log) -> tuple[list[list[Rollout]], dict[str, float]]:
        """The answers to the step's tasks with their rewards, and statistics."""
        stage = self.stage
        of = {"slots": stage.compute.slots, "mesh": self.mesh, "pool": self.pool, "log": log, "score": self.score}
        sampler = Sampler(sampling=stage.sampling, **of)
        model = checkpoint.Model(self.configs[0], params, self.tokenizer)
        chosen = [self.order[step * stage.prompts + i] for i in range(stage.prompts)]
        noise = sample.Noise(seed=stage.seed, step=step)
        groups = sampler.rollouts(model, chosen, num_samples=stage.group, noise=noise, version=step)
        return groups, rollout.statistics(groups)

    def _estimate(self, models: Models, groups: list[list[Rollout]]) -> tuple[list[_Minibatch], dict[str, jax.Array]]:
        """The step's minibatches with all that the losses need; each model is asked about all answers at a time."""
        o, temperature = self.stage.objective, self.stage.sampling.temperature
        share = self.stage.prompts // self.stage.minibatches
        minibatches = [self._packed(groups[i : i + share]) for i in range(0, len(groups), share)]
        micros = [micro for one in minibatches for micro in one.micros]
        plain = [{name: micro[name] for name in FIELDS} for micro in micros]
        for micro, given in zip(micros, plain, strict=True):
            micro["old_logp"] = score.token_logp(self.configs[0], models.policy.params, given, temperature=temperature)
            micro["old_values"] = score.values(self.configs[1], models.critic.params, given)
        if self.reference is not None:
            config, params = self.reference("reference")
            for micro, given in zip(micros, plain, strict=True):
                micro["reference_logp"] = score.token_logp(config, params, given, temperature=temperature)
            del params
            self.reference.leave()
        whole = {name: jnp.concatenate([micro[name] for micro in micros]) for name in micros[0]}
        found, metrics = _estimated(whole, o)
        rows = micros[0]["mask"].shape[0]
        for index, micro in enumerate(micros):
            own = {name: values[index * rows : (index + 1) * rows] for name, values in found.items()}
            micro.update(jax.device_put(own, meshes.batch_shardings(own, self.mesh)))
        return minibatches, metrics

    def _packed(self, groups: Sequence[Sequence[Rollout]]) -> _Minibatch:
        packed = pack_groups(
            [rollout.group(one, reward=[self.stage.earned(r) for r in one]) for one in groups],
            length=self.stage.compute.row_tokens,
            fields=("behavior_logp", "reward"),
        )
        micros = updater.micro_batches(packed.batch, self.stage.compute.rows(self.mesh), self.mesh)
        return _Minibatch(micros, float(np.sum(packed.batch["mask"])))

    def _learn(self, models: Models, minibatches: list[_Minibatch], step: int) -> tuple[Models, dict[str, jax.Array]]:
        """`epochs` times all minibatches, each epoch in an order of its own."""
        (policy, critic), stage = models, self.stage
        logged: list[dict[str, jax.Array]] = []
        for epoch in range(stage.epochs):
            order = np.random.default_rng([stage.seed, step, epoch]).permutation(len(minibatches))
            for place, index in enumerate(order):
                one = minibatches[index]
                mixed, constants = self._ptx(one, (step * stage.epochs + epoch) * stage.minibatches + place)
                own = [{name: micro[name] for name in (*FIELDS, *POLICY_FIELDS)} for micro in one.micros]
                if stage.ptx:
                    own = [{**micro, "ptx": jnp.zeros_like(micro["mask"])} for micro in own]
                policy, learned = self.policy.step(policy, [*own, *mixed], *constants)
                own = [{name: micro[name] for name in (*FIELDS, *CRITIC_FIELDS)} for micro in one.micros]
                critic, valued = self.critic.step(critic, own)
                logged.append(learned | {name if name == "value" else f"value_{name}": x for name, x in valued.items()})
        return Models(policy, critic), {name: jnp.mean(jnp.stack([x[name] for x in logged])) for name in logged[0]}

    def _ptx(self, one: _Minibatch, update: int) -> tuple[list[dict[str, jax.Array]], tuple[jax.Array, ...]]:
        """The update's micro-batches of pretraining, and the constants of the loss."""
        ptx = self.stage.ptx
        if ptx is None or self.pretraining is None:
            return [], ()
        chosen = [self.pretraining[update * ptx.batch_size + i] for i in range(ptx.batch_size)]
        rows = sft.batch(self.tokenizer, chosen, length=self.stage.compute.row_tokens)
        micros = updater.micro_batches(rows, self.stage.compute.rows(self.mesh), self.mesh)
        for micro in micros:
            micro["ptx"] = micro["mask"]
            nothing = jnp.zeros_like(micro["mask"])
            micro.update({"mask": nothing, **dict.fromkeys(POLICY_FIELDS, nothing)})
        return micros, (jnp.float32(one.weight), jnp.float32(np.sum(rows["mask"])))
