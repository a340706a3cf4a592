"""Distillation from the teacher's (or the student's) k likeliest tokens: far less to store than whole distributions.

Inputs are log-probs of the k tokens under the *full* softmax of each model, not renormalised: `chunked_logp.logp` makes
them from hidden states, with the student's gradient. The teacher is a constant everywhere.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def _tail(logp: Float[Array, "*S K"]) -> Float[Array, "*S"]:
    """Probability of all tokens that are not among the k; what float32 cannot tell from 0 counts as its epsilon.

    Without that floor a sum that rounds to 1 would make the rest infinitely surprising; at it the gradient is 0.
    """
    return jnp.maximum(1.0 - jnp.sum(jnp.exp(logp), axis=-1), jnp.finfo(jnp.float32).eps)


def _with_tail(logp: Float[Array, "*S K"]) -> Float[Array, "*S K1"]:
    logp = logp.astype(jnp.float32)
    return jnp.concatenate([logp, jnp.log(_tail(logp))[..., None]], axis=-1)


def _kl(log_p: Array, log_q: Array) -> Array:
    p = jnp.exp(log_p)
    return jnp.sum(p * jnp.where(p > 0, log_p - log_q, 0.0), axis=-1)


def reverse_kl(student_logp: Float[Array, "*S K"], teacher_logp: Float[Array, "*S K"]) -> Float[Array, "*S"]:
    """KL(student || teacher) over the k tokens and one bucket for all the rest; 0 only where they agree on all k + 1.

    Never negative and never above the full-vocabulary KL: merging tokens into a bucket can only lose information.
    """
    return _kl(_with_tail(student_logp), lax.stop_gradient(_with_tail(teacher_logp)))


def forward_kl(student_logp: Float[Array, "*S K"], teacher_logp: Float[Array, "*S K"]) -> Float[Array, "*S"]:
    """KL(teacher || student) over the k tokens and one bucket for all the rest; 0 only where they agree on all."""
    return _kl(lax.stop_gradient(_with_tail(teacher_logp)), _with_tail(student_logp))


def generalized_reverse_kl(
    student_logp: Float[Array, "*S K"], teacher_logp: Float[Array, "*S K"]
) -> Float[Array, "*S"]:
    """sum over the k tokens of p log(p / q) - p + q, without a bucket for the rest.

    Each term is >= 0, and its gradient log(p / q) grad p is 0 where p = q on the k tokens whatever the others do. The
    plain sum of p log(p / q) has neither property. MOPD, https://arxiv.org/abs/2606.30406.
    """
    log_p = student_logp.astype(jnp.float32)
    log_q = lax.stop_gradient(teacher_logp.astype(jnp.float32))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return jnp.sum(p * jnp.where(p > 0, log_p - log_q, 0.0) - p + q, axis=-1)
