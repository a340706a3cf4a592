"""Learning from preferences: DPO and its relatives, on pairs of answers or on answers that are labelled one by one.

A pair shares its prompt in a packed row, so the prompt is computed once. The log-probs of the reference, which is the
starting model, are computed once before training and kept on disk (see `reference`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..data import preferences
from ..data.batch import Batch
from ..data.pack import Group, Packed, pack_groups
from ..data.preferences import Paired, Ranking, Rankings
from ..data.shuffle import Shuffled
from ..data.tokenizer import Tokenizer
from ..model.config import ModelConfig
from ..sharding import mesh as meshes
from . import checkpoint, loop, programs, score, state
from .compute import Compute
from .metrics import Log
from .optimizer import AdamW, Optimizer
from .prefer_objectives import DPO, IPO, KTO, ORPO, LengthNormalizedDPO, SimPO
from .reference import Reference
from .step import State, make_train_step
from .updater import Updater, micro_batches
from .validation import Validation, validating

Objective = DPO | LengthNormalizedDPO | IPO | SimPO | ORPO | KTO


def train_step(
    config: ModelConfig, optimizer: optax.GradientTransformation, objective: Objective, *, accumulate: int = 1
) -> Callable:
    """`step(state, batch, *constants) -> (state, metrics)`, pure; for the batch see `batch`.

    The constant of `KTO` is z0, a scalar; the other objectives have none.
    """
    return make_train_step(objective.loss(config), optimizer, accumulate=accumulate)


def batch(tokenizer: Tokenizer, rankings: Sequence[Ranking], *, length: int) -> Batch:
    """Pairs or labelled answers, packed into rows of `length` tokens; a prompt and its answers share a row.

    Beside the usual fields it has `good`, 1 for tokens of good answers. Objectives with a reference also want
    `reference_logp`: `score.token_logp` of this batch under the reference.

    Raises:
        ValueError: for a pair that does not fit in a row with its prompt.
    """
    return _packed([_group(tokenizer, one) for one in rankings], length, ("good",)).batch


def _group(tokenizer: Tokenizer, one: Ranking) -> Group:
    return preferences.group(tokenizer, one, good=[float(score >= 0.5) for score in one.scores])


def _packed(groups: Sequence[Group], length: int, fields: Sequence[str]) -> Packed:
    for one in groups:
        preferences.check_fits(one, length)
    return pack_groups(groups, length=length, fields=fields)


@dataclass(frozen=True, kw_only=True)
class Prefer:
    """Train `start` on preferences, `batch_size` pairs (for `KTO`: labelled answers) a step. It is the reference, too.

    With pairs, `KTO` takes both answers by themselves.
    """

    start: str
    data: Rankings | Paired
    steps: int
    objective: Objective = field(default_factory=DPO)
    batch_size: int = 32
    optimizer: Optimizer = field(
        default_factory=lambda: AdamW(learning_rate=5e-7, schedule="linear", warmup_steps=10, b2=0.999)
    )
    compute: Compute = field(default_factory=Compute)
    validation: Validation | None = None
    verifiers: int = 1
    seed: int = 0

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Run to the end, from the newest checkpoint in `out`; the model is then in `out`/model."""
        mesh = mesh or meshes.make_mesh()
        config = self.compute.configure(checkpoint.open_config(self.start))
        tokenizer = checkpoint.open_tokenizer(self.start)
        examples = self.objective.examples(self.data.open())
        order = Shuffled(range(len(examples)), seed=self.seed)
        optimizer = self.optimizer.build(self.steps)
        updater = Updater(self.objective.loss(config), optimizer, mesh)

        def group(number: int) -> Group:
            found = _group(tokenizer, examples[number])
            preferences.check_fits(found, self.compute.row_tokens)
            return found

        reference = None
        if self.objective.reference:
            seen = self.steps * self.batch_size
            every = seen >= len(examples)
            wanted = range(len(examples)) if every else sorted({order[place] for place in range(seen)})
            of = {"groups": group, "wanted": wanted, "compute": self.compute, "mesh": mesh}
            reference = Reference(out / "reference", self.start, **of)

        def iterate(now: State, cursor: loop.Cursor, log: Log) -> tuple[State, loop.Cursor, Any]:
            first = cursor["iteration"] * self.batch_size
            with log.phase("data"):
                numbers = [order[first + i] for i in range(self.batch_size)]
                groups = [group(number) for number in numbers]
                if reference is not None:
                    known = zip(groups, numbers, strict=True)
                    groups = [_with_reference(one, reference.logp(number, one)) for one, number in known]
            with log.phase("train"):
                scores = functools.partial(self._scores, config, now.params, mesh)
                constants = self.objective.constants(scores, groups)
                packed = _packed(self.objective.trained(groups), self.compute.row_tokens, self._fields)
                micros = micro_batches(packed.batch, self.compute.rows(mesh), mesh)
                now, metrics = updater.step(now, micros, *constants)
            return now, cursor, metrics

        with jax.set_mesh(mesh), validating(self, out, mesh) as validate:
            loop.run(
                out,
                start=self.start,
                steps=self.steps,
                optimizer=optimizer,
                compute=self.compute,
                mesh=mesh,
                iterate=iterate,
                validate=validate,
            )

    @property
    def _fields(self) -> tuple[str, ...]:
        return ("good", "reference_logp") if self.objective.reference else ("good",)

    def _scores(
        self, config: ModelConfig, params: Any, mesh: jax.sharding.Mesh, groups: Sequence[Group]
    ) -> list[np.ndarray]:
        """The policy's log-probs of the answers to some prompts."""
        packed = pack_groups(groups, length=self.compute.row_tokens)
        return score.examples(lambda micro: score.token_logp(config, params, micro), packed, self.compute, mesh)

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """The compiled programs of this stage; every pair fills a row, and is seen once."""
        config = self.compute.configure(checkpoint.open_config(self.start))
        optimizer, loss = self.optimizer.build(self.steps), self.objective.loss(config)
        batch = programs.abstract_batch(self.compute, mesh, dict.fromkeys(self._fields, ()))
        tokens = self.batch_size * self.compute.row_tokens
        constants = jax.eval_shape(lambda: (jnp.float32(0),)) if isinstance(self.objective, KTO) else ()
        named = programs.training(loss, config, optimizer, batch, mesh, *constants, updates=self.steps, tokens=tokens)
        if self.objective.reference:
            plain = programs.abstract_batch(self.compute, mesh)
            scorings = 2 if isinstance(self.objective, KTO) else 1  # z0 takes the policy's log-probs at every step
            named["score"] = programs.Program(
                function=score.token_logp,
                static=(config,),
                arguments=(state.abstract_params(config, mesh), plain),
                calls=scorings * named["gradients"].calls,
                tokens=named["gradients"].tokens,
            )
        if self.validation:
            beside = named["gradients"].resident
            named |= self.validation.programs(config, self.compute, mesh, steps=self.steps, resident=beside)
        return named

    def result(self) -> ModelConfig:
        """The shape of the model that the stage makes."""
        return checkpoint.open_config(self.start)


def _with_reference(group: Group, logp: Sequence[np.ndarray]) -> Group:
    answers = [
        dataclasses.replace(answer, fields={**answer.fields, "reference_logp": values})
        for answer, values in zip(group.answers, logp, strict=True)
    ]
    return Group(prompt=group.prompt, answers=answers)
