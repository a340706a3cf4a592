"""What preferences are learned by: objectives on pairs of answers, and one on answers that are labelled one by one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..data.batch import BRANCHES
from ..data.pack import Group
from ..data.preferences import Ranking
from ..data.shuffle import Indexable
from ..model import transformer
from ..model.config import ModelConfig
from .losses import masked, preference
from .step import Loss


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
