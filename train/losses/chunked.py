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

from . import gkd
from .distill import _columns, _merge, _num_chunks, _piece, _Plan, _project, _view

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
    plan = _plan(student_head, teacher_head, chunk, vocab_shards)
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
    plan = _plan(student_head, teacher_head, chunk, vocab_shards)
    term = {0.0: _forward_term, 1.0: _reverse_term}.get(beta) or _jsd_term(beta)
    return _divergence(term, plan, student_hidden, student_head, teacher_hidden, teacher_head)


def _plan(student_head: Array, teacher_head: Array, chunk: int, vocab_shards: int) -> _Plan:
    vocab = student_head.shape[1]
    if teacher_head.shape[1] != vocab:
        raise ValueError(
            f"The student's vocabulary has {vocab} tokens and the teacher's {teacher_head.shape[1]}; a full-vocabulary "
            "divergence needs the same tokenizer and the same padding of both heads."
        )
    if vocab_shards < 1 or vocab % vocab_shards:
        raise ValueError(
            f"vocab_shards={vocab_shards} does not divide the vocabulary of {vocab}; pad the heads or use 1."
        )
    if chunk < 1:
        raise ValueError(f"chunk={chunk} is not a number of vocabulary columns; give at least 1.")
    return _Plan(vocab_shards, vocab // vocab_shards, min(-(-chunk // vocab_shards), vocab // vocab_shards))


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


def _empty(plan: _Plan, hidden: Array) -> tuple[Array, Array]:
    """A running maximum and sum of exponentials per shard, over no columns yet."""
    zeros = jnp.zeros((*hidden.shape[:-1], plan.shards), jnp.float32)
    return zeros - jnp.inf, zeros


def _grow(norm: tuple[Array, Array], logits: Array) -> tuple[Array, Array]:
    """The running maximum and sum with further logits, all of which may be -inf."""
    highest = jnp.maximum(norm[0], jnp.max(logits, axis=-1))
    shift = jnp.where(jnp.isneginf(highest), 0.0, highest)
    return highest, _merge(norm[0], shift, norm[1], jnp.sum(jnp.exp(logits - shift[..., None]), axis=-1))


def _log_z(norm: tuple[Array, Array]) -> Array:
    return jax.nn.logsumexp(norm[0], axis=-1, b=norm[1])


def _both(plan: _Plan, arrays: tuple, index: Array) -> tuple[Array, Array, Array]:
    """Which columns of chunk `index` are new, with the student's and the teacher's logits of all of them."""
    student_hidden, student_view, teacher_hidden, teacher_view = arrays
    start, fresh = _columns(plan, index)
    student = _project(student_hidden, _piece(plan, student_view, start))
    return jnp.broadcast_to(fresh, student.shape), student, _project(teacher_hidden, _piece(plan, teacher_view, start))


def _slope(term: Term, log_p: Array, log_q: Array) -> tuple[Array, Array]:
    """The terms and their derivatives with respect to log p."""
    return jax.jvp(lambda x: term(x, log_q), (log_p,), (jnp.ones_like(log_p),))


def _walk_back(plan: _Plan, hidden: Array, head: Array, d_logits_of: Callable[[Array, Array, Array], Array]):
    """Gradients of hidden and head from those of the logits, made chunk by chunk: d_logits_of(index, start, logits)."""
    view = _view(plan, head)
    rows = tuple(range(hidden.ndim - 1))

    def step(carry, index):
        d_hidden, d_head = carry
        start, fresh = _columns(plan, index)
        piece = _piece(plan, view, start)
        logits = _project(hidden, piece)
        d_logits = jnp.where(jnp.broadcast_to(fresh, logits.shape), d_logits_of(index, start, logits), 0.0)
        d_hidden += jnp.einsum("...kc,dkc->...kd", d_logits, piece, preferred_element_type=jnp.float32)
        d_piece = jnp.tensordot(hidden, d_logits, axes=(rows, rows), preferred_element_type=jnp.float32)
        old = _piece(plan, d_head, start)
        d_piece = jnp.where(jnp.broadcast_to(fresh, d_piece.shape), d_piece.astype(d_head.dtype), old)
        return (d_hidden, lax.dynamic_update_slice_in_dim(d_head, d_piece, start, axis=2)), None

    d_hidden = jnp.zeros((*hidden.shape[:-1], plan.shards, hidden.shape[-1]), jnp.float32)
    (d_hidden, d_head), _ = lax.scan(step, (d_hidden, jnp.zeros_like(view)), jnp.arange(_num_chunks(plan)))
    return jnp.sum(d_hidden, axis=-2).astype(hidden.dtype), d_head.reshape(head.shape)


def _sums(term: Term, plan: _Plan, student_hidden, student_head, teacher_hidden, teacher_head):
    """The divergence, the sum of its terms' derivatives with respect to log p, and both log-normalisers."""
    arrays = student_hidden, _view(plan, student_head), teacher_hidden, _view(plan, teacher_head)

    def normalise(norms, index):
        fresh, student, teacher = _both(plan, arrays, index)
        student, teacher = (jnp.where(fresh, x, -jnp.inf) for x in (student, teacher))
        return (_grow(norms[0], student), _grow(norms[1], teacher)), None

    indices = jnp.arange(_num_chunks(plan))
    norms, _ = lax.scan(normalise, (_empty(plan, student_hidden),) * 2, indices)
    student_z, teacher_z = map(_log_z, norms)

    def add(carry, index):
        fresh, student, teacher = _both(plan, arrays, index)
        terms = _slope(term, student - student_z[..., None, None], teacher - teacher_z[..., None, None])
        return tuple(x + jnp.sum(jnp.where(fresh, y, 0.0), axis=-1) for x, y in zip(carry, terms, strict=True)), None

    zeros = jnp.zeros((*student_z.shape, plan.shards), jnp.float32)
    (value, slope), _ = lax.scan(add, (zeros, zeros), indices)
    return jnp.sum(value, axis=-1), jnp.sum(slope, axis=-1), student_z, teacher_z


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergence(term: Term, plan: _Plan, student_hidden, student_head, teacher_hidden, teacher_head):
    return _sums(term, plan, student_hidden, student_head, teacher_hidden, teacher_head)[0]


def _divergence_fwd(term, plan, *arrays):
    value, *rest = _sums(term, plan, *arrays)
    return value, (arrays, rest)


def _divergence_bwd(term, plan, saved, cotangent):
    """With f_v the term of token v: d / d logit_v = f_v' - p_v sum_u f_u', the derivatives taken by log p."""
    (student_hidden, student_head, teacher_hidden, teacher_head), per_row = saved
    slope_sum, student_z, teacher_z, cotangent = (x[..., None, None] for x in (*per_row, cotangent))
    teacher_view = _view(plan, teacher_head)

    def d_logits_of(index, start, student):
        log_p = student - student_z
        log_q = _project(teacher_hidden, _piece(plan, teacher_view, start)) - teacher_z
        return (_slope(term, log_p, log_q)[1] - jnp.exp(log_p) * slope_sum) * cotangent

    return *_walk_back(plan, student_hidden, student_head, d_logits_of), None, None


_divergence.defvjp(_divergence_fwd, _divergence_bwd)
