"""Corrections for a sampler whose probabilities differ from the trainer's, by staleness or by numerics.

`behavior_logp` is what the sampler reported for each token, `old_logp` the trainer's log-prob with the weights of the
rollout. The weights multiply a loss per token and are constants: no gradient flows through them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from . import masked


def log_ratio(logp: Float[Array, "*S"], behavior_logp: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """log trainer - log sampler of each token, a constant."""
    return lax.stop_gradient(logp.astype(jnp.float32) - behavior_logp.astype(jnp.float32))


def truncated_importance_weight(
    old_logp: Float[Array, "*S"], behavior_logp: Float[Array, "*S"], *, cap: float = 2.0
) -> Float[Array, "*S"]:
    """TIS: min(pi_old / mu, cap).

    Olmo 3, https://arxiv.org/abs/2512.13961, eq. 1; first in https://fengyao.notion.site/off-policy-rl.
    """
    return jnp.minimum(jnp.exp(log_ratio(old_logp, behavior_logp)), cap)


def masked_importance_weight(
    old_logp: Float[Array, "*S"], behavior_logp: Float[Array, "*S"], *, low: float = 0.5, high: float = 2.0
) -> Float[Array, "*S"]:
    """IcePop: pi_old / mu where it lies in [low, high], else 0: a token too far off is dropped.

    MiMo-V2-Flash, https://arxiv.org/abs/2601.02780, eq. 8, has the same form with the current policy for pi_old.
    """
    ratio = jnp.exp(log_ratio(old_logp, behavior_logp))
    return jnp.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def truncated_sequence_weight(
    old_logp: Float[Array, "B T"],
    behavior_logp: Float[Array, "B T"],
    *,
    mask: Float[Array, "B T"],
    segments: Int[Array, "B T"],
    cap: float = 2.0,
) -> Float[Array, "B T"]:
    """min(prod_t pi_old / mu, cap): one weight per sequence, the ratio of whole answers, given to each of its tokens.

    Without a cap it makes the gradient unbiased, which a weight per token does not; its variance grows with the length.
    https://fengyao.notion.site/off-policy-rl.
    """
    total = masked.segment_sum(log_ratio(old_logp, behavior_logp), mask, segments)
    return jnp.exp(jnp.minimum(total, jnp.log(jnp.asarray(cap, jnp.float32))))


def masked_sequence_weight(
    old_logp: Float[Array, "B T"],
    behavior_logp: Float[Array, "B T"],
    *,
    mask: Float[Array, "B T"],
    segments: Int[Array, "B T"],
    low: float = 0.5,
    high: float = 2.0,
) -> Float[Array, "B T"]:
    """1 for sequences whose geometric-mean ratio exp(mean_t log(pi_old / mu)) lies in [low, high], else 0.

    A trust region on sequences that does not depend on their length; multiply it with a weight per token.
    """
    ratio = jnp.exp(masked.segment_mean(log_ratio(old_logp, behavior_logp), mask, segments))
    return ((ratio >= low) & (ratio <= high)).astype(jnp.float32)


def staleness_mask(age: Int[Array, "*S"], *, limit: int) -> Float[Array, "*S"]:
    """1 for tokens sampled by a policy at most `limit` updates old, else 0; `age` may differ within an answer.

    An answer that was continued after a weight update has tokens of several ages. AReaL's staleness bound,
    https://arxiv.org/abs/2505.24298, section 5.1.
    """
    return (age <= limit).astype(jnp.float32)


def interpolated_old_logp(
    logp: Float[Array, "*S"], behavior_logp: Float[Array, "*S"], age: Int[Array, "*S"]
) -> Float[Array, "*S"]:
    """A stand-in for `old_logp` without a forward pass: log mu / age + (1 - 1 / age) log pi, and log pi at age 0.

    The staler the sample, the nearer the proximal policy is to the current one and the looser the clip. A constant.
    Use it both as `old_logp` of a clipped loss and in the truncated weight pi_old / mu: staleness-aware correction.
    A-3PO, https://arxiv.org/abs/2512.06547, section 3.
    """
    share = jnp.where(age > 0, 1.0 / jnp.maximum(age, 1).astype(jnp.float32), 0.0)
    current = lax.stop_gradient(logp.astype(jnp.float32))
    return current + share * (lax.stop_gradient(behavior_logp.astype(jnp.float32)) - current)


def kept_logp(logits: Float[Array, "*S V"], targets: Int[Array, "*S"], kept: Bool[Array, "*S V"]) -> Float[Array, "*S"]:
    """Log-prob of the sampled tokens among the tokens that top-k or top-p kept: the sampler's own action space.

    Use it for the trained and the old policy alike; -inf for a target that was not kept. Tokens that were not kept
    get no gradient. Keep Sampling Mask of DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 3.1.
    """
    allowed = jnp.where(kept, logits.astype(jnp.float32), -jnp.inf)
    at_target = jnp.take_along_axis(allowed, targets[..., None], axis=-1)[..., 0]
    return at_target - jax.nn.logsumexp(allowed, axis=-1)


def off_policy_sequence_mask(
    drift: Float[Array, "*S"], advantage: Float[Array, "*S"], *, delta: float
) -> Float[Array, "*S"]:
    """V3.2: 0 for a sequence with a negative advantage that the policy has moved away from, else 1.

    `drift` is the sequence's mean of log sampler - log policy, that is `-masked.segment_mean(log_ratio(logp,
    behavior_logp), mask, segments)` for packed rows or `-masked.sequence_mean(...)` for one sequence a row. The mask
    multiplies the policy-gradient term and not the KL term. DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section
    3.1, which does not publish `delta`: look at the distribution of `drift` first.
    """
    dropped = (advantage < 0) & (drift > delta)
    return 1.0 - lax.stop_gradient(dropped.astype(jnp.float32))


def metrics(
    ratio: Float[Array, "*S"], mask: Float[Array, "*S"], *, low: float, high: float
) -> dict[str, Float[Array, ""]]:
    """How far trainer and sampler are apart, from their `log_ratio`: mean, largest absolute value, share out of range.

    `outside_share` counts the tokens whose probability ratio is below `low` or above `high`; for TIS, `low` is 0.
    """
    probability_ratio = jnp.exp(ratio)
    outside = ((probability_ratio < low) | (probability_ratio > high)).astype(jnp.float32)
    return {
        "log_ratio_mean": masked.mean(ratio, mask),
        "log_ratio_max": jnp.max(jnp.where(mask != 0, jnp.abs(ratio), 0.0), initial=0.0),
        "outside_share": masked.mean(outside, mask),
    }
