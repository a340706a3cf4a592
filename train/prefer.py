"""Learning from preferences: DPO and its relatives, on pairs of answers or on answers that are labelled one by one.

A pair shares its prompt in a packed row, so the prompt is computed once. The log-probs of the reference, which is the
starting model, are computed once before training and kept on disk (see `reference`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ..data import preferences
from ..data.batch import BRANCHES, Batch
from ..data.pack import Group, Packed, pack_groups
from ..data.preferences import Ranking, Rankings
from ..data.shuffle import Indexable, Shuffled
from ..data.tokenizer import Tokenizer
from ..model import transformer
from ..model.config import ModelConfig
from ..sharding import mesh as meshes
from . import checkpoint, loop, programs, score, state
from .compute import Compute
from .losses import masked, preference
from .metrics import Log
from .optimizer import AdamW
from .reference import Reference
from .step import Loss, State, make_train_step
from .updater import Updater, micro_batches


class Answer(NamedTuple):
    """Numbers of an answer, held at each token that asks for them.

    `logp` is its log-prob, `ratio` that minus the reference's (the same as `logp` without a reference), `length` its
    number of tokens.
    """

    logp: Float[Array, "B T"]
    ratio: Float[Array, "B T"]
    length: Float[Array, "B T"]


class _Pairs:
    """What the objectives on pairs share. A subclass says what a pair costs and what an answer is implicitly worth."""

    reference = True
    nll: float

    def value(self, chosen: Answer, rejected: Answer) -> Float[Array, "B T"]:
        """The loss of a pair."""
        raise NotImplementedError

    def reward(self, answer: Answer) -> Float[Array, "B T"]:
        """The implicit reward of an answer: what the loss raises for one and lowers for the other."""
        raise NotImplementedError

    def loss(self, config: ModelConfig) -> Loss:
        """`loss(params, batch) -> (sum, weight, metrics)`; every pair counts the same."""

        def compute(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
            logp = _token_logp(config, params, batch)
            # A pair is branches 1 and 2 of its prompt; the chosen answer's tokens hold the value of both.
            partner = batch["segments"] // BRANCHES * (2 * BRANCHES) + 3 - batch["segments"]
            chosen, rejected = _answer(logp, batch), _answer(logp, batch, partner)
            weights = masked.per_sequence(batch["mask"] * batch["good"], batch["segments"])
            won, lost, nll = self.reward(chosen), self.reward(rejected), -chosen.logp / chosen.length
            metrics = {
                "accuracy": won > lost, "margin": won - lost, "reward_chosen": won, "reward_rejected": lost,
                "logp_chosen": chosen.logp, "logp_rejected": rejected.logp, "nll": nll,
            }  # fmt: skip
            total = masked.sum(self.value(chosen, rejected) + self.nll * nll, weights)
            return total, masked.weight(weights), _sums(metrics, weights)

        return compute

    def examples(self, data: Indexable[Ranking]) -> Indexable[Ranking]:
        """What is trained on: the best and the worst answer to each prompt."""
        return _Pairwise(data)

    def trained(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The answers that the loss sees."""
        return groups

    def constants(self, scores: Callable[[Sequence[Group]], list[np.ndarray]], groups: Sequence[Group]) -> tuple:
        """What the loss takes after the batch."""
        return ()


@dataclass(frozen=True, kw_only=True)
class DPO(_Pairs):
    """-log sigma(beta (h_c - h_r)), h the log ratios to the reference. https://arxiv.org/abs/2305.18290

    `nll` adds that times the chosen answer's NLL per token; Llama 3 takes 0.2, https://arxiv.org/abs/2407.21783.
    """

    beta: float = 0.1
    nll: float = 0.0

    def value(self, chosen: Answer, rejected: Answer) -> Float[Array, "B T"]:
        """See `_Pairs`."""
        return preference.dpo(chosen.ratio, rejected.ratio, beta=self.beta)

    def reward(self, answer: Answer) -> Float[Array, "B T"]:
        """See `_Pairs`."""
        return self.beta * answer.ratio


@dataclass(frozen=True, kw_only=True)
class LengthNormalizedDPO(_Pairs):
    """DPO on log ratios per token: Tulu 3, https://arxiv.org/abs/2411.15124, and Olmo 3. `nll` as in `DPO`."""

    beta: float = 5.0
    nll: float = 0.0

    def value(self, chosen: Answer, rejected: Answer) -> Float[Array, "B T"]:
        """See `_Pairs`."""
        means = chosen.ratio / chosen.length, rejected.ratio / rejected.length
        return preference.length_normalized_dpo(*means, beta=self.beta)

    def reward(self, answer: Answer) -> Float[Array, "B T"]:
        """See `_Pairs`."""
        return self.beta * answer.ratio / answer.length


@dataclass(frozen=True, kw_only=True)
class IPO(_Pairs):
    """(h_c - h_r - 1 / (2 tau))^2. https://arxiv.org/abs/2310.12036. `nll` as in `DPO`."""

    tau: float = 0.1
    nll: float = 0.0

    def value(self, chosen: Answer, rejected: Answer) -> Float[Array, "B T"]:
        """See `_Pairs`."""
        return preference.ipo(chosen.ratio, rejected.ratio, tau=self.tau)

    def reward(self, answer: Answer) -> Float[Array, "B T"]:
        """See `_Pairs`."""
        return self.tau * answer.ratio


@dataclass(frozen=True, kw_only=True)
class SimPO(_Pairs):
    """-log sigma(beta (mean log-prob chosen - rejected) - gamma). https://arxiv.org/abs/2405.14734. No reference."""

    reference = False
    beta: float = 2.0
    gamma: float = 1.0
    nll: float = 0.0

    def value(self, chosen: Answer, rejected: Answer) -> Float[Array, "B T"]:
        """See `_Pairs`."""
        means = chosen.logp / chosen.length, rejected.logp / rejected.length
        return preference.simpo(*means, beta=self.beta, gamma=self.gamma)

    def reward(self, answer: Answer) -> Float[Array, "B T"]:
        """See `_Pairs`."""
        return self.beta * answer.logp / answer.length


@dataclass(frozen=True, kw_only=True)
class ORPO(_Pairs):
    """The chosen answer's NLL per token + weight times the log odds ratio's loss. https://arxiv.org/abs/2403.07691

    It needs no reference, and no SFT before it: the NLL is part of it, and `nll` adds more.
    """

    reference = False
    weight: float = 0.1
    nll: float = 0.0

    def value(self, chosen: Answer, rejected: Answer) -> Float[Array, "B T"]:
        """See `_Pairs`."""
        means = chosen.logp / chosen.length, rejected.logp / rejected.length
        return preference.orpo(*means, weight=self.weight)

    def reward(self, answer: Answer) -> Float[Array, "B T"]:
        """See `_Pairs`."""
        return self.weight * answer.logp / answer.length


@dataclass(frozen=True, kw_only=True)
class KTO:
    """weight - value of answers that are good or bad each by itself. https://arxiv.org/abs/2402.01306

    The reference point z0 = max(0, mean h) is that of the whole batch before its update, from each prompt with the
    answer to the next other prompt in the data. The paper has desirable_weight x good answers at 1 to 4/3 times
    undesirable_weight x bad ones. `nll` adds that times the good answers' NLL per token.
    """

    reference = True
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    nll: float = 0.0

    def loss(self, config: ModelConfig) -> Loss:
        """`loss(params, batch, reference_point) -> (sum, weight, metrics)`; every answer counts the same."""
        settings = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}

        def compute(
            params: Any, batch: Any, reference_point: Array
        ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
            answer, good = _answer(_token_logp(config, params, batch), batch), batch["good"]
            weights = masked.per_sequence(batch["mask"], batch["segments"])
            per_answer = preference.kto(answer.ratio, good > 0, reference_point, beta=self.beta, **settings)
            nll, gain = -answer.logp / answer.length, self.beta * (answer.ratio - reference_point)
            metrics = {
                "accuracy": (gain > 0) == (good > 0), "reward_good": gain * good, "reward_bad": gain * (1 - good),
                "nll": nll, "reference_point": reference_point + 0 * gain,
            }  # fmt: skip
            total = masked.sum(per_answer + self.nll * good * nll, weights)
            return total, masked.weight(weights), _sums(metrics, weights)

        return compute

    def examples(self, data: Indexable[Ranking]) -> Indexable[Ranking]:
        """What is trained on: each answer beside the mismatched one, which only estimates z0."""
        return _Labelled(data)

    def trained(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The answers that the loss sees."""
        return [Group(prompt=one.prompt, answers=one.answers[:1]) for one in groups]

    def constants(self, scores: Callable[[Sequence[Group]], list[np.ndarray]], groups: Sequence[Group]) -> tuple:
        """What the loss takes after the batch: z0, from `scores`, the policy's log-probs of answers."""
        others = [Group(prompt=one.prompt, answers=one.answers[1:]) for one in groups]
        known = [other.answers[0] for other in others]
        ratios = [
            np.sum((logp - answer.fields["reference_logp"]) * np.asarray(answer.mask))
            for logp, answer in zip(scores(others), known, strict=True)
        ]
        return (preference.kto_reference_point(jnp.asarray(ratios, jnp.float32), jnp.ones(len(ratios))),)


class _Pairwise:
    """The best answer to each prompt and the worst, the first of equals."""

    def __init__(self, data: Indexable[Ranking]) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Ranking:
        own = self._data[index]
        best, worst = int(np.argmax(own.scores)), int(np.argmin(own.scores))
        if own.scores[best] == own.scores[worst]:
            raise ValueError(
                f"record {index} has {len(own.answers)} answers with the scores {list(own.scores)}, of which none is "
                "better than another: leave it out, or train on labels with KTO"
            )
        return own._replace(answers=(own.answers[best], own.answers[worst]), scores=(1.0, 0.0))


class _Labelled:
    """Answers one by one, each as a ranking of itself, with its label, and of an answer to another prompt."""

    def __init__(self, data: Indexable[Ranking]) -> None:
        self._data = data
        self._each = len(data[0].answers)
        if self._each > 2:
            raise ValueError(f"KTO learns from labels or pairs, and the first record has {self._each} answers")

    def __len__(self) -> int:
        return len(self._data) * self._each

    def __getitem__(self, index: int) -> Ranking:
        number, which = divmod(index, self._each)
        own = self._data[number]
        if len(own.answers) != self._each:
            raise ValueError(
                f"record {number} has {len(own.answers)} answers and the first {self._each}: give labels or pairs"
            )
        other = self._next_prompt(number)
        return Ranking(own.prompt, (own.answers[which], other.answers[0]), (own.scores[which], 0.0))

    def _next_prompt(self, number: int) -> Ranking:
        for step in range(1, len(self._data)):
            other = self._data[(number + step) % len(self._data)]
            if other.prompt != self._data[number].prompt:
                return other
        raise ValueError("all records have the same prompt, and KTO needs the answers to another one: add some")


Objective = DPO | LengthNormalizedDPO | IPO | SimPO | ORPO | KTO


def _token_logp(config: ModelConfig, params: Any, batch: Any) -> jax.Array:
    hidden, _ = transformer.apply(
        config, params, batch["tokens"], positions=batch["positions"], segments=batch["segments"]
    )
    return transformer.token_logp(config, params, hidden, batch["targets"])


def _sums(metrics: Mapping[str, jax.Array], weights: jax.Array) -> dict[str, jax.Array]:
    return {name: masked.sum(values.astype(jnp.float32), weights) for name, values in metrics.items()}


def _answer(logp: jax.Array, batch: Any, wanted: jax.Array | None = None) -> Answer:
    """The numbers of each token's own answer, or of the one with the segment id `wanted`."""
    mask, segments = batch["mask"], batch["segments"]
    reference = batch.get("reference_logp")
    ratio = logp if reference is None else preference.log_ratio(logp, reference)

    def total(values: jax.Array) -> jax.Array:
        if wanted is None:
            return masked.segment_sum(values, mask, segments)
        return masked.sum_of_segment(values, mask, segments, wanted=wanted)

    # Where there is no answer, numbers that no objective divides by or takes the logarithm of.
    length = total(mask)
    there = length > 0
    return Answer(
        jnp.where(there, total(logp), -1.0), jnp.where(there, total(ratio), 0.0), jnp.where(there, length, 1.0)
    )


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
    data: Rankings
    steps: int
    objective: Objective = field(default_factory=DPO)
    batch_size: int = 32
    optimizer: AdamW = field(
        default_factory=lambda: AdamW(learning_rate=5e-7, schedule="linear", warmup_steps=10, b2=0.999)
    )
    compute: Compute = field(default_factory=Compute)
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

        with jax.set_mesh(mesh):
            loop.run(
                out,
                start=self.start,
                steps=self.steps,
                optimizer=optimizer,
                save_every=self.compute.save_every,
                mesh=mesh,
                iterate=iterate,
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
