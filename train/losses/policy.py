"""Policy-gradient losses, per token: minimise them to raise the probability of tokens with a positive advantage.

`logp` is the trained policy's log-prob of each sampled token and carries the gradient. `old_logp` is the same weights'
as they stood when the rollout was made, `advantage` is a constant; no gradient flows into either.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


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
