"""Log-probabilities of given tokens from hidden states, a piece of the vocabulary at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..sharding import mesh as meshes

LANES = 128
"""Columns that a TPU holds side by side; chunks are multiples of it."""


class _Running(NamedTuple):
    """What is known after some columns: their maximum, sum of exp(score - maximum), and the target's score."""

    highest: Float[Array, "B T S"]
    total: Float[Array, "B T S"]
    chosen: Float[Array, "B T S"]


def token_logp(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    chunk: int,
    temperature: float,
) -> Float[Array, "B T"]:
    """log softmax(hidden @ head / temperature)[target], float32, without ever holding a [B, T, V] array.

    Walks the vocabulary `chunk` columns at a time with a running maximum and sum (https://arxiv.org/abs/1805.02867);
    the backward pass makes each chunk's scores again. Only a chunk of the head is ever whole on a device, and its
    gradient is scattered chunk by chunk. Where the vocabulary is split over devices, each walks its own part ("S").
    A vocabulary that is one chunk on one device is not walked.
    """
    if chunk >= head.shape[1] and is_whole(*head.shape):
        return _at_once(hidden, head, targets, jnp.float32(temperature))
    pieces, share = _pieces(head, chunk)
    width, shards = pieces.shape[3], pieces.shape[2]
    wide = hidden.astype(jnp.float32)  # so that the chunks' gradients add up in float32
    own = targets[:, :, None] - share * jnp.arange(shards)[None, None, :]

    @jax.checkpoint
    def walk(run: _Running, piece: tuple[Array, Array]) -> tuple[_Running, None]:
        first, columns = piece
        columns = meshes.constrain(columns, "embed", "vocab", None).astype(hidden.dtype)
        scores = jnp.einsum("btd,dsc->btsc", wide.astype(hidden.dtype), columns, preferred_element_type=jnp.float32)
        scores = meshes.constrain(scores / temperature, "batch", "length", "vocab", None)
        index = (first + jnp.arange(width))[None, None, None, :]
        scores = jnp.where(index < share, scores, -jnp.inf)
        highest = jax.lax.stop_gradient(jnp.maximum(run.highest, jnp.max(scores, axis=-1)))
        total = run.total * jnp.exp(run.highest - highest) + jnp.sum(jnp.exp(scores - highest[..., None]), axis=-1)
        is_target = (index == own[..., None]) & (index < share)
        return _Running(highest, total, run.chosen + jnp.sum(jnp.where(is_target, scores, 0.0), axis=-1)), None

    zeros = jnp.zeros((*targets.shape, shards), jnp.float32)
    start = _Running(zeros - jnp.inf, zeros, zeros)
    run, _ = jax.lax.scan(walk, start, (width * jnp.arange(pieces.shape[0]), pieces))
    log_total = jax.nn.logsumexp(run.highest, axis=-1, b=run.total)
    return jnp.sum(run.chosen, axis=-1) - log_total


def is_whole(dim: int, vocab: int) -> bool:
    """Whether every device of the mesh set by `jax.set_mesh` has the whole head."""
    return meshes.current_parts("embed", dim) * meshes.current_parts("vocab", vocab) == 1


@jax.checkpoint
def _at_once(hidden: Array, head: Array, targets: Array, temperature: Array) -> Array:
    scores = jnp.einsum("btd,dv->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    scores = scores / temperature
    chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(scores, axis=-1)


def _pieces(head: Float[Array, "D V"], chunk: int) -> tuple[Float[Array, "C D S W"], int]:
    """The head as C chunks, each a part of every device's share of the vocabulary, and the columns of a share.

    The last chunk may be filled up with columns beyond the share.
    """
    dim, vocab = head.shape
    shards = meshes.current_parts("vocab", vocab)
    share = vocab // shards
    count = -(-share // max(1, chunk // shards))
    width = -(-share // count)
    if count > 1 and width >= LANES:
        width = -(-width // LANES) * LANES
        count = -(-share // width)
    view = meshes.constrain(head.reshape(dim, shards, share), "embed", "vocab", None)
    view = jnp.pad(view, ((0, 0), (0, 0), (0, count * width - share)))
    return jnp.moveaxis(view.reshape(dim, shards, count, width), 2, 0), share
