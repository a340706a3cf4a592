"""The vocabulary walked in chunks of columns: what every loss over it shares that never holds an [S, V] array.

The vocabulary is seen as [shards, per_shard], one shard for each device that its axis is split over, and each walks its
own columns, some at a time. Logits and sums are float32; gradients have the inputs' dtypes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool


class Plan(NamedTuple):
    """How the vocabulary is walked: seen as [shards, per_shard], `width` columns of every shard at a time."""

    shards: int
    per_shard: int
    width: int


def make_plan(student_head: Array, teacher_head: Array, chunk: int, vocab_shards: int) -> Plan:
    """The walk over two heads [*, V], about `chunk` columns of all shards together at a time.

    Raises ValueError if the heads' vocabularies differ, `chunk` < 1, or `vocab_shards` does not divide the vocabulary.
    """
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
    return Plan(vocab_shards, vocab // vocab_shards, min(-(-chunk // vocab_shards), vocab // vocab_shards))


def columns(plan: Plan, index: Array) -> tuple[Array, Bool[Array, " C"]]:
    """First column of chunk `index`, and which of its columns are new: the last chunk is moved back to fit."""
    start = jnp.minimum(index * plan.width, plan.per_shard - plan.width)
    return start, start + jnp.arange(plan.width) >= index * plan.width


def split(plan: Plan, head: Array) -> Array:
    """The head as [D, shards, per_shard]."""
    return head.reshape(head.shape[0], plan.shards, plan.per_shard)


def take(plan: Plan, view: Array, start: Array) -> Array:
    """The columns of a chunk, [D, shards, width]."""
    return lax.dynamic_slice_in_dim(view, start, plan.width, axis=2)


def project(hidden: Array, piece: Array) -> Array:
    """Float32 logits [*S, shards, width] of a chunk."""
    return jnp.tensordot(hidden, piece, axes=1, preferred_element_type=jnp.float32)


def num_chunks(plan: Plan) -> int:
    """Number of chunks in all."""
    return -(-plan.per_shard // plan.width)


def merge(old_max: Array, new_max: Array, total: Array, added: Array) -> Array:
    """A running sum relative to a new maximum, with what a chunk adds."""
    return total * jnp.exp(old_max - new_max) + added


def empty(plan: Plan, hidden: Array) -> tuple[Array, Array]:
    """A running maximum and sum of exponentials per shard, over no columns yet."""
    zeros = jnp.zeros((*hidden.shape[:-1], plan.shards), jnp.float32)
    return zeros - jnp.inf, zeros


def grow(norm: tuple[Array, Array], logits: Array) -> tuple[Array, Array]:
    """The running maximum and sum with further logits, all of which may be -inf."""
    highest = jnp.maximum(norm[0], jnp.max(logits, axis=-1))
    shift = jnp.where(jnp.isneginf(highest), 0.0, highest)
    return highest, merge(norm[0], shift, norm[1], jnp.sum(jnp.exp(logits - shift[..., None]), axis=-1))


def log_z(norm: tuple[Array, Array]) -> Array:
    """The log-normaliser [*S] of running maxima and sums of all shards."""
    return jax.nn.logsumexp(norm[0], axis=-1, b=norm[1])


def walk_back(
    plan: Plan, hidden: Array, head: Array, d_logits_of: Callable[[Array, Array, Array], Array]
) -> tuple[Array, Array]:
    """Gradients of hidden and head from those of the logits, made chunk by chunk: d_logits_of(index, start, logits)."""
    view = split(plan, head)
    rows = tuple(range(hidden.ndim - 1))

    def step(carry, index):
        d_hidden, d_head = carry
        start, fresh = columns(plan, index)
        piece = take(plan, view, start)
        logits = project(hidden, piece)
        d_logits = jnp.where(jnp.broadcast_to(fresh, logits.shape), d_logits_of(index, start, logits), 0.0)
        d_hidden += jnp.einsum("...kc,dkc->...kd", d_logits, piece, preferred_element_type=jnp.float32)
        d_piece = jnp.tensordot(hidden, d_logits, axes=(rows, rows), preferred_element_type=jnp.float32)
        old = take(plan, d_head, start)
        d_piece = jnp.where(jnp.broadcast_to(fresh, d_piece.shape), d_piece.astype(d_head.dtype), old)
        return (d_hidden, lax.dynamic_update_slice_in_dim(d_head, d_piece, start, axis=2)), None

    d_hidden = jnp.zeros((*hidden.shape[:-1], plan.shards, hidden.shape[-1]), jnp.float32)
    (d_hidden, d_head), _ = lax.scan(step, (d_hidden, jnp.zeros_like(view)), jnp.arange(num_chunks(plan)))
    return jnp.sum(d_hidden, axis=-2).astype(hidden.dtype), d_head.reshape(head.shape)
