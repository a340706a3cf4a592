"""The compiled programs of generation: slots made empty, weights laid out, prompts admitted, tokens decoded."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt, UInt8

from ..sharding import mesh as meshes
from . import attention, processing, speaker
from .processing import Sampling
from .speaker import Caches, Params, Speaker


class Slots(NamedTuple):
    """What the decoding loop carries, one entry per slot; the cache as a tuple of layers."""

    cache: Caches
    token: Int[Array, " B"]
    position: Int[Array, " B"]
    row: Int[Array, " B"]
    count: Int[Array, " B"]  # pyright: ignore[reportIncompatibleMethodOverride]
    limit: Int[Array, " B"]
    temperature: Float[Array, " B"]
    active: Bool[Array, " B"]
    tokens: Int[Array, "B N"]
    logp: Float[Array, "B N"]
    kept: UInt8[Array, "B N W"]  # W is 0 unless asked for


@partial(jax.jit, static_argnums=0)
def lay_out(config: Speaker, params: Params) -> Params:
    """The weights that `decode` takes, once a call: see `transformer.for_decoding`."""
    return speaker.for_decoding(config, params)


def axes_of(state: Slots) -> Slots:
    """Logical axes of every array: slots over the data axes, heads over the tensor axis."""
    rest: dict[str, Any] = {
        name: ("batch", *([None] * (x.ndim - 1))) for name, x in state._asdict().items() if name != "cache"
    }
    return Slots(cache=speaker.cache_axes(state.cache), **rest)


def _constrain(state: Slots) -> Slots:
    """Every array told to lie as its axes say."""
    return jax.tree.map(lambda x, axes: meshes.constrain(x, *axes), state, axes_of(state))


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def start(
    config: Speaker, slots: int, length: int, capacity: int, return_kept: bool,
    limit: Array | np.int32, temperature: Array | np.float32,
) -> Slots:  # fmt: skip
    """Slots that are all free, with room for `length` positions and answers of `capacity` tokens."""
    ints = partial(jnp.zeros, dtype=jnp.int32)
    return _constrain(
        Slots(
            cache=speaker.unstack(speaker.empty(config, slots, length)),
            token=ints(slots), position=ints(slots), row=ints(slots), count=ints(slots),
            limit=jnp.full(slots, limit, jnp.int32), temperature=jnp.full(slots, temperature, jnp.float32),
            active=jnp.zeros(slots, bool),
            tokens=ints((slots, capacity)), logp=jnp.zeros((slots, capacity), jnp.float32),
            kept=jnp.zeros((slots, capacity, -(-config.vocab_size // 8) if return_kept else 0), jnp.uint8),
        )
    )  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def admit(
    config: Speaker,
    sampling: Sampling,
    params: Params,
    state: Slots,
    key: Array,
    prompts: Int[Array, "A P"],
    lengths: Int[Array, " A"],
    slots: Int[Array, "A G"],
    rows: Int[Array, "A G"],
) -> Slots:
    """Prefill some prompts once each, copy their keys and values into the slots of their samples, draw first tokens."""
    count, width = prompts.shape
    group = slots.shape[1]
    fresh = speaker.empty(config, count, width)
    fresh = jax.tree.map(lambda x, axes: meshes.constrain(x, *axes), fresh, speaker.cache_axes(fresh))
    positions = jnp.broadcast_to(jnp.arange(width), prompts.shape)
    segments = jnp.where(positions < lengths[:, None], attention.BRANCHES, 0)
    how = {"positions": positions, "segments": segments, "last": lengths - 1, "temperature": state.temperature[:1]}
    scores, filled = speaker.scores(config, params, fresh, prompts, **how)
    scores = jnp.repeat(scores, group, axis=0)
    filled = speaker.unstack(filled)
    place = partial(_place, slots)
    cache = jax.tree.map(place, state.cache, filled, speaker.cache_axes(filled))
    slots, rows = slots.reshape(-1), rows.reshape(-1)
    warmth = jnp.broadcast_to(state.temperature[0], rows.shape)
    token, logp = processing.draw(scores, _keys(key, rows, jnp.zeros_like(rows)), sampling, temperature=warmth)
    kept = processing.support(scores, sampling, temperature=warmth)[:, : state.kept.shape[-1]]

    def put(old: Array, new: Array) -> Array:
        return old.at[slots].set(new, mode="drop")

    return _constrain(
        state._replace(
            cache=cache,
            token=put(state.token, token),
            position=put(state.position, jnp.repeat(lengths, group)),
            row=put(state.row, rows),
            count=put(state.count, jnp.ones_like(rows)),
            active=put(state.active, ~_stops(token, sampling) & (state.limit[0] > 1)),
            tokens=state.tokens.at[slots, 0].set(token, mode="drop"),
            logp=state.logp.at[slots, 0].set(logp, mode="drop"),
            kept=state.kept.at[slots, 0].set(kept, mode="drop"),
        )
    )


def _place(slots: Int[Array, "A G"], old: Array, new: Array, axes: tuple[str | None, ...]) -> Array:
    """Copy [A, N, P, K] prompt keys into the first P positions of their samples' slots of [B, N, S, K]; or [A, P, k].

    Every device copies the prompts that it has computed into slots that it keeps.
    """
    parts = meshes.current_parts("batch", old.shape[0])
    part = jnp.arange(slots.shape[0]) // (slots.shape[0] // parts)
    within = slots - (part * (old.shape[0] // parts))[:, None]

    def local(old: Array, new: Array, slots: Array) -> Array:
        values = jnp.repeat(new, slots.shape[1], axis=0)
        between = (slice(None),) * (old.ndim - 3)
        return old.at[(slots.reshape(-1), *between, slice(new.shape[-2]))].set(values, mode="drop")

    return meshes.per_device(local, axes, axes, ("batch", None))(old, new, within)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def decode(
    config: Speaker,
    sampling: Sampling,
    params: Params,
    state: Slots,
    key: Array,
    enough: Array | int,
    group: Array | int,
) -> Slots:
    """Decode until at most `enough` slots talk and `group` of one part are free, and at least one step.

    `params` are those of `lay_out`.
    """

    def step(state: Slots) -> Slots:
        warmth, where = state.temperature, state.position[:, None]
        token = state.token[:, None]
        scores, cache = speaker.scores(config, params, state.cache, token, positions=where, temperature=warmth)
        token, logp = processing.draw(scores, _keys(key, state.row, state.count), sampling, temperature=warmth)
        kept = processing.support(scores, sampling, temperature=warmth)[:, : state.kept.shape[-1]]
        active = state.active
        place = jnp.where(active, state.count, state.tokens.shape[1])
        every = jnp.arange(active.shape[0])
        count = state.count + active
        return _constrain(
            state._replace(
                cache=cache,
                token=jnp.where(active, token, state.token),
                position=state.position + active,
                count=count,
                active=active & ~_stops(token, sampling) & (count < state.limit),
                tokens=state.tokens.at[every, place].set(token, mode="drop"),
                logp=state.logp.at[every, place].set(logp, mode="drop"),
                kept=state.kept.at[every, place].set(kept, mode="drop"),
            )
        )

    running = jnp.sum(state.active)
    enough = jnp.where(running > enough, enough, jnp.maximum(running - 1, 0))
    parts = meshes.current_parts("batch", state.active.shape[0])

    def go_on(state: Slots) -> Array:
        free = jnp.sum(~state.active.reshape(parts, -1), axis=1)
        return jnp.any(state.active) & ((jnp.sum(state.active) > enough) | (jnp.max(free) < group))

    return jax.lax.while_loop(go_on, step, state)


@jax.jit
def chosen_experts(state: Slots) -> UInt[Array, "B S L k"]:
    """The experts that every position of the slots' caches went to, in each layer of a mixture."""
    return jnp.stack(state.cache.experts, axis=2)


def _stops(token: Int[Array, " B"], sampling: Sampling) -> Bool[Array, " B"]:
    if not sampling.stop_ids:
        return jnp.zeros(token.shape, bool)
    return jnp.any(token[:, None] == jnp.asarray(sampling.stop_ids)[None, :], axis=1)


def _keys(key: Array, rows: Int[Array, " B"], count: Int[Array, " B"]) -> Array:
    """A key per row and token: the seed and step are already folded into `key`."""
    return jax.vmap(lambda row, n: jax.random.fold_in(jax.random.fold_in(key, row), n))(rows, count)
