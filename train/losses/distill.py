"""Distillation losses, per token: the student learns the teacher's distribution on its own samples or on given text.

Two families. From the *sampled token* alone (`sampled_token_advantage`, then any policy gradient or `mopd`): cheap, and
its expectation over the sampled token is the exact gradient of the reverse KL. Over the *full vocabulary*
(`reverse_kl`, `forward_kl`, `chunked_reverse_kl`): no sampling noise, but needs the teacher's logits or last hidden
states. The teacher is a constant everywhere.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from . import mismatch


def sampled_token_advantage(teacher_logp: Float[Array, "*S"], student_logp: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """log teacher - log student of the sampled tokens, a constant.

    MiMo-V2-Flash, https://arxiv.org/abs/2601.02780, section 4. Its eq. 9 adds an outcome reward: `+ alpha * advantage`.
    """
    return lax.stop_gradient(teacher_logp.astype(jnp.float32) - student_logp.astype(jnp.float32))


def clip_advantage(advantage: Float[Array, "*S"], *, limit: float) -> Float[Array, "*S"]:
    """The advantage held within [-limit, limit], so that one token the teacher finds absurd does not rule the batch."""
    return jnp.clip(advantage, -limit, limit)


def mopd(
    logp: Float[Array, "*S"],
    behavior_logp: Float[Array, "*S"],
    advantage: Float[Array, "*S"],
    *,
    low: float = 0.5,
    high: float = 2.0,
) -> Float[Array, "*S"]:
    """Multi-teacher on-policy distillation: -w A log pi with w = pi / mu where it lies in [low, high], else 0.

    w is the *current* policy over the sampler mu, a constant. The advantage is `sampled_token_advantage` from the
    teacher of the sample's domain, which may have an outcome advantage added. Reduce it by `masked.per_sequence`
    weights. MiMo-V2-Flash, https://arxiv.org/abs/2601.02780, eq. 7 and 8; [low, high] is not published there.
    """
    weight = mismatch.masked_importance_weight(logp, behavior_logp, low=low, high=high)
    return -weight * lax.stop_gradient(advantage.astype(jnp.float32)) * logp.astype(jnp.float32)


def _kl(p_logits: Float[Array, "*S V"], q_logits: Float[Array, "*S V"]) -> Float[Array, "*S"]:
    log_p = jax.nn.log_softmax(p_logits.astype(jnp.float32))
    log_q = jax.nn.log_softmax(q_logits.astype(jnp.float32))
    p = jnp.exp(log_p)
    return jnp.sum(p * jnp.where(p > 0, log_p - log_q, 0.0), axis=-1)


def reverse_kl(student_logits: Float[Array, "*S V"], teacher_logits: Float[Array, "*S V"]) -> Float[Array, "*S"]:
    """KL(student || teacher) over the whole vocabulary. GKD with beta 1, https://arxiv.org/abs/2306.13649."""
    return _kl(student_logits, lax.stop_gradient(teacher_logits))


def forward_kl(student_logits: Float[Array, "*S V"], teacher_logits: Float[Array, "*S V"]) -> Float[Array, "*S"]:
    """KL(teacher || student) over the whole vocabulary. GKD with beta 0, https://arxiv.org/abs/2306.13649."""
    return _kl(lax.stop_gradient(teacher_logits), student_logits)


def chunked_reverse_kl(
    student_hidden: Float[Array, "*S D"],
    student_head: Float[Array, "D V"],
    teacher_hidden: Float[Array, "*S E"],
    teacher_head: Float[Array, "E teacher_V"],
    *,
    chunk: int,
    vocab_shards: int = 1,
) -> Float[Array, "*S"]:
    """KL(student || teacher) from last hidden states and heads, without ever holding an [S, V] array.

    Equals `reverse_kl(student_hidden @ student_head, teacher_hidden @ teacher_head)` in value and gradient. It walks
    the vocabulary `chunk` columns at a time, once forwards and once more backwards, so memory is a few [S, chunk]
    arrays. Logits and sums are float32 whatever the inputs are; gradients have the inputs' dtypes. Only the student
    gets them: the teacher is a constant. On accelerators the matmuls follow `jax_default_matmul_precision`.

    Give `vocab_shards` the number of devices that the heads' vocabulary axis is split over. Each then walks its own
    columns and the partial results meet once at the end; with 1, every chunk is fetched from the device that has it.

    The teacher's hidden states are what DeepSeek-V4 stores, https://arxiv.org/abs/2606.19348, section 5.2.2.
    Raises ValueError if the heads' vocabularies differ, `chunk` < 1, or `vocab_shards` does not divide the vocabulary.
    """
    vocab = student_head.shape[1]
    if teacher_head.shape[1] != vocab:
        raise ValueError(
            f"The student's vocabulary has {vocab} tokens and the teacher's {teacher_head.shape[1]}; a full-vocabulary "
            "KL needs the same tokenizer and the same padding of both heads."
        )
    if vocab_shards < 1 or vocab % vocab_shards:
        raise ValueError(
            f"vocab_shards={vocab_shards} does not divide the vocabulary of {vocab}; pad the heads or use 1."
        )
    if chunk < 1:
        raise ValueError(f"chunk={chunk} is not a number of vocabulary columns; give at least 1.")
    plan = _Plan(vocab_shards, vocab // vocab_shards, min(-(-chunk // vocab_shards), vocab // vocab_shards))
    return _chunked_reverse_kl(plan, student_hidden, student_head, teacher_hidden, teacher_head)


class _Plan(NamedTuple):
    """How the vocabulary is walked: seen as [shards, per_shard], `width` columns of every shard at a time."""

    shards: int
    per_shard: int
    width: int


class _Running(NamedTuple):
    """Sums over the columns seen so far, each [*S, shards]; those of exp are relative to the maximum."""

    student_max: Array
    student_sum: Array  # of exp(s - max)
    gap_sum: Array  # of exp(s - max) * (s - t)
    teacher_max: Array
    teacher_sum: Array


def _columns(plan: _Plan, index: Array) -> tuple[Array, Bool[Array, " C"]]:
    """First column of chunk `index`, and which of its columns are new: the last chunk is moved back to fit."""
    start = jnp.minimum(index * plan.width, plan.per_shard - plan.width)
    return start, start + jnp.arange(plan.width) >= index * plan.width


def _view(plan: _Plan, head: Array) -> Array:
    return head.reshape(head.shape[0], plan.shards, plan.per_shard)


def _piece(plan: _Plan, view: Array, start: Array) -> Array:
    return lax.dynamic_slice_in_dim(view, start, plan.width, axis=2)


def _project(hidden: Array, piece: Array) -> Array:
    return jnp.tensordot(hidden, piece.astype(hidden.dtype), axes=1, preferred_element_type=jnp.float32)


def _num_chunks(plan: _Plan) -> int:
    return -(-plan.per_shard // plan.width)


def _merge(old_max: Array, new_max: Array, total: Array, added: Array) -> Array:
    return total * jnp.exp(old_max - new_max) + added


def _forward(plan, student_hidden, student_head, teacher_hidden, teacher_head):
    student_view, teacher_view = _view(plan, student_head), _view(plan, teacher_head)

    def step(run: _Running, index):
        start, fresh = _columns(plan, index)
        student = _project(student_hidden, _piece(plan, student_view, start))
        teacher = _project(teacher_hidden, _piece(plan, teacher_view, start))
        fresh = jnp.broadcast_to(fresh, student.shape)
        gap = student - teacher
        student = jnp.where(fresh, student, -jnp.inf)
        teacher = jnp.where(fresh, teacher, -jnp.inf)
        student_max = jnp.maximum(run.student_max, jnp.max(student, axis=-1))
        teacher_max = jnp.maximum(run.teacher_max, jnp.max(teacher, axis=-1))
        p = jnp.exp(student - student_max[..., None])
        q = jnp.exp(teacher - teacher_max[..., None])
        return _Running(
            student_max,
            _merge(run.student_max, student_max, run.student_sum, jnp.sum(p, axis=-1)),
            _merge(run.student_max, student_max, run.gap_sum, jnp.sum(p * gap, axis=-1)),
            teacher_max,
            _merge(run.teacher_max, teacher_max, run.teacher_sum, jnp.sum(q, axis=-1)),
        ), None

    zeros = jnp.zeros((*student_hidden.shape[:-1], plan.shards), jnp.float32)
    start = _Running(zeros - jnp.inf, zeros, zeros, zeros - jnp.inf, zeros)
    run, _ = lax.scan(step, start, jnp.arange(_num_chunks(plan)))
    student_max = jnp.max(run.student_max, axis=-1, keepdims=True)
    rescale = jnp.exp(run.student_max - student_max)
    student_sum = jnp.sum(run.student_sum * rescale, axis=-1)
    student_log_z = student_max[..., 0] + jnp.log(student_sum)
    teacher_log_z = jax.nn.logsumexp(run.teacher_max, axis=-1, b=run.teacher_sum)
    kl = jnp.sum(run.gap_sum * rescale, axis=-1) / student_sum - (student_log_z - teacher_log_z)
    return kl, student_log_z, teacher_log_z


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_reverse_kl(plan, student_hidden, student_head, teacher_hidden, teacher_head):
    return _forward(plan, student_hidden, student_head, teacher_hidden, teacher_head)[0]


def _chunked_reverse_kl_fwd(plan, *arrays):
    kl, student_log_z, teacher_log_z = _forward(plan, *arrays)
    return kl, (arrays, kl, student_log_z, teacher_log_z)


def _chunked_reverse_kl_bwd(plan, saved, cotangent):
    """d KL / d logit = p ((log p - log q) - KL), chunk by chunk."""
    (student_hidden, student_head, teacher_hidden, teacher_head), kl, student_log_z, teacher_log_z = saved
    student_view, teacher_view = _view(plan, student_head), _view(plan, teacher_head)
    rows = tuple(range(student_hidden.ndim - 1))
    per_row = tuple(x[..., None, None] for x in (kl, student_log_z, teacher_log_z, cotangent))

    def step(carry, index):
        d_hidden, d_head = carry
        row_kl, row_student_z, row_teacher_z, row_cotangent = per_row
        start, fresh = _columns(plan, index)
        piece = _piece(plan, student_view, start)
        log_p = _project(student_hidden, piece) - row_student_z
        log_q = _project(teacher_hidden, _piece(plan, teacher_view, start)) - row_teacher_z
        d_logits = jnp.exp(log_p) * (log_p - log_q - row_kl) * row_cotangent
        d_logits = jnp.where(jnp.broadcast_to(fresh, d_logits.shape), d_logits, 0.0)
        d_hidden += jnp.einsum("...kc,dkc->...kd", d_logits, piece, preferred_element_type=jnp.float32)
        d_piece = jnp.tensordot(student_hidden, d_logits, axes=(rows, rows), preferred_element_type=jnp.float32)
        d_piece = jnp.where(
            jnp.broadcast_to(fresh, d_piece.shape), d_piece.astype(d_head.dtype), _piece(plan, d_head, start)
        )
        return (d_hidden, lax.dynamic_update_slice_in_dim(d_head, d_piece, start, axis=2)), None

    d_hidden = jnp.zeros((*student_hidden.shape[:-1], plan.shards, student_hidden.shape[-1]), jnp.float32)
    (d_hidden, d_head), _ = lax.scan(step, (d_hidden, jnp.zeros_like(student_view)), jnp.arange(_num_chunks(plan)))
    d_hidden = jnp.sum(d_hidden, axis=-2).astype(student_hidden.dtype)
    return d_hidden, d_head.reshape(student_head.shape), None, None


_chunked_reverse_kl.defvjp(_chunked_reverse_kl_fwd, _chunked_reverse_kl_bwd)
