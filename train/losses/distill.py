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
from jaxtyping import Array, Float

from . import mismatch, vocabulary


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
    plan = vocabulary.make_plan(student_head, teacher_head, chunk, vocab_shards)
    return _chunked_reverse_kl(plan, student_hidden, student_head, teacher_hidden, teacher_head)


class _Running(NamedTuple):
    """Sums over the columns seen so far, each [*S, shards]; those of exp are relative to the maximum."""

    student_max: Array
    student_sum: Array  # of exp(s - max)
    gap_sum: Array  # of exp(s - max) * (s - t)
    teacher_max: Array
    teacher_sum: Array


def _forward(plan, student_hidden, student_head, teacher_hidden, teacher_head):
    student_view, teacher_view = vocabulary.split(plan, student_head), vocabulary.split(plan, teacher_head)

    def step(run: _Running, index):
        start, fresh = vocabulary.columns(plan, index)
        student = vocabulary.project(student_hidden, vocabulary.take(plan, student_view, start))
        teacher = vocabulary.project(teacher_hidden, vocabulary.take(plan, teacher_view, start))
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
            vocabulary.merge(run.student_max, student_max, run.student_sum, jnp.sum(p, axis=-1)),
            vocabulary.merge(run.student_max, student_max, run.gap_sum, jnp.sum(p * gap, axis=-1)),
            teacher_max,
            vocabulary.merge(run.teacher_max, teacher_max, run.teacher_sum, jnp.sum(q, axis=-1)),
        ), None

    zeros = jnp.zeros((*student_hidden.shape[:-1], plan.shards), jnp.float32)
    start = _Running(zeros - jnp.inf, zeros, zeros, zeros - jnp.inf, zeros)
    run, _ = lax.scan(step, start, jnp.arange(vocabulary.num_chunks(plan)))
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
    (student_hidden, student_head, teacher_hidden, teacher_head), *per_row = saved
    kl, student_log_z, teacher_log_z, cotangent = (x[..., None, None] for x in (*per_row, cotangent))
    teacher_view = vocabulary.split(plan, teacher_head)

    def d_logits_of(index, start, student):
        log_p = student - student_log_z
        log_q = vocabulary.project(teacher_hidden, vocabulary.take(plan, teacher_view, start)) - teacher_log_z
        return jnp.exp(log_p) * (log_p - log_q - kl) * cotangent

    return *vocabulary.walk_back(plan, student_hidden, student_head, d_logits_of), None, None


_chunked_reverse_kl.defvjp(_chunked_reverse_kl_fwd, _chunked_reverse_kl_bwd)
