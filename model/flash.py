"""FlashAttention-2 as Pallas kernels for TPU: attention over packed rows that never holds a [T, S] array of scores.

https://arxiv.org/abs/2307.08691. Queries and keys are walked in blocks; a block of queries keeps a running maximum, a
running sum and an unscaled output, all float32. Blocks above the diagonal, and blocks whose conversations do not meet,
are skipped. The backward pass makes the scores again from the saved log-sum-exp, once for dK and dV, once for dQ.

Scores are held transposed, keys by queries, so that a number per query is a row [1, queries] and lies along the lanes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from .attention import BRANCHES

BLOCK = 512
"""Queries and keys of a block: 1 MiB of float32 scores, which leaves room for the rest in 16 MiB of VMEM."""
LANES = 128
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


class Plan(NamedTuple):
    """Sizes: queries and keys of a block, query heads to a key head, and whether the kernel is interpreted."""

    queries: int
    keys: int
    group: int
    interpret: bool


class Seen(NamedTuple):
    """Who sees whom. A query sees the earlier keys whose segment is `own` or `shared`; padding sees no segment at all.

    `start` is the position of the first query. The lowest and highest group of every block say which blocks can meet.
    """

    start: Int[Array, " 1"]
    query_low: Int[Array, "B I"]
    query_high: Int[Array, "B I"]
    key_low: Int[Array, "B J"]
    key_high: Int[Array, "B J"]
    own: Int[Array, "B 1 T"]
    shared: Int[Array, "B 1 T"]
    segment: Int[Array, "B S 1"]


def attend(
    query: Float[Array, "B H T K"],
    key: Float[Array, "B N S K"],
    value: Float[Array, "B N S K"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]],
    start: Int[Array, " 1"],
    *,
    block: int = BLOCK,
    interpret: bool = False,
) -> Float[Array, "B H T K"]:
    """Softmax attention within packed rows, H query heads over N key heads; equal to `attention.attend` under
    `attention.segment_mask`.

    Args:
        query: queries at the positions start, start + 1, ...
        key: keys of the whole row.
        value: values of the whole row.
        segments: segment ids of the queries and of the keys.
        start: position of the first query in the row: not 0 where a row is split over devices.
        block: queries and keys taken at a time; rows are filled up with padding to a multiple.
        interpret: run without a TPU, slowly.
    """
    length, keys = query.shape[2], key.shape[2]
    blocks = [min(block, -(-size // LANES) * LANES) for size in (length, keys)]
    plan = Plan(blocks[0], blocks[1], query.shape[1] // key.shape[1], interpret)
    fill = lambda x, size, axis: jnp.pad(x, [(0, -x.shape[a] % size if a == axis else 0) for a in range(x.ndim)])  # noqa: E731
    seen = _seen(plan, fill(segments[0], plan.queries, 1), fill(segments[1], plan.keys, 1), start)
    out: Any = _attend(plan, fill(query, plan.queries, 2), fill(key, plan.keys, 2), fill(value, plan.keys, 2), seen)
    return out[:, :, :length]


def _seen(plan: Plan, queries: Array, keys: Array, start: Array) -> Seen:
    own = jnp.where(queries >= BRANCHES, queries, -1)
    shared = jnp.where(queries >= BRANCHES, queries - queries % BRANCHES, -1)

    def ends(segments: Array, size: int) -> tuple[Array, Array]:
        groups = (segments // BRANCHES).reshape(segments.shape[0], -1, size)
        lowest = jnp.min(jnp.where(groups > 0, groups, jnp.iinfo(jnp.int32).max), axis=2)
        return lowest, jnp.max(groups, axis=2)

    bounds = (*ends(queries, plan.queries), *ends(keys, plan.keys))
    return Seen(start, *bounds, own[:, None, :], shared[:, None, :], keys[:, :, None])


def _dot(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _scores(refs: Any, first_query: Array, first_key: Array) -> Array:
    """Scaled scores of a block, [keys, queries], `MASKED` where a query may not see a key."""
    query, key, (own, shared, segment) = refs
    scores = _dot(key[...], query[...], (1, 1)) * query.shape[-1] ** -0.5
    key_at = first_key + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    query_at = first_query + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    seen = ((segment[...] == own[...]) | (segment[...] == shared[...])) & (key_at <= query_at)
    return jnp.where(seen, scores, MASKED)


def _meet(plan: Plan, bounds: Any, row: Array, i: Array, j: Array) -> tuple[Array, Array, Array]:
    """Whether some query of block i may see a key of block j; the positions of their first query and key."""
    start, query_low, query_high, key_low, key_high = bounds
    first_query, first_key = start[0] + i * plan.queries, j * plan.keys
    below = first_key < first_query + plan.queries
    overlap = (key_low[row, j] <= query_high[row, i]) & (key_high[row, j] >= query_low[row, i])
    return below & overlap, first_query, first_key


def _forward_kernel(plan: Plan, *refs: Any) -> None:
    """Algorithm 1 of the paper for one head and one block of queries; the last grid dimension walks the keys."""
    *bounds, query, key, value, own, shared, segment, out, lse, highest, total, sums = refs
    row, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    meet, first_query, first_key = _meet(plan, bounds, row, i, j)

    @pl.when(j == 0)
    def _() -> None:
        highest[...] = jnp.full_like(highest, MASKED)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(meet)
    def _() -> None:
        scores = _scores((query, key, (own, shared, segment)), first_query, first_key)
        new_highest = jnp.maximum(highest[...], jnp.max(scores, axis=0, keepdims=True))
        weights = jnp.where(scores == MASKED, 0.0, jnp.exp(scores - new_highest))
        rescale = jnp.exp(highest[...] - new_highest)
        highest[...] = new_highest
        total[...] = total[...] * rescale + jnp.sum(weights, axis=0, keepdims=True)
        sums[...] = sums[...] * rescale + _dot(value[...], weights.astype(value.dtype), (0, 0))

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        some = jnp.where(total[...] > 0, total[...], 1.0)
        out[...] = (sums[...] / some).T.astype(out.dtype)
        lse[...] = jnp.where(total[...] > 0, highest[...] + jnp.log(some), 0.0)


def _score_gradients(refs: Any, first_query: Array, first_key: Array) -> tuple[Array, Array]:
    """P and dS of a block, [keys, queries]: dS = P (dP - delta), section 3.2 of the paper."""
    query, key, value, segments, out_gradient, lse, delta = refs
    scores = _scores((query, key, segments), first_query, first_key)
    weights = jnp.exp(scores - lse[...])
    return weights, weights * (_dot(value[...], out_gradient[...], (1, 1)) - delta[...])


def _key_value_kernel(plan: Plan, *refs: Any) -> None:
    """dK and dV of one block of keys: sums over the query heads of its group and over the blocks of queries."""
    *bounds, query, key, value, own, shared, segment, out_gradient, lse, delta, key_out, value_out, keys, values = refs
    row, j, member, i = (pl.program_id(n) for n in (0, 2, 3, 4))
    meet, first_query, first_key = _meet(plan, bounds, row, i, j)

    @pl.when((member == 0) & (i == 0))
    def _() -> None:
        keys[...] = jnp.zeros_like(keys)
        values[...] = jnp.zeros_like(values)

    @pl.when(meet)
    def _() -> None:
        block = (query, key, value, (own, shared, segment), out_gradient, lse, delta)
        weights, scores = _score_gradients(block, first_query, first_key)
        values[...] += _dot(weights.astype(value.dtype), out_gradient[...], (1, 0))
        keys[...] += _dot(scores.astype(query.dtype), query[...], (1, 0))

    @pl.when((member == plan.group - 1) & (i == pl.num_programs(4) - 1))
    def _() -> None:
        key_out[...] = (keys[...] * query.shape[-1] ** -0.5).astype(key_out.dtype)
        value_out[...] = values[...].astype(value_out.dtype)


def _query_kernel(plan: Plan, *refs: Any) -> None:
    """dQ of one block of queries; the last grid dimension walks the keys."""
    *bounds, query, key, value, own, shared, segment, out_gradient, lse, delta, query_out, queries = refs
    row, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    meet, first_query, first_key = _meet(plan, bounds, row, i, j)

    @pl.when(j == 0)
    def _() -> None:
        queries[...] = jnp.zeros_like(queries)

    @pl.when(meet)
    def _() -> None:
        block = (query, key, value, (own, shared, segment), out_gradient, lse, delta)
        _, scores = _score_gradients(block, first_query, first_key)
        queries[...] += _dot(scores.astype(key.dtype), key[...], (0, 0))

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        query_out[...] = (queries[...] * query.shape[-1] ** -0.5).astype(query_out.dtype)


def _specs(plan: Plan, dim: int, place: Callable) -> dict[str, pl.BlockSpec]:
    """How each kind of array is cut. `place(*grid) -> (row, head, i, j)`, the head being a query head."""

    def spec(shape: tuple[int | None, ...], at: Callable) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *grid: at(*place(*grid)))

    return {
        "query": spec((None, None, plan.queries, dim), lambda row, head, i, j: (row, head, i, 0)),
        "key": spec((None, None, plan.keys, dim), lambda row, head, i, j: (row, head // plan.group, j, 0)),
        "per_query": spec((None, None, 1, plan.queries), lambda row, head, i, j: (row, head, 0, i)),
        "query_segment": spec((None, 1, plan.queries), lambda row, head, i, j: (row, 0, i)),
        "key_segment": spec((None, plan.keys, 1), lambda row, head, i, j: (row, j, 0)),
    }


def _by_query(plan: Plan, row: Any, head: Any, i: Any, j: Any, start: Any, *_: Any) -> tuple[Any, ...]:
    """Place in a grid (row, head, queries, keys); beyond the diagonal no further keys are fetched."""
    last = (start[0] + (i + 1) * plan.queries - 1) // plan.keys
    return row, head, i, jnp.minimum(j, last)


def _by_key(plan: Plan, blocks: int, *grid_and_bounds: Any) -> tuple[Any, ...]:
    """Place in a grid (row, key head, keys, member, queries); before the diagonal no queries are fetched."""
    row, head, j, member, i, start, *_ = grid_and_bounds
    first = jnp.clip((j * plan.keys - start[0]) // plan.queries, 0, blocks - 1)
    return row, head * plan.group + member, jnp.maximum(i, first), j


def _call(
    plan: Plan, kernel: Callable, grid: tuple[int, ...], specs: tuple[list, list], shapes: list, scratch: list
) -> Callable:
    walked = 1 if kernel is not _key_value_kernel else 2
    semantics: Any = ("parallel",) * (len(grid) - walked) + ("arbitrary",) * walked
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=grid,
            in_specs=specs[0],
            out_specs=specs[1],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=plan.interpret,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, query: Array, key: Array, value: Array, seen: Seen) -> Array:
    return _forward(plan, query, key, value, seen)[0]


def _forward(plan: Plan, query: Array, key: Array, value: Array, seen: Seen) -> tuple[Array, tuple[Any, ...]]:
    rows, heads, length, dim = query.shape
    grid = (rows, heads, length // plan.queries, key.shape[2] // plan.keys)
    cut = _specs(plan, dim, functools.partial(_by_query, plan))
    inputs = [cut[kind] for kind in ("query", "key", "key", "query_segment", "query_segment", "key_segment")]
    shapes = [
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct((rows, heads, 1, length), jnp.float32),
    ]
    scratch = [(1, plan.queries), (1, plan.queries), (dim, plan.queries)]
    forward = _call(plan, _forward_kernel, grid, (inputs, [cut["query"], cut["per_query"]]), shapes, scratch)
    out, lse = forward(*seen[:5], query, key, value, *seen[5:])
    return out, (query, key, value, seen, out, lse)


def _backward(plan: Plan, saved: tuple[Any, ...], gradient: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, seen, out, lse = saved
    delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None, :]
    rows, heads, length, dim = query.shape
    blocks = length // plan.queries, key.shape[2] // plan.keys
    kinds = ("query", "key", "key", "query_segment", "query_segment", "key_segment", "query", "per_query", "per_query")
    arguments = (*seen[:5], query, key, value, *seen[5:], gradient, lse, delta)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731

    cut = _specs(plan, dim, functools.partial(_by_key, plan, blocks[0]))
    grid = (rows, key.shape[1], blocks[1], plan.group, blocks[0])
    specs = [cut[kind] for kind in kinds], [cut["key"], cut["key"]]
    by_key = _call(plan, _key_value_kernel, grid, specs, [like(key), like(value)], [(plan.keys, dim)] * 2)
    key_gradient, value_gradient = by_key(*arguments)

    cut = _specs(plan, dim, functools.partial(_by_query, plan))
    specs = [cut[kind] for kind in kinds], [cut["query"]]
    by_query = _call(plan, _query_kernel, (rows, heads, *blocks), specs, [like(query)], [(plan.queries, dim)])
    (query_gradient,) = by_query(*arguments)
    return query_gradient, key_gradient, value_gradient, None


_attend.defvjp(_forward, _backward)
