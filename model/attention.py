"""Grouped-query attention: who may attend to whom, and the attention itself."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

BRANCHES = 1024
"""A segment id is `group * BRANCHES + branch`; group 0 is padding. The same number as in the batch contract."""
UNSEEN = float(jnp.finfo(jnp.float32).min)


def segment_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Causal mask within packed conversations.

    A query sees earlier positions of its own group whose branch is 0 (the shared prompt) or its own. Padding sees
    nothing and is seen by nothing.
    """
    group, branch = segments // BRANCHES, segments % BRANCHES
    same_group = (group[:, :, None] == group[:, None, :]) & (group[:, :, None] > 0)
    same_branch = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    order = jnp.arange(segments.shape[1])
    return same_group & same_branch & (order[None, :, None] >= order[None, None, :])


def cache_mask(positions: Int[Array, "B T"], slots: int) -> Bool[Array, "B T S"]:
    """Mask over a cache whose slot s holds position s: a query at position p sees the slots 0..p."""
    return positions[:, :, None] >= jnp.arange(slots)[None, None, :]


def attend(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B N S K"],
    value: Float[Array, "B N S K"],
    allowed: Bool[Array, "B T S"],
) -> Float[Array, "B T H K"]:
    """Softmax attention with H query heads over N key heads (H a multiple of N); softmax in float32.

    Queries that may see nothing get zeros.
    """
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("btngk,bnsk->bngts", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed[:, None, None, :, :], scores * dim**-0.5, UNSEEN)
    highest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))  # any shift cancels, so no gradient is owed
    weights = jnp.exp(scores - highest)
    out = jnp.einsum("bngts,bnsk->bngtk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    # Divided last: K numbers a query instead of S.
    out = jnp.where(highest > UNSEEN, out / jnp.sum(weights, axis=-1, keepdims=True), 0.0).astype(value.dtype)
    return out.reshape(batch, heads, length, dim).swapaxes(1, 2)
