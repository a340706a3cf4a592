"""Estimates of KL(policy || reference) from the sampled tokens alone, one value per token.

With l = log reference - log policy at a token that the policy sampled, k1 and k3 are unbiased estimates of the KL and
k2 has little bias (http://joschu.net/blog/kl-approx.html). What gradient each has is another matter, for sampling
passes none. As a *loss term*, in expectation over samples of the policy:

    k1                     0: useless
    k2                     that of KL(policy || reference)
    k3                     that of KL(reference || policy), the other direction
    importance_weighted_k3 that of KL(policy || reference), off policy too

As a *penalty in the reward*, that is -k as a constant in the advantage:

    k1                     that of KL(policy || reference): the one to use, `shaping.kl_penalty`
    k2                     of no divergence: the mean of k2 times grad log policy
    k3                     that of KL(policy || reference) - KL(reference || policy)
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def _log_ratio(logp: Float[Array, "*S"], reference_logp: Float[Array, "*S"]) -> Float[Array, "*S"]:
    return lax.stop_gradient(reference_logp.astype(jnp.float32)) - logp.astype(jnp.float32)


def k1(logp: Float[Array, "*S"], reference_logp: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """-l. For rewards and metrics; as a loss its expected gradient is 0."""
    return -_log_ratio(logp, reference_logp)


def k2(logp: Float[Array, "*S"], reference_logp: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """l^2 / 2. As a loss on policy it has the gradient of KL(policy || reference)."""
    return 0.5 * jnp.square(_log_ratio(logp, reference_logp))


def k3(logp: Float[Array, "*S"], reference_logp: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """exp(l) - l - 1, never negative: GRPO's penalty. As a loss it has the gradient of KL(reference || policy).

    DeepSeekMath, https://arxiv.org/abs/2402.03300, eq. 4.
    """
    log_ratio = _log_ratio(logp, reference_logp)
    return jnp.expm1(log_ratio) - log_ratio


def importance_weighted_k3(
    logp: Float[Array, "*S"], old_logp: Float[Array, "*S"], reference_logp: Float[Array, "*S"]
) -> Float[Array, "*S"]:
    """(policy / old) * k3, with the gradient flowing through the ratio too: that of KL(policy || reference).

    Unbiased only if `old_logp` belongs to the policy that sampled; where the sampler's probabilities differ from the
    trainer's, pass the sampler's. DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 3.1.
    """
    ratio = jnp.exp(logp.astype(jnp.float32) - lax.stop_gradient(old_logp.astype(jnp.float32)))
    return ratio * k3(logp, reference_logp)
