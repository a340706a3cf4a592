"""Distillation over the whole vocabulary, from last hidden states and heads, without ever holding an [S, V] array.

The companions of `distill.chunked_reverse_kl`, with its arguments and its way to walk the vocabulary: `chunk` columns
at a time, each of `vocab_shards` devices through its own columns. A divergence is a sum over the vocabulary of a term
of (log p, log q): one walk finds the normalisers, a second one sums the terms, and the backward pass makes a third,
so memory is a few [S, chunk] arrays. Logits and sums are float32; gradients have the inputs' dtypes; the teacher is a
constant.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from . import gkd, vocabulary

Term = Callable[[Array, Array], Array]


def forward_kl(
    student_hidden: Float[Array, "*S D"],
    student_head: Float[Array, "D V"],
    teacher_hidden: Float[Array, "*S E"],
    teacher_head: Float[Array, "E teacher_V"],
    *,
    chunk: int,
    vocab_shards: int = 1,
) -> Float[Array, "*S"]:
    """KL(teacher || student); its gradient with respect to the student's logits is p - q.

    Equals `distill.forward_kl` of the logits. Raises ValueError as `distill.chunked_reverse_kl` does.
    """
    plan = vocabulary.make_plan(student_head, teacher_head, chunk, vocab_shards)
    return _divergence(_forward_term, plan, student_hidden, student_head, teacher_hidden, teacher_head)


def jsd(
    student_hidden: Float[Array, "*S D"],
    student_head: Float[Array, "D V"],
    teacher_hidden: Float[Array, "*S E"],
    teacher_head: Float[Array, "E teacher_V"],
    *,
    chunk: int,
    beta: float = 0.5,
    vocab_shards: int = 1,
) -> Float[Array, "*S"]:
    """GKD's generalised Jensen-Shannon divergence; equals `gkd.jsd` of the logits, 0 and 1 included.

    Raises ValueError as `distill.chunked_reverse_kl` does, and unless 0 <= beta <= 1.
    """
    gkd.check_beta(beta)
    plan = vocabulary.make_plan(student_head, teacher_head, chunk, vocab_shards)
    term = {0.0: _forward_term, 1.0: _reverse_term}.get(beta) or _jsd_term(beta)
    return _divergence(term, plan, student_hidden, student_head, teacher_hidden, teacher_head)


def _forward_term(log_p: Array, log_q: Array) -> Array:
    q = jnp.exp(log_q)
    return q * jnp.where(q > 0, log_q - log_p, 0.0)


def _reverse_term(log_p: Array, log_q: Array) -> Array:
    p = jnp.exp(log_p)
    return p * jnp.where(p > 0, log_p - log_q, 0.0)


@lru_cache
def _jsd_term(beta: float) -> Term:
    """The same function object for the same beta, so that jit's cache knows it again."""
    return partial(gkd.jsd_term, beta=beta)


def _both(plan: vocabulary.Plan, arrays: tuple, index: Array) -> tuple[Array, Array, Array]:
    """Which columns of chunk `index` are new, with the student's and the teacher's logits of all of them."""
    student_hidden, student_view, teacher_hidden, teacher_view = arrays
    start, fresh = vocabulary.columns(plan, index)
    student = vocabulary.project(student_hidden, vocabulary.take(plan, student_view, start))
    teacher = vocabulary.project(teacher_hidden, vocabulary.take(plan, teacher_view, start))
    return jnp.broadcast_to(fresh, student.shape), student, teacher


def _slope(term: Term, log_p: Array, log_q: Array) -> tuple[Array, Array]:
    """The terms and their derivatives with respect to log p."""
    return jax.jvp(lambda x: term(x, log_q), (log_p,), (jnp.ones_like(log_p),))


def _sums(term: Term, plan: vocabulary.Plan, student_hidden, student_head, teacher_hidden, teacher_head):
    """The divergence, the sum of its terms' derivatives with respect to log p, and both log-normalisers."""
    arrays = student_hidden, vocabulary.split(plan, student_head), teacher_hidden, vocabulary.split(plan, teacher_head)

    def normalise(norms, index):
        fresh, student, teacher = _both(plan, arrays, index)
        student, teacher = (jnp.where(fresh, x, -jnp.inf) for x in (student, teacher))
        return (vocabulary.grow(norms[0], student), vocabulary.grow(norms[1], teacher)), None

    indices = jnp.arange(vocabulary.num_chunks(plan))
    norms, _ = lax.scan(normalise, (vocabulary.empty(plan, student_hidden),) * 2, indices)
    student_z, teacher_z = map(vocabulary.log_z, norms)

    def add(carry, index):
        fresh, student, teacher = _both(plan, arrays, index)
        terms = _slope(term, student - student_z[..., None, None], teacher - teacher_z[..., None, None])
        return tuple(x + jnp.sum(jnp.where(fresh, y, 0.0), axis=-1) for x, y in zip(carry, terms, strict=True)), None

    zeros = jnp.zeros((*student_z.shape, plan.shards), jnp.float32)
    (value, slope), _ = lax.scan(add, (zeros, zeros), indices)
    return jnp.sum(value, axis=-1), jnp.sum(slope, axis=-1), student_z, teacher_z


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergence(term: Term, plan: vocabulary.Plan, student_hidden, student_head, teacher_hidden, teacher_head):
    return _sums(term, plan, student_hidden, student_head, teacher_hidden, teacher_head)[0]


def _divergence_fwd(term, plan, *arrays):
    value, *rest = _sums(term, plan, *arrays)
    return value, (arrays, rest)


def _divergence_bwd(term, plan, saved, cotangent):
    """With f_v the term of token v: d / d logit_v = f_v' - p_v sum_u f_u', the derivatives taken by log p."""
    (student_hidden, student_head, teacher_hidden, teacher_head), per_row = saved
    slope_sum, student_z, teacher_z, cotangent = (x[..., None, None] for x in (*per_row, cotangent))
    teacher_view = vocabulary.split(plan, teacher_head)

    def d_logits_of(index, start, student):
        log_p = student - student_z
        log_q = vocabulary.project(teacher_hidden, vocabulary.take(plan, teacher_view, start)) - teacher_z
        return (_slope(term, log_p, log_q)[1] - jnp.exp(log_p) * slope_sum) * cotangent

    return *vocabulary.walk_back(plan, student_hidden, student_head, d_logits_of), None, None


_divergence.defvjp(_divergence_fwd, _divergence_bwd)
