"""Generalised knowledge distillation: divergences between student and teacher, on the student's samples or on data.

The student's samples and given text are two batches with the same loss: a stage takes the first with probability
lambda. GKD, https://arxiv.org/abs/2306.13649, algorithm 1. `chunked` has the same losses without [S, V] logits.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from . import distill


def jsd(
    student_logits: Float[Array, "*S V"], teacher_logits: Float[Array, "*S V"], *, beta: float = 0.5
) -> Float[Array, "*S"]:
    """beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S, over the whole vocabulary.

    beta 0 is the forward KL(T || S) and beta 1 the reverse KL(S || T), by definition: the formula itself goes to 0 at
    both ends. GKD, https://arxiv.org/abs/2306.13649, eq. 1. Raises ValueError unless 0 <= beta <= 1.
    """
    check_beta(beta)
    if beta == 0.0:
        return distill.forward_kl(student_logits, teacher_logits)
    if beta == 1.0:
        return distill.reverse_kl(student_logits, teacher_logits)
    log_p = jax.nn.log_softmax(student_logits.astype(jnp.float32))
    log_q = jax.nn.log_softmax(lax.stop_gradient(teacher_logits.astype(jnp.float32)))
    return jnp.sum(jsd_term(log_p, log_q, beta=beta), axis=-1)


def check_beta(beta: float) -> None:
    """Raises ValueError unless 0 <= beta <= 1."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta} is the teacher's share of a mixture; give a number from 0 to 1.")


def jsd_term(log_p: Float[Array, "*S"], log_q: Float[Array, "*S"], *, beta: float) -> Float[Array, "*S"]:
    """One token's addend of the divergence from the student's and the teacher's log-probs, for 0 < beta < 1.

    0, with a gradient of 0, where neither can produce the token.
    """
    dead = jnp.isneginf(log_p) & jnp.isneginf(log_q)
    log_p, log_q = (jnp.where(dead, 0.0, x) for x in (log_p, log_q))
    log_m = jnp.logaddexp(jnp.log(beta) + log_q, jnp.log1p(-beta) + log_p)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    student = p * jnp.where(p > 0, log_p - log_m, 0.0)
    teacher = q * jnp.where(q > 0, log_q - log_m, 0.0)
    return jnp.where(dead, 0.0, beta * teacher + (1.0 - beta) * student)
