"""Policy-gradient losses, per token: minimise them to raise the probability of tokens with a positive advantage.

`logp` is the trained policy's log-prob of each sampled token and carries the gradient. `old_logp` is the same weights'
as they stood when the rollout was made, `advantage` is a constant; no gradient flows into either.

What the published recipes are made of:

    PPO          clipped_policy_gradient; advantage.gae, whitened; value.clipped_squared_error; shaping.kl_penalty
    GRPO         clipped_policy_gradient + beta kl.k3; group_normalized; weights masked.per_sequence
    Dr. GRPO     clipped_policy_gradient; group_centered; weights mask, divisor sequences x length budget
    DAPO         clipped_policy_gradient, clip_high > clip_low; group_normalized; weights mask; soft_overlong_penalty
    GSPO         gspo; group_normalized; weights masked.per_sequence
    CISPO        cispo; group_normalized; weights mask
    V3.2         deepseek_v32; group_centered; weights masked.per_sequence
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from . import kl, masked, mismatch


def _log_ratio(logp: Float[Array, "*S"], old_logp: Float[Array, "*S"]) -> Float[Array, "*S"]:
    return logp.astype(jnp.float32) - lax.stop_gradient(old_logp.astype(jnp.float32))


def policy_gradient(logp: Float[Array, "*S"], advantage: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """REINFORCE: -A log pi. Right only for samples of the policy itself."""
    return -lax.stop_gradient(advantage.astype(jnp.float32)) * logp.astype(jnp.float32)


def clipped_policy_gradient(
    logp: Float[Array, "*S"],
    old_logp: Float[Array, "*S"],
    advantage: Float[Array, "*S"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Array, "*S"]:
    """PPO's loss -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) with rho = pi / pi_old.

    PPO, https://arxiv.org/abs/1707.06347, eq. 7. `clip_high` above `clip_low` is DAPO's clip-higher,
    https://arxiv.org/abs/2503.14476, section 3.1.
    """
    ratio = jnp.exp(_log_ratio(logp, old_logp))
    advantage = lax.stop_gradient(advantage.astype(jnp.float32))
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantage)


def is_clipped(
    logp: Float[Array, "*S"],
    old_logp: Float[Array, "*S"],
    advantage: Float[Array, "*S"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Array, "*S"]:
    """1 for each token that `clipped_policy_gradient` gives no gradient because of its clip, else 0.

    `masked.mean` of it is the clipped share, the usual metric.
    """
    ratio = lax.stop_gradient(jnp.exp(_log_ratio(logp, old_logp)))
    above = (advantage > 0) & (ratio > 1.0 + clip_high)
    below = (advantage < 0) & (ratio < 1.0 - clip_low)
    return (above | below).astype(jnp.float32)


def dual_clipped_policy_gradient(
    logp: Float[Array, "*S"],
    old_logp: Float[Array, "*S"],
    advantage: Float[Array, "*S"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
) -> Float[Array, "*S"]:
    """PPO's loss that a bad token cannot raise above -dual_clip A: for A < 0, -max(min(rho A, clip(rho) A), c A).

    A token with A < 0 and rho > dual_clip gets no gradient, where plain PPO's grows with rho without bound.
    https://arxiv.org/abs/1912.09729, eq. 5. Raises ValueError unless dual_clip > 1.
    """
    if dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1, the ratio of a sample that is on policy.")
    loss = clipped_policy_gradient(logp, old_logp, advantage, clip_low=clip_low, clip_high=clip_high)
    advantage = lax.stop_gradient(advantage.astype(jnp.float32))
    return jnp.where(advantage < 0, jnp.minimum(loss, -dual_clip * advantage), loss)


def gspo(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantage: Float[Array, "B T"],
    *,
    mask: Float[Array, "B T"],
    segments: Int[Array, "B T"],
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Float[Array, "B T"]:
    """PPO's loss with one ratio per sequence, s = exp(mean_t log(pi / pi_old)); each token holds its sequence's value.

    A sequence is clipped as a whole, and its tokens share the gradient equally. `advantage` is the sequence's, at each
    token; reduce with weights `masked.per_sequence`. GSPO, https://arxiv.org/abs/2507.18071, eq. 5 and 7.
    """
    mean = masked.segment_mean(_log_ratio(logp, old_logp), mask, segments)
    return clipped_policy_gradient(mean, jnp.zeros_like(mean), advantage, clip_low=clip_low, clip_high=clip_high)


def cispo(
    logp: Float[Array, "*S"],
    old_logp: Float[Array, "*S"],
    advantage: Float[Array, "*S"],
    *,
    lower: float = 0.0,
    upper: float = 5.0,
) -> Float[Array, "*S"]:
    """-sg[clip(rho, lower, upper)] A log pi: the importance weight is clipped, and no token loses its gradient.

    `lower` and `upper` bound rho itself, not its distance from 1. CISPO (MiniMax-M1),
    https://arxiv.org/abs/2506.13585, eq. 4 and 5; upper 5 is ScaleRL's, https://arxiv.org/abs/2510.13786.
    """
    ratio = lax.stop_gradient(jnp.exp(_log_ratio(logp, old_logp)))
    return jnp.clip(ratio, lower, upper) * policy_gradient(logp, advantage)


def deepseek_v32(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantage: Float[Array, "B T"],
    *,
    behavior_logp: Float[Array, "B T"],
    reference_logp: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    segments: Int[Array, "B T"],
    delta: float,
    kl_weight: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Array, "B T"]:
    """DeepSeek-V3.2's GRPO: PPO's loss times the off-policy sequence mask, plus kl_weight (pi / pi_old) k3.

    The mask drops sequences with a negative advantage whose mean of log sampler - log policy exceeds `delta`; it does
    not touch the KL term, whose gradient flows through the ratio too and is unbiased only if `old_logp` belongs to the
    policy that sampled: where sampler and trainer differ, pass `behavior_logp` for it. `advantage` is the sequence's,
    at each token. https://arxiv.org/abs/2512.02556, section 3.1, which publishes neither `delta` nor the clips.
    """
    drift = -masked.segment_mean(mismatch.log_ratio(logp, behavior_logp), mask, segments)
    keep = mismatch.off_policy_sequence_mask(drift, advantage, delta=delta)
    loss = clipped_policy_gradient(logp, old_logp, advantage, clip_low=clip_low, clip_high=clip_high)
    return loss * keep + kl_weight * kl.importance_weighted_k3(logp, old_logp, reference_logp)


def pretraining_mix(
    logp: Float[Array, "*S"],
    *,
    coefficient: float,
    policy_weight: Float[Array, ""],
    pretraining_weight: Float[Array, ""],
) -> Float[Array, "*S"]:
    """PPO-ptx: the NLL of pretraining tokens, scaled so that their mean adds coefficient times itself to the loss.

    Sum it over the pretraining tokens, add the policy loss's sum and divide by `policy_weight`. Both weights are those
    of the *global* batch, so the mix does not depend on micro-batches. InstructGPT, https://arxiv.org/abs/2203.02155,
    eq. 2; coefficient 27.8.
    """
    share = policy_weight / jnp.where(pretraining_weight > 0, pretraining_weight, 1.0)
    return -coefficient * lax.stop_gradient(share.astype(jnp.float32)) * logp.astype(jnp.float32)
