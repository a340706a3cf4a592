"""Losses of the critic, per token."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def squared_error(values: Float[Array, "*S"], returns: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """(V - return)^2 / 2; the return, `advantage.gae` + the rollout's values, is a constant."""
    return 0.5 * jnp.square(values.astype(jnp.float32) - lax.stop_gradient(returns.astype(jnp.float32)))


def clipped_squared_error(
    values: Float[Array, "*S"], old_values: Float[Array, "*S"], returns: Float[Array, "*S"], *, clip: float = 0.2
) -> Float[Array, "*S"]:
    """The larger of the squared errors of V and of V held within `clip` of the rollout's value, halved.

    A value that has moved further than `clip` towards the return gets no gradient; one that has moved away does. PPO's
    reference implementation, https://arxiv.org/abs/2005.12729, section 3.
    """
    values, old_values = values.astype(jnp.float32), lax.stop_gradient(old_values.astype(jnp.float32))
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    return jnp.maximum(squared_error(values, returns), squared_error(near, returns))
