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
