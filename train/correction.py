"""Corrections for a sampler whose probabilities are not the trainer's: weights per token, one small class each.

A correction multiplies the surrogate, never the KL term. `low` and `high` are the ratios pi_old / mu that it leaves
alone; the share of tokens outside is logged, whether it is corrected or not. `old_policy`s say what pi_old is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .losses import masked, mismatch
from .step import Max, Mean
from .surrogate import Tokens


@runtime_checkable
class Correction(Protocol):
    """A weight per token, a constant."""

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    def __call__(self, tokens: Tokens) -> Float[Array, "B T"]: ...


@dataclass(frozen=True, kw_only=True)
class Uncorrected:
    """Every token weighs 1; ratios outside [`low`, `high`] are only counted."""

    low: float = 0.5
    high: float = 2.0

    def __call__(self, tokens: Tokens) -> Float[Array, "B T"]:
        """Ones."""
        return jnp.ones_like(tokens.logp)


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """TIS: min(pi_old / mu, `high`) for each token. Olmo 3, https://arxiv.org/abs/2512.13961, eq. 1."""

    high: float = 2.0

    @property
    def low(self) -> float:
        """Nothing is cut below."""
        return 0.0

    def __call__(self, tokens: Tokens) -> Float[Array, "B T"]:
        """See `losses.mismatch.truncated_importance_weight`."""
        return mismatch.truncated_importance_weight(tokens.old_logp, tokens.behavior_logp, cap=self.high)


@dataclass(frozen=True, kw_only=True)
class Masked:
    """IcePop: pi_old / mu where it lies in [`low`, `high`], and no gradient for a token further off."""

    low: float = 0.5
    high: float = 2.0

    def __call__(self, tokens: Tokens) -> Float[Array, "B T"]:
        """See `losses.mismatch.masked_importance_weight`."""
        bounds = {"low": self.low, "high": self.high}
        return mismatch.masked_importance_weight(tokens.old_logp, tokens.behavior_logp, **bounds)


@dataclass(frozen=True, kw_only=True)
class TruncatedSequence:
    """min(prod_t pi_old / mu, `high`), one weight for a whole answer: unbiased but for the cap, and noisier."""

    high: float = 2.0

    @property
    def low(self) -> float:
        """Nothing is cut below."""
        return 0.0

    def __call__(self, tokens: Tokens) -> Float[Array, "B T"]:
        """See `losses.mismatch.truncated_sequence_weight`."""
        of = {"mask": tokens.mask, "segments": tokens.segments, "cap": self.high}
        return mismatch.truncated_sequence_weight(tokens.old_logp, tokens.behavior_logp, **of)


@dataclass(frozen=True, kw_only=True)
class MaskedSequence:
    """1 for answers whose geometric-mean ratio lies in [`low`, `high`], else 0."""

    low: float = 0.5
    high: float = 2.0

    def __call__(self, tokens: Tokens) -> Float[Array, "B T"]:
        """See `losses.mismatch.masked_sequence_weight`."""
        of = {"mask": tokens.mask, "segments": tokens.segments, "low": self.low, "high": self.high}
        return mismatch.masked_sequence_weight(tokens.old_logp, tokens.behavior_logp, **of)


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """TIS for tokens sampled at most `limit` updates ago, 0 for staler ones. AReaL, https://arxiv.org/abs/2505.24298."""

    limit: int
    high: float = 2.0

    @property
    def low(self) -> float:
        """Nothing is cut below."""
        return 0.0

    def __call__(self, tokens: Tokens) -> Float[Array, "B T"]:
        """See `losses.mismatch.staleness_mask`."""
        weight = mismatch.truncated_importance_weight(tokens.old_logp, tokens.behavior_logp, cap=self.high)
        return weight * mismatch.staleness_mask(tokens.age, limit=self.limit)


def scored(logp: Float[Array, "B T"], batch: Mapping[str, Array]) -> Float[Array, "B T"]:
    """pi_old as the trainer scores it before the first update of a rollout; the policy at hand if there is but one."""
    return batch.get("old_logp", lax.stop_gradient(logp))


def sampler(logp: Float[Array, "B T"], batch: Mapping[str, Array]) -> Float[Array, "B T"]:
    """pi_old is what the sampler reported: one ratio for staleness and mismatch, which DeepSeek-V3.2's KL needs."""
    return batch["behavior_logp"]


def interpolated(logp: Float[Array, "B T"], batch: Mapping[str, Array]) -> Float[Array, "B T"]:
    """pi_old between sampler and policy by age, without a forward pass. A-3PO, https://arxiv.org/abs/2512.06547."""
    return mismatch.interpolated_old_logp(logp, batch["behavior_logp"], batch["age"])


def measured(
    trainer_logp: Float[Array, "B T"],
    behavior_logp: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    low: float,
    high: float,
) -> dict[str, Any]:
    """How far sampler and trainer are apart: mean and largest |log trainer - log sampler|, share of ratios outside."""
    gap = mismatch.log_ratio(trainer_logp, behavior_logp)
    ratio, weight = jnp.exp(gap), masked.weight(mask)
    outside = ((ratio < low) | (ratio > high)).astype(jnp.float32)
    return {
        "mismatch": Mean(masked.sum(jnp.abs(gap), mask), weight),
        "mismatch_max": Max(jnp.max(jnp.where(mask != 0, jnp.abs(gap), 0.0), initial=0.0)),
        "mismatch_outside": Mean(masked.sum(outside, mask), weight),
    }
