"""Objectives of RL, put together from parts: how answers are compared, what a token's loss is, what it is divided by.

An `Objective` is data: a surrogate, a baseline, a normaliser, a KL term, a correction, a choice of groups. The recipes
that were published are functions below that return one, and `dataclasses.replace` changes a part:

                 surrogate             baseline           normaliser      KL                    besides
    olmo         Clip(0.2, 0.272)      group_centered     per_token       -                     Truncated, Informative
    grpo         Clip                  group_normalized   per_sequence    KLLoss(k3)
    dr_grpo      Clip                  group_centered     PerBudget       -
    dapo         Clip(0.2, 0.28)       group_normalized   per_token       -                     Overlong, Dynamic
    gspo         SequenceClip          group_normalized   per_sequence    -
    cispo        Cispo                 group_normalized   per_token       -
    dual_clip    DualClip              group_normalized   per_sequence    KLLoss(k3)
    rloo         Reinforce             leave_one_out      PerBudget(1)    KLReward(k1)
    reinforce_plus_plus  Clip          raw, whitened      per_token       KLReward(k1)
    deepseek_v32 DropDrifted(Clip)     group_centered     per_sequence    UnbiasedKL            sampling mask kept
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .correction import Correction, Fresh, Truncated, Uncorrected, interpolated, scored
from .losses import advantage, kl, masked, normaliser, shaping
from .losses.normaliser import Normaliser
from .selection import Dynamic, Everything, Informative, Selection
from .step import Mean
from .surrogate import Cispo, Clip, DropDrifted, DualClip, Reinforce, SequenceClip, Surrogate, Tokens

Estimator = Callable[[Float[Array, "B T"], Float[Array, "B T"]], Float[Array, "B T"]]
Baseline = Callable[[Float[Array, "P G"]], Float[Array, "P G"]]


@dataclass(frozen=True, kw_only=True)
class KLLoss:
    """weight x an estimate of KL(policy || reference) in the loss. See `losses.kl` for the gradient that each has.

    k3 is GRPO's and pulls as KL(reference || policy) does; k2 as KL(policy || reference); k1 not at all.
    """

    weight: float
    estimator: Estimator = kl.k3

    def loss(self, tokens: Tokens, reference_logp: Float[Array, "B T"]) -> Float[Array, "B T"]:
        """What is added to each token's loss."""
        return self.weight * self.estimator(tokens.logp, reference_logp)


@dataclass(frozen=True, kw_only=True)
class UnbiasedKL:
    """weight x (policy / old) k3 in the loss, the gradient flowing through the ratio: DeepSeek-V3.2's."""

    weight: float

    def loss(self, tokens: Tokens, reference_logp: Float[Array, "B T"]) -> Float[Array, "B T"]:
        """What is added to each token's loss. See `losses.kl.importance_weighted_k3`."""
        return self.weight * kl.importance_weighted_k3(tokens.logp, tokens.old_logp, reference_logp)


@dataclass(frozen=True, kw_only=True)
class KLReward:
    """-weight x an estimate of KL(old || reference) in the reward of every token: it pays for all tokens that follow.

    A_t = A - weight sum_{u >= t} k_u. With k1 the gradient is that of the KL of whole answers; see `losses.kl` for k2
    and k3. REINFORCE++, https://arxiv.org/abs/2501.03262, eq. 4.
    """

    weight: float
    estimator: Estimator = kl.k1

    def penalty(
        self,
        old_logp: Float[Array, "B T"],
        reference_logp: Float[Array, "B T"],
        mask: Float[Array, "B T"],
        segments: Int[Array, "B T"],
    ) -> Float[Array, "B T"]:
        """What each token's advantage is lowered by, a constant."""
        token_kl = self.estimator(old_logp, reference_logp)
        return self.weight * advantage.rewards_to_go(token_kl, mask, segments=segments)


@dataclass(frozen=True, kw_only=True)
class Overlong:
    """DAPO's soft penalty in tokens: 0 up to `limit` - `buffer`, down to -1 at `limit`; added to an answer's reward."""

    limit: int
    buffer: int

    def __post_init__(self) -> None:
        if not 1 <= self.buffer <= self.limit:
            raise ValueError(f"a buffer of {self.buffer} tokens must be from 1 to the limit of {self.limit}")

    def __call__(self, num_tokens: Int[Array, "P G"]) -> Float[Array, "P G"]:
        """See `losses.shaping.soft_overlong_penalty`."""
        return shaping.soft_overlong_penalty(num_tokens, limit=self.limit, buffer=self.buffer)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a step of RL minimises. The default is OlmoRL's; see the module for the others.

    surrogate   the loss of a token, given its advantage
    baseline    rewards of a group of answers to advantages
    overlong    a penalty for length that is added to the rewards first, if any
    whiten      whether advantages are shifted and scaled to mean 0 and deviation 1 over all tokens of the step
    normaliser  how tokens weigh, and what their sum is divided by
    kl          a pull towards the reference, as a loss or in the reward, if any
    correction  weights for a sampler whose probabilities are not the trainer's
    old_policy  what pi_old is: `correction.scored`, `sampler` or `interpolated`
    selection   which groups of answers a step learns from
    keep_routing  whether tokens go to the experts that the sampler chose for them: DeepSeek-V3.2's Keep Routing, also
                known as Rollout Routing Replay (R3), https://arxiv.org/abs/2510.11370. Of mixtures of experts only; the
                reference of a KL term goes by its own router
    keep_sampling_mask  whether policies are normalised over the tokens that the sampler could draw (top-k, top-p,
                min-p): DeepSeek-V3.2's Keep Sampling Mask, without which truncated sampling is refused
    """

    surrogate: Surrogate = field(default_factory=lambda: Clip(low=0.2, high=0.272))
    baseline: Baseline = advantage.group_centered
    overlong: Overlong | None = None
    whiten: bool = False
    normaliser: Normaliser = normaliser.per_token
    kl: KLLoss | UnbiasedKL | KLReward | None = None
    correction: Correction = field(default_factory=Truncated)
    old_policy: Callable[[Float[Array, "B T"], Mapping[str, Array]], Float[Array, "B T"]] = scored
    selection: Selection = field(default_factory=Informative)
    keep_sampling_mask: bool = False
    keep_routing: bool = False

    def scores_old(self, updates: int) -> bool:
        """Whether the policy is scored before the updates of a step: they are several, or its KL is in the reward."""
        return isinstance(self.kl, KLReward) or (updates > 1 and self.old_policy is scored)

    def fields(self, updates: int) -> tuple[str, ...]:
        """The fields [B, T] that the loss reads of a batch, beside those of `data.batch`."""
        ages = self.old_policy is interpolated or isinstance(self.correction, Fresh)
        wanted = {"old_logp": self.scores_old(updates), "reference_logp": self.kl is not None, "age": ages}
        return "advantage", "behavior_logp", *(name for name, needed in wanted.items() if needed)

    def advantages(self, rewards: Float[Array, "P G"], num_tokens: Int[Array, "P G"]) -> Float[Array, "P G"]:
        """Advantages of answers from their rewards and lengths."""
        return self.baseline(rewards if self.overlong is None else rewards + self.overlong(num_tokens))

    def finish(self, micros: Sequence[dict[str, Array]]) -> None:
        """Put what takes log-probs or the whole batch into the advantages of a step's micro-batches, in place."""
        for micro in micros:
            if isinstance(self.kl, KLReward):
                given = (micro[name] for name in ("old_logp", "reference_logp", "mask", "segments"))
                micro["advantage"] = _lowered(self.kl, micro["advantage"], *given)
        if self.whiten:
            _whiten(micros)

    def loss(
        self, tokens: Tokens, reference_logp: Float[Array, "B T"] | None
    ) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Any]]:
        """(sum, divisor, metrics) of a batch."""
        per_token = self.surrogate(tokens) * self.correction(tokens)
        metrics = self.surrogate.metrics(tokens)
        counted = masked.weight(tokens.mask)
        if self.kl is not None and reference_logp is not None:
            if not isinstance(self.kl, KLReward):
                per_token += self.kl.loss(tokens, reference_logp)
            metrics["kl"] = Mean(masked.sum(kl.k3(tokens.logp, reference_logp), tokens.mask), counted)
        metrics["entropy_estimate"] = Mean(masked.sum(-tokens.logp, tokens.mask), counted)
        weights, divisor = self.normaliser(tokens.mask, tokens.segments)
        return masked.sum(per_token, weights), divisor, metrics


@functools.partial(jax.jit, static_argnums=0)
def _lowered(term: KLReward, advantages: Array, old: Array, reference: Array, mask: Array, segments: Array) -> Array:
    return advantages - term.penalty(old, reference, mask, segments)


def _whiten(micros: Sequence[dict[str, Array]]) -> None:
    """`advantage.whiten` over all micro-batches together, in place: two passes, and nothing is put in one place."""
    given = [(micro["advantage"], micro["mask"]) for micro in micros]
    if not given:
        return
    moments = [_moments(*one, jnp.float32(0.0)) for one in given]
    weight = sum(float(m["weight"]) for m in moments)
    mean = jnp.float32(sum(float(m["total"]) for m in moments) / max(weight, 1.0))
    uniform = min(float(m["lowest"]) for m in moments) >= max(float(m["highest"]) for m in moments)
    square = sum(float(_moments(*one, mean)["square"]) for one in given) / max(weight, 1.0)
    scale = jnp.float32(0.0 if uniform or square == 0.0 else square**-0.5)
    for micro in micros:
        micro["advantage"] = _scaled(micro["advantage"], micro["mask"], mean, scale)


@jax.jit
def _moments(values: Array, mask: Array, mean: Array) -> dict[str, Array]:
    counted = mask != 0
    centered = jnp.where(counted, values - mean, 0.0)
    return {
        "weight": masked.weight(mask),
        "total": masked.sum(values, mask),
        "square": masked.sum(jnp.square(centered), mask),
        "lowest": jnp.min(jnp.where(counted, values, jnp.inf), initial=jnp.inf),
        "highest": jnp.max(jnp.where(counted, values, -jnp.inf), initial=-jnp.inf),
    }


@jax.jit
def _scaled(values: Array, mask: Array, mean: Array, scale: Array) -> Array:
    return jnp.where(mask != 0, (values - mean) * scale, 0.0)


def olmo(*, rounds: int = 3) -> Objective:
    """OlmoRL, the default. https://arxiv.org/abs/2512.13961, section 4.4.1 and table 49."""
    return Objective(selection=Informative(rounds=rounds))


def grpo(*, kl_weight: float = 0.04) -> Objective:
    """GRPO of DeepSeekMath, https://arxiv.org/abs/2402.03300, eq. 3, and of R1, whose weight is 0.001."""
    return Objective(
        surrogate=Clip(),
        baseline=advantage.group_normalized,
        normaliser=normaliser.per_sequence,
        kl=KLLoss(weight=kl_weight) if kl_weight else None,
        correction=Uncorrected(),
        selection=Everything(),
    )


def dr_grpo(*, budget: int) -> Objective:
    """Dr. GRPO: no standard deviation, and every answer divided by the same `budget` of tokens, the length limit.

    https://arxiv.org/abs/2503.20783, section 3.2.
    """
    return Objective(
        surrogate=Clip(),
        normaliser=normaliser.PerBudget(tokens=budget),
        correction=Uncorrected(),
        selection=Everything(),
    )


def dapo(*, limit: int, buffer: int, rounds: int = 10) -> Objective:
    """DAPO: clip-higher, token-level loss, soft overlong penalty, dynamic sampling. https://arxiv.org/abs/2503.14476.

    `limit` is the longest answer in tokens (20,480 in the paper) and `buffer` its last, penalised part (4,096).
    """
    return Objective(
        surrogate=Clip(low=0.2, high=0.28),
        baseline=advantage.group_normalized,
        overlong=Overlong(limit=limit, buffer=buffer),
        correction=Uncorrected(),
        selection=Dynamic(rounds=rounds),
    )


def gspo() -> Objective:
    """GSPO, https://arxiv.org/abs/2507.18071, eq. 5; made for several updates a step (4 in the paper)."""
    return Objective(
        surrogate=SequenceClip(),
        baseline=advantage.group_normalized,
        normaliser=normaliser.per_sequence,
        correction=Uncorrected(),
        selection=Everything(),
    )


def cispo(*, upper: float = 5.0) -> Objective:
    """CISPO (MiniMax-M1), https://arxiv.org/abs/2506.13585, eq. 4; `upper` 5 is ScaleRL's."""
    return Objective(
        surrogate=Cispo(upper=upper),
        baseline=advantage.group_normalized,
        correction=Uncorrected(),
        selection=Everything(),
    )


def dual_clip(*, bound: float = 3.0, kl_weight: float = 0.04) -> Objective:
    """GRPO whose loss on bad tokens is bounded, https://arxiv.org/abs/1912.09729, eq. 5."""
    return Objective(
        surrogate=DualClip(bound=bound),
        baseline=advantage.group_normalized,
        normaliser=normaliser.per_sequence,
        kl=KLLoss(weight=kl_weight) if kl_weight else None,
        correction=Uncorrected(),
        selection=Everything(),
    )


def rloo(*, kl_weight: float = 0.03) -> Objective:
    """RLOO: REINFORCE on whole answers, the others' mean as the baseline. https://arxiv.org/abs/2402.14740."""
    return Objective(
        surrogate=Reinforce(),
        baseline=advantage.leave_one_out,
        normaliser=normaliser.PerBudget(tokens=1),
        kl=KLReward(weight=kl_weight) if kl_weight else None,
        correction=Uncorrected(),
        selection=Everything(),
    )


def reinforce_plus_plus(*, kl_weight: float = 0.01, baseline: Baseline = advantage.raw) -> Objective:
    """REINFORCE++: rewards less the KL to come, whitened over the batch; `group_centered` is its baseline variant.

    https://arxiv.org/abs/2501.03262, eq. 4 to 6.
    """
    return Objective(
        surrogate=Clip(),
        baseline=baseline,
        whiten=True,
        kl=KLReward(weight=kl_weight) if kl_weight else None,
        correction=Uncorrected(),
        selection=Everything(),
    )


def deepseek_v32(
    *, delta: float = 0.5, kl_weight: float = 0.001, keep_sampling_mask: bool = True, keep_routing: bool = False
) -> Objective:
    """DeepSeek-V3.2's GRPO, https://arxiv.org/abs/2512.02556, section 3.1, which publishes no number: these are ours.

    Where the sampler's probabilities are not the trainer's, replace `old_policy` by `correction.sampler`: the KL term
    is unbiased only if pi_old is the policy that sampled. For a mixture of experts, the paper has `keep_routing`.
    """
    return Objective(
        surrogate=DropDrifted(delta=delta),
        normaliser=normaliser.per_sequence,
        kl=UnbiasedKL(weight=kl_weight) if kl_weight else None,
        correction=Uncorrected(),
        selection=Everything(),
        keep_sampling_mask=keep_sampling_mask,
        keep_routing=keep_routing,
    )
