"""The generation engine: prompts in, tokens and their log-probabilities out.

A fixed number of slots decode together in one compiled loop. A slot whose answer ends is given the next waiting
prompt; the samples of one prompt share its prefill. Shapes come from buckets, so a new length compiles nothing new.
Noise depends on (seed, step, row, token) only: an answer is the same whatever slot, batch or order computed it.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from ..sharding import mesh as meshes
from . import attention, processing, transformer
from . import cache as caches
from .config import ModelConfig
from .processing import Sampling

MAX_STOPS = 8
MIN_LENGTH = 96  # of the cache: short prompts of any kind share one decoding program
PREFILL = 2**14
"""Prompt tokens that a part of the batch computes at a time, padding included; at least one prompt."""


class Generation(NamedTuple):
    """One answer.

    `tokens` ends with the stop token if `finish` is "stop"; "length" means cut at the limit. `logp` holds, per token,
    its log-probability under the distribution that it was drawn from (after temperature, top-k, top-p, min-p), float32.
    `kept`, if asked for, holds per token which tokens that distribution could draw, eight to a byte: uint8
    [n, ceil(V / 8)], unpacked by `np.unpackbits(kept, axis=-1, count=V)`.
    """

    tokens: np.ndarray
    logp: np.ndarray
    finish: Literal["stop", "length"]
    kept: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Names the random numbers of a call: the same seed, step and row give the same answer."""

    seed: int = 0
    step: int = 0
    first_row: int = 0


class _Slots(NamedTuple):
    """What the decoding loop carries, one entry per slot."""

    cache: caches.Cache
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


def generate(
    config: ModelConfig,
    params: transformer.Params,
    prompts: Sequence[Sequence[int]],
    *,
    num_samples: int = 1,
    sampling: Sampling,
    noise: Noise,
    slots: int = 64,
    mesh: jax.sharding.Mesh | None = None,
    return_kept: bool = False,
    on_finish: Callable[[int], None] | None = None,
) -> list[list[Generation]]:
    """Sample `num_samples` answers to every prompt.

    Args:
        config: the model's shape.
        params: its parameters.
        prompts: token ids, at least one each.
        num_samples: answers per prompt; they share the prompt's prefill.
        sampling: temperature, truncation, length limit and stop ids.
        noise: seed, step and first row of the random numbers; sample g of prompt p is row
            `first_row + p * num_samples + g`.
        slots: answers decoded at a time, rounded up to fill the mesh; memory grows with it. The samples of a prompt
            share its prefill where they fit the slots of one of the mesh's parts of a batch.
        mesh: shards the slots over its data axes and the heads over its tensor axis.
        return_kept: whether to hand back `kept`, which takes V / 8 bytes a token.
        on_finish: called with the number of answers that have just ended (for progress bars).

    Returns:
        A list of answers per prompt, in order.

    Raises:
        ValueError: for an empty prompt, or one that leaves no room for an answer in the model's context.
    """
    _check(config, prompts, sampling)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        parts = meshes.batch_parts(mesh) if mesh is not None else 1
        engine = _Engine((config, params), prompts, num_samples, sampling, noise, slots, parts)
        return engine.run(on_finish or (lambda _: None), return_kept=return_kept)


def bucket(size: int, *, minimum: int = 16) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `size`: shapes repeat, at most a third is padding."""
    value = minimum
    while value < size:
        if value + value // 2 >= size:
            return value + value // 2
        value *= 2
    return value


def _filling(size: int, parts: int) -> int:
    """`size` rounded up to split evenly over the mesh: what does not split is replicated."""
    return -(-size // parts) * parts


def _most(prompts: int, width: int) -> int:
    """How many of so many prompts of this width a part of the batch computes at a time."""
    return max(1, min(prompts, PREFILL // width))


class Call(NamedTuple):
    """A compiled function of the engine, its static arguments, and the others as shapes."""

    function: Any
    static: tuple[Any, ...]
    arguments: tuple[Any, ...]


def programs(
    config: ModelConfig,
    params: Any,
    sampling: Sampling,
    *,
    slots: int,
    group: int,
    prompt_tokens: int,
    mesh: jax.sharding.Mesh,
) -> dict[str, Call]:
    """What generation compiles on accelerators, with abstract arguments.

    Args:
        config: the model's shape.
        params: its abstract parameters, with shardings.
        sampling: as for `generate`.
        slots: answers decoded at a time.
        group: samples per prompt.
        prompt_tokens: length of the longest prompt.
        mesh: where they lie.
    """
    parts = meshes.batch_parts(mesh)
    slots = _filling(slots, parts)
    group = min(group, slots // parts)
    width, capacity = bucket(prompt_tokens), bucket(sampling.max_tokens)
    length = bucket(prompt_tokens + capacity, minimum=MIN_LENGTH)
    dials = np.int32(sampling.max_tokens), np.float32(sampling.temperature)
    shapes = jax.eval_shape(partial(_start, config, slots, length, capacity, False, *dials))
    state = jax.tree.map(lambda x, axes: _lying(x, axes, mesh), shapes, _axes(shapes))
    key = jax.eval_shape(lambda: jax.random.key(0))
    ints = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    prompts = parts * _most(slots // parts // group, width)
    admitted = (ints((prompts, width)), ints((prompts,)), ints((prompts, group)), ints((prompts, group)))
    static = (config, sampling.compiled)
    with jax.set_mesh(mesh):
        decoder = jax.eval_shape(partial(_decoder, config), params)
    decoder = jax.tree_util.tree_map_with_path(
        lambda path, x: _lying(x, transformer.decoding_axes(path), mesh), decoder
    )
    return {
        "decoder": Call(_decoder, (config,), (params,)),
        "prefill": Call(_admit, static, (params, state, key, *admitted)),
        "decode": Call(_decode, static, (decoder, state, key, ints(()), ints(()))),
    }


def _lying(x: jax.ShapeDtypeStruct, axes: tuple[str | None, ...], mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.sharding(axes, x.shape, mesh))


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    if len(sampling.stop_ids) > MAX_STOPS:
        raise ValueError(f"{len(sampling.stop_ids)} stop ids, at most {MAX_STOPS} are supported: {sampling.stop_ids}")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(
                f"prompt {index} is empty: give at least one token, for instance the beginning-of-text token"
            )
        if len(prompt) + sampling.max_tokens > config.context:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, which with {sampling.max_tokens} new ones exceeds the "
                f"model's context of {config.context}: shorten the prompt or lower max_tokens"
            )


class _Unit(NamedTuple):
    """Answers to one prompt that are admitted together."""

    prompt: int
    samples: range


class _Engine:
    """Host side of the loop: which prompt waits, which slot is free, what has been said."""

    def __init__(
        self, model: tuple[ModelConfig, transformer.Params], prompts: Sequence[Sequence[int]], num_samples: int,
        sampling: Sampling, noise: Noise, slots: int, parts: int,
    ) -> None:  # fmt: skip
        config, params = model
        self.parts = parts
        self.config, self.sampling, self.noise = config, sampling, noise
        self.prompts, self.num_samples = prompts, num_samples
        self.num_slots = _filling(slots, parts)
        self.part = self.num_slots // parts
        self.group = min(num_samples, self.part)
        self.refill = max(self.group, self.num_slots // 4)
        self.width = bucket(max(map(len, prompts), default=1))
        self.capacity = bucket(sampling.max_tokens)
        self.length = bucket(max(map(len, prompts), default=1) + self.capacity, minimum=MIN_LENGTH)
        self.params = params
        self.decoder = _decoder(config, params)
        pieces = [range(i, min(i + self.group, num_samples)) for i in range(0, num_samples, self.group)]
        self.waiting = [_Unit(p, piece) for p in range(len(prompts)) for piece in pieces][::-1]
        self.holds: list[tuple[int, int] | None] = [None] * self.num_slots
        self.answers: list[list[Any]] = [[None] * num_samples for _ in prompts]

    def run(self, on_finish: Callable[[int], None], *, return_kept: bool) -> list[list[Generation]]:
        if not self.prompts:
            return []
        static = (self.config, self.sampling.compiled)
        key = jax.random.fold_in(jax.random.key(self.noise.seed), self.noise.step)
        sizes = self.num_slots, self.length, self.capacity
        dials = np.int32(self.sampling.max_tokens), np.float32(self.sampling.temperature)
        state = _start(self.config, *sizes, return_kept, *dials)
        while self.waiting or any(self.holds):
            while self.waiting and (units := self._next_units()):
                state = _admit(*static, self.params, state, key, *self._admission(units))
            enough = self.num_slots - self.refill if self.waiting else 0
            state = _decode(*static, self.decoder, state, key, enough, self.group)
            on_finish(self._collect(state))
        return self.answers

    def _next_units(self) -> list[list[tuple[_Unit, list[int]]]]:
        """What is admitted next, by part of the batch: units and the slots that they are given. Empty if none fits.

        A unit's slots are all of one part: its prompt is then computed on the device that keeps its keys and values.
        """
        parts = [range(first, first + self.part) for first in range(0, self.num_slots, self.part)]
        free = [[slot for slot in part if self.holds[slot] is None] for part in parts]
        units: list[list[tuple[_Unit, list[int]]]] = [[] for _ in free]
        for _ in range(_most(self.part // self.group, self.width)):
            for slots, taken in zip(free, units, strict=True):
                if self.waiting and len(slots) >= self.group:
                    unit = self.waiting.pop()
                    taken.append((unit, slots[: len(unit.samples)]))
                    del slots[: len(unit.samples)]
        return units if any(units) else []

    def _admission(
        self, units: Sequence[Sequence[tuple[_Unit, Sequence[int]]]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Prompts [A, P], lengths [A], slots [A, G], rows [A, G] of some units; slot num_slots is nobody."""
        room = self._room(max(map(len, units)))
        size = room * len(units)
        tokens = np.zeros((size, self.width), np.int32)
        lengths = np.ones(size, np.int32)
        slots = np.full((size, self.group), self.num_slots, np.int32)
        rows = np.zeros((size, self.group), np.int32)
        places = [(part * room + i, *one) for part, taken in enumerate(units) for i, one in enumerate(taken)]
        for index, unit, given in places:
            prompt = self.prompts[unit.prompt]
            tokens[index, : len(prompt)] = prompt
            lengths[index] = len(prompt)
            for place, (sample, slot) in enumerate(zip(unit.samples, given, strict=True)):
                slots[index, place] = slot
                rows[index, place] = self.noise.first_row + unit.prompt * self.num_samples + sample
                self.holds[slot] = (unit.prompt, sample)
        return tokens, lengths, slots, rows

    def _room(self, count: int) -> int:
        """Room for `count` prompts of a part: the most, or a half, a quarter or an eighth. Few shapes to compile."""
        most = _most(self.part // self.group, self.width)
        return next(room for room in (-(-most // 8), -(-most // 4), -(-most // 2), most) if room >= count)

    def _collect(self, state: _Slots) -> int:
        """Take finished answers out of their slots; returns how many."""
        active, count, token = (meshes.to_host(x) for x in (state.active, state.count, state.token))
        done = [slot for slot, held in enumerate(self.holds) if held is not None and not active[slot]]
        if not done:
            return 0
        tokens, logp, kept = (meshes.to_host(x) for x in (state.tokens, state.logp, state.kept))
        for slot in done:
            prompt, sample = self.holds[slot]  # pyright: ignore[reportGeneralTypeIssues]
            n = int(count[slot])
            finish = "stop" if int(token[slot]) in self.sampling.stop_ids else "length"
            support = kept[slot, :n].copy() if kept.shape[-1] else None
            self.answers[prompt][sample] = Generation(tokens[slot, :n].copy(), logp[slot, :n].copy(), finish, support)
            self.holds[slot] = None
        return len(done)


@partial(jax.jit, static_argnums=0)
def _decoder(config: ModelConfig, params: transformer.Params) -> transformer.Params:
    return transformer.for_decoding(config, params)


def _axes(state: _Slots) -> _Slots:
    """Logical axes of every array: slots over the data axes, heads over the tensor axis."""
    cache = jax.tree.map(lambda x: caches.AXES[-x.ndim :], state.cache)
    rest: dict[str, Any] = {
        name: ("batch", *([None] * (x.ndim - 1))) for name, x in state._asdict().items() if name != "cache"
    }
    return _Slots(cache=cache, **rest)


def _constrain(state: _Slots) -> _Slots:
    """Every array told to lie as its axes say."""
    return jax.tree.map(lambda x, axes: meshes.constrain(x, *axes), state, _axes(state))


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _start(
    config: ModelConfig, slots: int, length: int, capacity: int, return_kept: bool,
    limit: Array | np.int32, temperature: Array | np.float32,
) -> _Slots:  # fmt: skip
    ints = partial(jnp.zeros, dtype=jnp.int32)
    return _constrain(
        _Slots(
            cache=caches.unstack(caches.empty(config, slots, length)),
            token=ints(slots), position=ints(slots), row=ints(slots), count=ints(slots),
            limit=jnp.full(slots, limit, jnp.int32), temperature=jnp.full(slots, temperature, jnp.float32),
            active=jnp.zeros(slots, bool),
            tokens=ints((slots, capacity)), logp=jnp.zeros((slots, capacity), jnp.float32),
            kept=jnp.zeros((slots, capacity, -(-config.vocab_size // 8) if return_kept else 0), jnp.uint8),
        )
    )  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _admit(
    config: ModelConfig,
    sampling: Sampling,
    params: transformer.Params,
    state: _Slots,
    key: Array,
    prompts: Int[Array, "A P"],
    lengths: Int[Array, " A"],
    slots: Int[Array, "A G"],
    rows: Int[Array, "A G"],
) -> _Slots:
    """Prefill some prompts once each, copy their keys and values into the slots of their samples, draw first tokens."""
    count, width = prompts.shape
    group = slots.shape[1]
    fresh = jax.tree.map(lambda x: meshes.constrain(x, *caches.AXES), caches.empty(config, count, width))
    positions = jnp.broadcast_to(jnp.arange(width), prompts.shape)
    segments = jnp.where(positions < lengths[:, None], attention.BRANCHES, 0)
    hidden, fresh = transformer.apply(config, params, prompts, positions=positions, segments=segments, cache=fresh)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    scores = meshes.constrain(transformer.logits(config, params, last)[:, 0], "draws", None)
    scores = jnp.repeat(scores, group, axis=0)
    cache = jax.tree.map(lambda old, new: _place(old, new, slots), state.cache, caches.unstack(fresh))
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


def _place(old: Array, new: Array, slots: Int[Array, "A G"]) -> Array:
    """Copy [A, N, P, K] prompt keys into the first P positions of their samples' slots of [B, N, S, K].

    Every device copies the prompts that it has computed into slots that it keeps.
    """
    parts = meshes.current_parts("batch", old.shape[0])
    part = jnp.arange(slots.shape[0]) // (slots.shape[0] // parts)
    within = slots - (part * (old.shape[0] // parts))[:, None]

    def local(old: Array, new: Array, slots: Array) -> Array:
        values = jnp.repeat(new, slots.shape[1], axis=0)
        return old.at[slots.reshape(-1), :, : new.shape[-2]].set(values, mode="drop")

    axes = caches.AXES[1:]
    return meshes.per_device(local, axes, axes, ("batch", None))(old, new, within)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _decode(
    config: ModelConfig,
    sampling: Sampling,
    params: transformer.Params,
    state: _Slots,
    key: Array,
    enough: Array | int,
    group: Array | int,
) -> _Slots:
    """Decode until at most `enough` slots talk and `group` of one part are free, and at least one step.

    `params` are those of `_decoder`.
    """

    def step(state: _Slots) -> _Slots:
        hidden, cache = transformer.apply(
            config, params, state.token[:, None], positions=state.position[:, None], cache=state.cache
        )
        # Rows over all devices, each with its whole vocabulary: an exchange, where drawing from a split one gathers it.
        scores = meshes.constrain(transformer.logits(config, params, hidden)[:, 0], "draws", None)
        warmth = state.temperature
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

    def go_on(state: _Slots) -> Array:
        free = jnp.sum(~state.active.reshape(parts, -1), axis=1)
        return jnp.any(state.active) & ((jnp.sum(state.active) > enough) | (jnp.max(free) < group))

    return jax.lax.while_loop(go_on, step, state)


def _stops(token: Int[Array, " B"], sampling: Sampling) -> Bool[Array, " B"]:
    if not sampling.stop_ids:
        return jnp.zeros(token.shape, bool)
    return jnp.any(token[:, None] == jnp.asarray(sampling.stop_ids)[None, :], axis=1)


def _keys(key: Array, rows: Int[Array, " B"], count: Int[Array, " B"]) -> Array:
    """A key per row and token: the seed and step are already folded into `key`."""
    return jax.vmap(lambda row, n: jax.random.fold_in(jax.random.fold_in(key, row), n))(rows, count)
