"""Log-probs of chosen tokens from last hidden states and a head, without ever holding an [S, V] array.

Walks the vocabulary as `chunked` does. These are what `top_k`'s losses and a truncated sampler's policy gradient need.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from . import vocabulary


def logp(
    hidden: Float[Array, "*S D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "*S K"],
    *,
    chunk: int,
    vocab_shards: int = 1,
) -> Float[Array, "*S K"]:
    """Log-probs of k chosen tokens per position under the full softmax, as `top_k`'s losses need them.

    Equals `log_softmax(hidden @ head)` taken at `tokens`, in value and gradient. Raises ValueError if `chunk` < 1 or
    `vocab_shards` does not divide the vocabulary.
    """
    return _logp(vocabulary.make_plan(head, head, chunk, vocab_shards), hidden, head, tokens, None)


def kept_logp(
    hidden: Float[Array, "*S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "*S"],
    *,
    kept: UInt8[Array, "*S W"],
    chunk: int,
    vocab_shards: int = 1,
) -> Float[Array, "*S"]:
    """Log-probs of the sampled tokens among the tokens that the sampler could draw: Keep Sampling Mask.

    `kept` has eight tokens to a byte, W = ceil(V / 8), as `np.packbits` packs them and the sampler hands them back.
    Equals `mismatch.kept_logp` of the logits, in value and gradient, for targets that were kept. DeepSeek-V3.2,
    https://arxiv.org/abs/2512.02556, section 3.1. Raises ValueError as `logp` does, and if W does not fit the head.
    """
    vocab, num_bytes = head.shape[1], -(-head.shape[1] // 8)
    if kept.shape[-1] != num_bytes:
        raise ValueError(f"kept has {kept.shape[-1]} bytes a token and a vocabulary of {vocab} needs {num_bytes}.")
    chosen = _logp(vocabulary.make_plan(head, head, chunk, vocab_shards), hidden, head, targets[..., None], kept)
    return jnp.squeeze(jnp.asarray(chosen), axis=-1)


def top_k(
    hidden: Float[Array, "*S D"], head: Float[Array, "D V"], k: int, *, chunk: int
) -> tuple[Float[Array, "*S K"], Int[Array, "*S K"]]:
    """The k likeliest tokens of each position with their log-probs under the full softmax, best first; constants.

    What a teacher hands over instead of its hidden states. Raises ValueError if `chunk` < 1 or the vocabulary < k.
    """
    plan = vocabulary.make_plan(head, head, chunk, 1)
    if not 1 <= k <= plan.per_shard:
        raise ValueError(f"k={k} must be from 1 to the vocabulary's {plan.per_shard} tokens.")
    hidden, view = lax.stop_gradient(hidden), lax.stop_gradient(vocabulary.split(plan, head))

    def step(carry, index):
        best, ids, norm = carry
        start, logits = _logits(plan, hidden, view, index)
        norm = vocabulary.grow(norm, logits)
        candidates = jnp.concatenate([best, logits[..., 0, :]], axis=-1)
        columns = jnp.broadcast_to(start + jnp.arange(plan.width, dtype=jnp.int32), (*logits.shape[:-2], plan.width))
        best, places = lax.top_k(candidates, k)
        return (best, jnp.take_along_axis(jnp.concatenate([ids, columns], axis=-1), places, axis=-1), norm), None

    nothing = jnp.full((*hidden.shape[:-1], k), -jnp.inf, jnp.float32)
    carry = nothing, jnp.zeros(nothing.shape, jnp.int32), vocabulary.empty(plan, hidden)
    (best, ids, norm), _ = lax.scan(step, carry, jnp.arange(vocabulary.num_chunks(plan)))
    return best - vocabulary.log_z(norm)[..., None], ids


def _logits(plan: vocabulary.Plan, hidden: Array, view: Array, index: Array) -> tuple[Array, Array]:
    """First column of chunk `index` and its logits [*S, shards, width], -inf in columns that were seen before."""
    start, fresh = vocabulary.columns(plan, index)
    logits = vocabulary.project(hidden, vocabulary.take(plan, view, start))
    return start, jnp.where(jnp.broadcast_to(fresh, logits.shape), logits, -jnp.inf)


def _unpack(plan: vocabulary.Plan, kept: Array, start: Array) -> Array:
    """Which columns of each shard's chunk from `start` on were kept: [*S, shards, width]."""
    column = jnp.arange(plan.shards)[:, None] * plan.per_shard + start + jnp.arange(plan.width)[None, :]
    byte = jnp.take(kept, column // 8, axis=-1)
    shift = jnp.broadcast_to((7 - column % 8).astype(jnp.uint8), byte.shape)
    return (byte >> shift) & 1 != 0


def _places(plan: vocabulary.Plan, tokens: Array, index: Array) -> tuple[Array, Array]:
    """Where in chunk `index` of each shard the tokens are, and whether they are there: both [*S, shards, K]."""
    start, _ = vocabulary.columns(plan, index)
    first = jnp.arange(plan.shards, dtype=jnp.int32) * plan.per_shard
    offset = tokens[..., None, :] - jnp.broadcast_to(first[:, None], (*tokens.shape[:-1], plan.shards, 1))
    inside = (offset >= index * plan.width) & (offset < jnp.minimum((index + 1) * plan.width, plan.per_shard))
    return jnp.where(inside, offset - start, 0), inside


def _scatter(place: Array, given: Array, width: int) -> Array:
    """[..., K] values added up at their places of [..., width]."""
    return jnp.vectorize(lambda at, x: jnp.zeros(width, x.dtype).at[at].add(x), signature="(k),(k)->(c)")(place, given)


def _logp_forward(plan: vocabulary.Plan, hidden, head, tokens, kept):
    view = vocabulary.split(plan, head)

    def step(carry, index):
        found, norm = carry
        start, logits = _logits(plan, hidden, view, index)
        if kept is not None:
            logits = jnp.where(_unpack(plan, kept, start), logits, -jnp.inf)
        place, inside = _places(plan, tokens, index)
        found += jnp.sum(jnp.where(inside, jnp.take_along_axis(logits, place, axis=-1), 0.0), axis=-2)
        return (found, vocabulary.grow(norm, logits)), None

    carry = jnp.zeros(tokens.shape, jnp.float32), vocabulary.empty(plan, hidden)
    (found, norm), _ = lax.scan(step, carry, jnp.arange(vocabulary.num_chunks(plan)))
    log_z = vocabulary.log_z(norm)
    return found - log_z[..., None], log_z


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logp(plan: vocabulary.Plan, hidden, head, tokens, kept) -> Array:
    return _logp_forward(plan, hidden, head, tokens, kept)[0]


def _logp_fwd(plan, hidden, head, tokens, kept):
    value, log_z = _logp_forward(plan, hidden, head, tokens, kept)
    return value, (hidden, head, tokens, kept, log_z)


def _logp_bwd(plan, saved, cotangent):
    hidden, head, tokens, kept, log_z = saved
    total = jnp.sum(cotangent, axis=-1)[..., None, None]

    def d_logits_of(index, start, logits):
        place, inside = _places(plan, tokens, index)
        chosen = _scatter(place, jnp.where(inside, cotangent[..., None, :], 0.0), plan.width)
        if kept is not None:
            logits = jnp.where(_unpack(plan, kept, start), logits, -jnp.inf)
        return chosen - jnp.exp(logits - log_z[..., None, None]) * total

    return *vocabulary.walk_back(plan, hidden, head, d_logits_of), None, None


_logp.defvjp(_logp_fwd, _logp_bwd)
