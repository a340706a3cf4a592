"""What a policy-gradient step minimises per token, apart from KL, corrections and normalisers: one small class each.

A surrogate is called with `Tokens` and gives [B, T] values; `metrics` says what it did. `objective` puts them together.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .losses import masked, mismatch, policy
from .step import Max, Mean


class Tokens(NamedTuple):
    """What the parts of an objective see of a batch. Only `logp`, the trained policy's, carries a gradient.

    `old_logp` is the policy that the ratio is taken to, `behavior_logp` what the sampler reported, `age` how many
    updates old the weights were that sampled.
    """

    logp: Float[Array, "B T"]
    old_logp: Float[Array, "B T"]
    behavior_logp: Float[Array, "B T"]
    advantage: Float[Array, "B T"]
    mask: Float[Array, "B T"]
    segments: Int[Array, "B T"]
    age: Int[Array, "B T"]


@runtime_checkable
class Surrogate(Protocol):
    """A loss per token, and metrics of it."""

    def __call__(self, tokens: Tokens) -> Float[Array, "B T"]: ...

    def metrics(self, tokens: Tokens) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """-A log pi: for samples of the policy itself. RLOO, https://arxiv.org/abs/2402.14740, has no more than this."""

    def __call__(self, tokens: Tokens) -> Float[Array, "B T"]:
        """See `losses.policy.policy_gradient`."""
        return policy.policy_gradient(tokens.logp, tokens.advantage)

    def metrics(self, tokens: Tokens) -> dict[str, Any]:
        """Nothing is ever clipped."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """PPO's clipped ratio; `high` above `low` is DAPO's clip-higher."""

    low: float = 0.2
    high: float = 0.2

    def __call__(self, tokens: Tokens) -> Float[Array, "B T"]:
        """See `losses.policy.clipped_policy_gradient`."""
        clip = {"clip_low": self.low, "clip_high": self.high}
        return policy.clipped_policy_gradient(tokens.logp, tokens.old_logp, tokens.advantage, **clip)

    def metrics(self, tokens: Tokens) -> dict[str, Any]:
        """The share of tokens without a gradient because of the clip."""
        clip = {"clip_low": self.low, "clip_high": self.high}
        return _clipped(policy.is_clipped(tokens.logp, tokens.old_logp, tokens.advantage, **clip), tokens)


@dataclass(frozen=True, kw_only=True)
class DualClip:
    """PPO's clipped ratio, and for bad tokens a bound on the other side: no gradient above the ratio `bound`."""

    low: float = 0.2
    high: float = 0.2
    bound: float = 3.0

    def __post_init__(self) -> None:
        if self.bound <= 1:
            raise ValueError(f"a dual clip at {self.bound} would silence samples that are on policy: use more than 1")

    def __call__(self, tokens: Tokens) -> Float[Array, "B T"]:
        """See `losses.policy.dual_clipped_policy_gradient`."""
        clip = {"clip_low": self.low, "clip_high": self.high, "dual_clip": self.bound}
        return policy.dual_clipped_policy_gradient(tokens.logp, tokens.old_logp, tokens.advantage, **clip)

    def metrics(self, tokens: Tokens) -> dict[str, Any]:
        """The share of tokens without a gradient, on either side."""
        clip = {"clip_low": self.low, "clip_high": self.high}
        inner = policy.is_clipped(tokens.logp, tokens.old_logp, tokens.advantage, **clip)
        outer = (tokens.advantage < 0) & (_ratio(tokens) > self.bound)
        return _clipped(jnp.maximum(inner, outer.astype(jnp.float32)), tokens)


@dataclass(frozen=True, kw_only=True)
class SequenceClip:
    """GSPO: one ratio per answer, the geometric mean of its tokens', clipped as a whole."""

    low: float = 3e-4
    high: float = 4e-4

    def __call__(self, tokens: Tokens) -> Float[Array, "B T"]:
        """See `losses.policy.gspo`."""
        of = {"mask": tokens.mask, "segments": tokens.segments, "clip_low": self.low, "clip_high": self.high}
        return policy.gspo(tokens.logp, tokens.old_logp, tokens.advantage, **of)

    def metrics(self, tokens: Tokens) -> dict[str, Any]:
        """The share of tokens whose answer is clipped."""
        mean = masked.segment_mean(mismatch.log_ratio(tokens.logp, tokens.old_logp), tokens.mask, tokens.segments)
        clip = {"clip_low": self.low, "clip_high": self.high}
        return _clipped(policy.is_clipped(mean, jnp.zeros_like(mean), tokens.advantage, **clip), tokens)


@dataclass(frozen=True, kw_only=True)
class Cispo:
    """CISPO: the importance weight is clipped to [`lower`, `upper`], and no token loses its gradient."""

    lower: float = 0.0
    upper: float = 5.0

    def __call__(self, tokens: Tokens) -> Float[Array, "B T"]:
        """See `losses.policy.cispo`."""
        bounds = {"lower": self.lower, "upper": self.upper}
        return policy.cispo(tokens.logp, tokens.old_logp, tokens.advantage, **bounds)

    def metrics(self, tokens: Tokens) -> dict[str, Any]:
        """The share of tokens whose weight is clipped."""
        ratio = _ratio(tokens)
        return _clipped(((ratio < self.lower) | (ratio > self.upper)).astype(jnp.float32), tokens)


@dataclass(frozen=True, kw_only=True)
class DropDrifted:
    """DeepSeek-V3.2's off-policy sequence mask over another surrogate: bad answers that the policy left are dropped.

    An answer is dropped if its advantage is negative and the mean over its tokens of log sampler - log policy is above
    `delta`, which is not published: look at `drift` and `drift_max` in the log before you set it.
    https://arxiv.org/abs/2512.02556, section 3.1.
    """

    delta: float
    surrogate: Surrogate = field(default_factory=Clip)

    def __call__(self, tokens: Tokens) -> Float[Array, "B T"]:
        """See `losses.mismatch.off_policy_sequence_mask`."""
        keep = mismatch.off_policy_sequence_mask(self._drift(tokens), tokens.advantage, delta=self.delta)
        return keep * self.surrogate(tokens)

    def metrics(self, tokens: Tokens) -> dict[str, Any]:
        """The inner surrogate's, the share of dropped tokens, and mean and maximum of the drift."""
        drift = self._drift(tokens)
        keep = mismatch.off_policy_sequence_mask(drift, tokens.advantage, delta=self.delta)
        largest = jnp.max(jnp.where(tokens.mask != 0, drift, 0.0), initial=0.0)
        own = {"dropped": _mean(1.0 - keep, tokens), "drift": _mean(drift, tokens), "drift_max": Max(largest)}
        return {**self.surrogate.metrics(tokens), **own}

    def _drift(self, tokens: Tokens) -> Float[Array, "B T"]:
        ratio = mismatch.log_ratio(tokens.logp, tokens.behavior_logp)
        return -masked.segment_mean(ratio, tokens.mask, tokens.segments)


def _ratio(tokens: Tokens) -> Float[Array, "B T"]:
    return lax.stop_gradient(jnp.exp(tokens.logp.astype(jnp.float32) - tokens.old_logp.astype(jnp.float32)))


def _mean(values: Float[Array, "B T"], tokens: Tokens) -> Mean:
    return Mean(masked.sum(lax.stop_gradient(values), tokens.mask), masked.weight(tokens.mask))


def _clipped(share: Float[Array, "B T"], tokens: Tokens) -> dict[str, Any]:
    return {"clipped": _mean(share, tokens)}
