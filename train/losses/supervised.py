"""Losses of supervised learning, per token."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def nll(logp: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Negative log-likelihood of the target tokens, given their log-probs."""
    return -logp.astype(jnp.float32)


def z_loss(log_z: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Square of the log-normaliser (logsumexp of the logits), which keeps logits from drifting; add it times ~1e-4.

    PaLM, https://arxiv.org/abs/2204.02311, section 5.
    """
    return jnp.square(log_z.astype(jnp.float32))
