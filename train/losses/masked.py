"""Reductions over masked tokens: the only place where values per token become a number.

A step divides by the weight of the whole global batch, so a stage returns the pair (`sum`, `weight`), not a mean.
How tokens are averaged is a matter of the weights alone:

    every token counts the same (SFT, DAPO):           w = mask
    every sequence counts the same (GRPO, GSPO, MOPD): w = per_sequence(mask, segments)
    Dr. GRPO: a constant per sequence:                 w = mask, and the divisor is sequences x length budget

A value where the mask is 0 never counts, even if it is inf or nan, and receives a gradient of exactly 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def _masked(values: Float[Array, "*S"], mask: Float[Array, "*S"]) -> Float[Array, "*S"]:
    return jnp.where(mask != 0, values.astype(jnp.float32), 0.0) * mask.astype(jnp.float32)


def _ratio(total: Float[Array, "*S"], weight: Float[Array, "*S"]) -> Float[Array, "*S"]:
    return jnp.where(weight != 0, total / jnp.where(weight != 0, weight, 1.0), 0.0)


def sum(values: Float[Array, "*S"], mask: Float[Array, "*S"]) -> Float[Array, ""]:
    """Sum of the values, each times its mask; the first half of a stage's (sum, weight)."""
    return jnp.sum(_masked(values, mask))


def weight(mask: Float[Array, "*S"]) -> Float[Array, ""]:
    """Total weight of a mask; the second half of a stage's (sum, weight)."""
    return jnp.sum(mask.astype(jnp.float32))


def mean(values: Float[Array, "*S"], mask: Float[Array, "*S"]) -> Float[Array, ""]:
    """Mean of the values weighted by the mask; 0 if the mask is empty."""
    return _ratio(sum(values, mask), weight(mask))


def sequence_sum(values: Float[Array, "*B T"], mask: Float[Array, "*B T"]) -> Float[Array, "*B"]:
    """Masked sum of each row, for batches with one sequence a row."""
    return jnp.sum(_masked(values, mask), axis=-1)


def sequence_mean(values: Float[Array, "*B T"], mask: Float[Array, "*B T"]) -> Float[Array, "*B"]:
    """Masked mean of each row, for batches with one sequence a row; 0 for a row whose mask is empty."""
    return _ratio(sequence_sum(values, mask), jnp.sum(mask.astype(jnp.float32), axis=-1))


def segment_sum(
    values: Float[Array, "B T"], mask: Float[Array, "B T"], segments: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Masked sum over all tokens of the same row that share a segment id, given to each of them.

    The packed form of `sequence_sum`. Ids may be any integers, in any order.
    """

    def one_row(row, ids):
        slot = jnp.searchsorted(jnp.sort(ids), ids)
        return jax.ops.segment_sum(row, slot, num_segments=ids.shape[0])[slot]

    return jax.vmap(one_row)(_masked(values, mask), segments)


def sum_of_segment(
    values: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    wanted: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """Masked sum over all tokens of the same row whose segment id is `wanted`, given to the token that asks for it.

    With it the two answers of a preference pair may share a packed row: `segment_sum` is an answer's own total, and
    this is the other's. 0 where the row has no such segment.
    """

    def one_row(row, ids, asked):
        ordered = jnp.sort(ids)
        totals = jax.ops.segment_sum(row, jnp.searchsorted(ordered, ids), num_segments=ids.shape[0])
        slot = jnp.minimum(jnp.searchsorted(ordered, asked), ids.shape[0] - 1)
        return jnp.where(ordered[slot] == asked, totals[slot], 0.0)

    return jax.vmap(one_row)(_masked(values, mask), segments, wanted)


def segment_mean(
    values: Float[Array, "B T"], mask: Float[Array, "B T"], segments: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Masked mean over all tokens of the same row that share a segment id, given to each; 0 where the mask is empty."""
    return _ratio(segment_sum(values, mask, segments), segment_sum(jnp.ones_like(values), mask, segments))


def per_sequence(mask: Float[Array, "B T"], segments: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The mask rescaled so that the tokens of each sequence weigh 1 together: 1/|y| per token.

    `sum(values, per_sequence(mask, segments))` is the sum of the sequences' means, and its `weight` is the number of
    sequences with at least one counted token.
    """
    mask = mask.astype(jnp.float32)
    return _ratio(mask, segment_sum(jnp.ones_like(mask), mask, segments))


def num_remaining(mask: Float[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens count (mask not 0) from each token, itself included, to the end of its segment.

    A segment's tokens must be contiguous. 1 at a counted token says that it is its sequence's last.
    """
    rows, length = mask.shape
    from_here = jnp.cumsum((mask != 0)[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]
    is_end = jnp.concatenate([segments[:, :-1] != segments[:, 1:], jnp.ones((rows, 1), bool)], axis=1)
    end = jnp.where(is_end, jnp.arange(length, dtype=jnp.int32)[None, :], length)
    end = jax.lax.cummin(end, axis=1, reverse=True)
    beyond = jnp.concatenate([from_here, jnp.zeros((rows, 1), jnp.int32)], axis=1)
    return from_here - jnp.take_along_axis(beyond, end + 1, axis=1)
