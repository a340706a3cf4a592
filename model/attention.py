"""Grouped-query attention: who may attend to whom, and the attention itself, at once or a packed row at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
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


BLOCK = 192
"""Queries of a packed row that are taken at a time, with the keys up to the last of them; at most `BLOCKS` times."""
BLOCKS = 8
SHORT = 128
"""Rows of at most this length are computed together: they fit a core's cache as they are."""


@jax.custom_vjp
def attend_packed(
    query: Float[Array, "B H T K"],
    key: Float[Array, "B N S K"],
    value: Float[Array, "B N S K"],
    allowed: Bool[Array, "B T S"],
) -> Float[Array, "B H T K"]:
    """The same as `attend` for packed rows, made for processors with caches: T queries of a row, or a part of them.

    One row after the other and some of its queries at a time, so that scores never leave the cache; of them one number
    a query is kept, and the backward pass makes them again (https://arxiv.org/abs/2307.08691, algorithm 2). If the
    queries are a whole row's, T = S, none sees a later key.
    """
    return _packed_forward(query, key, value, allowed)[0]


def _packed_forward(query: Array, key: Array, value: Array, allowed: Array) -> tuple[Array, tuple[Array, ...]]:
    def row(query: Array, key: Array, value: Array, allowed: Array) -> tuple[Array, Array]:
        outs, sums = [], []
        for part, stop in _parts(query, key):
            scores = _scores(query[:, part], key[:, :stop], allowed[part, :stop])
            highest = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - highest)
            out = _product("ngts,nsk->ngtk", weights.astype(value.dtype), value[:, :stop])
            total, seen = jnp.sum(weights, axis=-1, keepdims=True), highest > UNSEEN
            outs.append(jnp.where(seen, out / total, 0.0).astype(value.dtype))
            sums.append(jnp.where(seen, highest + jnp.log(total), jnp.inf))  # exp(score - inf) is 0: sees nothing
        return jnp.concatenate(outs, axis=2).reshape(query.shape), jnp.concatenate(sums, axis=2)

    out, sums = _by_row(row, query, key, value, allowed)
    return out, (query, key, value, allowed, out, sums)


def _packed_backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array, None]:
    def row(query: Array, key: Array, value: Array, allowed: Array, out: Array, sums: Array, gradient: Array) -> Any:
        queries, keys, values = [], jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
        for part, stop in _parts(query, key):
            scores = _scores(query[:, part], key[:, :stop], allowed[part, :stop])
            weights = jnp.exp(scores - sums[:, :, part])
            owed, made = _grouped(gradient[:, part], key), _grouped(out[:, part], key)
            mean = jnp.sum(owed.astype(jnp.float32) * made, axis=-1, keepdims=True)
            moved = weights * (_product("ngtk,nsk->ngts", owed, value[:, :stop]) - mean) * query.shape[-1] ** -0.5
            weights, moved = weights.astype(value.dtype), moved.astype(key.dtype)
            queries.append(_product("ngts,nsk->ngtk", moved, key[:, :stop]))
            later = ((0, 0), (0, key.shape[1] - stop), (0, 0))
            keys += jnp.pad(_product("ngts,ngtk->nsk", moved, _grouped(query[:, part], key)), later)
            values += jnp.pad(_product("ngts,ngtk->nsk", weights, owed), later)
        return jnp.concatenate(queries, axis=2).reshape(query.shape), keys, values

    gradients = _by_row(row, *saved, gradient)
    return *(x.astype(like.dtype) for x, like in zip(gradients, saved[:3], strict=True)), None


attend_packed.defvjp(_packed_forward, _packed_backward)
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _by_row(function: Callable[..., Any], *arrays: Array) -> Any:
    if arrays[0].shape[2] <= SHORT:
        return jax.vmap(function)(*arrays)
    return lax.map(lambda row: function(*row), arrays)


def _parts(query: Float[Array, "H T K"], key: Float[Array, "N S K"]) -> list[tuple[slice, int]]:
    """The queries in blocks, each with the number of keys it may see: all, where the queries are a part of a row."""
    length, keys = query.shape[1], key.shape[1]
    size = -(-length // min(BLOCKS, -(-length // BLOCK)))
    parts = [slice(begin, min(length, begin + size)) for begin in range(0, length, size)]
    return [(part, part.stop if length == keys else keys) for part in parts]


def _grouped(x: Float[Array, "H T K"], key: Float[Array, "N S K"]) -> Float[Array, "N G T K"]:
    return x.reshape(key.shape[0], -1, *x.shape[1:])


def _scores(query: Array, key: Array, allowed: Array) -> Float[Array, "N G T S"]:
    scores = _product("ngtk,nsk->ngts", _grouped(query, key), key) * query.shape[-1] ** -0.5
    return jnp.where(allowed, scores, UNSEEN)
