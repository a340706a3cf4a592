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

from ..sharding import mesh as meshes
from . import decoding, transformer
from .config import ModelConfig
from .processing import Sampling
from .speaker import Params, Speaker

MAX_STOPS = 8
MIN_LENGTH = 96  # of the cache: short prompts of any kind share one decoding program
PREFILL = 2**14
"""Prompt tokens that a part of the batch computes at a time, padding included; at least one prompt."""


class Generation(NamedTuple):
    """One answer.

    `tokens` ends with the stop token if `finish` is "stop"; "length" means cut at the limit. `logp` holds, per token,
    its log-probability under the distribution that it was drawn from (after temperature, top-k, top-p, min-p), float32.
    `kept`, if asked for, holds per token which tokens that distribution could draw, eight to a byte: uint8
    [n, ceil(V / 8)], unpacked by `np.unpackbits(kept, axis=-1, count=V)`. `experts`, if asked for, holds which experts
    of a mixture each token of prompt and answer went to in each layer, but for the last, which went to none: unsigned
    [P + n - 1, L, k].
    """

    tokens: np.ndarray
    logp: np.ndarray
    finish: Literal["stop", "length"]
    kept: np.ndarray | None = None
    experts: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Names the random numbers of a call: the same seed, step and row give the same answer."""

    seed: int = 0
    step: int = 0
    first_row: int = 0


def generate(
    config: Speaker,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    num_samples: int = 1,
    sampling: Sampling,
    noise: Noise,
    slots: int = 64,
    mesh: jax.sharding.Mesh | None = None,
    return_kept: bool = False,
    return_experts: bool = False,
    on_finish: Callable[[int], None] | None = None,
) -> list[list[Generation]]:
    """Sample `num_samples` answers to every prompt.

    Args:
        config: the model's shape, or those of two that are mixed.
        params: the parameters.
        prompts: token ids, at least one each.
        num_samples: answers per prompt; they share the prompt's prefill.
        sampling: temperature, truncation, length limit and stop ids.
        noise: seed, step and first row of the random numbers; sample g of prompt p is row
            `first_row + p * num_samples + g`.
        slots: answers decoded at a time, rounded up to fill the mesh; memory grows with it. The samples of a prompt
            share its prefill where they fit the slots of one of the mesh's parts of a batch.
        mesh: shards the slots over its data axes and the heads over its tensor axis.
        return_kept: whether to hand back `kept`, which takes V / 8 bytes a token.
        return_experts: whether to hand back `experts`, which takes L k bytes a token (twice that beyond 256 experts).
        on_finish: called with the number of answers that have just ended (for progress bars).

    Returns:
        A list of answers per prompt, in order.

    Raises:
        ValueError: for an empty prompt, or one that leaves no room for an answer in the model's context; for
            `return_experts` of a model that has none.
    """
    _check(config, prompts, sampling)
    if return_experts and not (isinstance(config, ModelConfig) and config.num_experts):
        raise ValueError(
            "return_experts asks for the experts of a mixture, and the model is dense, or two that are mixed"
        )
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        parts = meshes.batch_parts(mesh) if mesh is not None else 1
        engine = _Engine((config, params), prompts, num_samples, sampling, noise, slots, parts)
        tell = on_finish or (lambda _: None)
        return engine.run(tell, return_kept=return_kept, return_experts=return_experts)


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
    config: Speaker,
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
    shapes = jax.eval_shape(partial(decoding.start, config, slots, length, capacity, False, *dials))
    state = jax.tree.map(lambda x, axes: _lying(x, axes, mesh), shapes, decoding.axes_of(shapes))
    key = jax.eval_shape(lambda: jax.random.key(0))
    ints = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    prompts = parts * _most(slots // parts // group, width)
    admitted = (ints((prompts, width)), ints((prompts,)), ints((prompts, group)), ints((prompts, group)))
    static = (config, sampling.compiled)
    decoder = jax.eval_shape(partial(decoding.lay_out, config), params)
    decoder = jax.tree_util.tree_map_with_path(
        lambda path, x: _lying(x, transformer.decoding_axes(path), mesh), decoder
    )
    return {
        "decoder": Call(decoding.lay_out, (config,), (params,)),
        "prefill": Call(decoding.admit, static, (params, state, key, *admitted)),
        "decode": Call(decoding.decode, static, (decoder, state, key, ints(()), ints(()))),
    }


def _lying(x: jax.ShapeDtypeStruct, axes: tuple[str | None, ...], mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.sharding(axes, x.shape, mesh))


def _check(config: Speaker, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
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
        self, model: tuple[Speaker, Params], prompts: Sequence[Sequence[int]], num_samples: int,
        sampling: Sampling, noise: Noise, slots: int, parts: int,
    ) -> None:  # fmt: skip
        config, params = model
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
        self.decoder = decoding.lay_out(config, params)
        pieces = [range(i, min(i + self.group, num_samples)) for i in range(0, num_samples, self.group)]
        self.waiting = [_Unit(p, piece) for p in range(len(prompts)) for piece in pieces][::-1]
        self.holds: list[tuple[int, int] | None] = [None] * self.num_slots
        self.answers: list[list[Any]] = [[None] * num_samples for _ in prompts]

    def run(
        self, on_finish: Callable[[int], None], *, return_kept: bool, return_experts: bool
    ) -> list[list[Generation]]:
        if not self.prompts:
            return []
        static = (self.config, self.sampling.compiled)
        key = jax.random.fold_in(jax.random.key(self.noise.seed), self.noise.step)
        sizes = self.num_slots, self.length, self.capacity
        dials = np.int32(self.sampling.max_tokens), np.float32(self.sampling.temperature)
        state = decoding.start(self.config, *sizes, return_kept, *dials)
        while self.waiting or any(self.holds):
            while units := self._next_units():
                state = decoding.admit(*static, self.params, state, key, *self._admission(units))
            enough = self.num_slots - self.refill if self.waiting else 0
            state = decoding.decode(*static, self.decoder, state, key, enough, self.group)
            on_finish(self._collect(state, return_experts=return_experts))
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

    def _collect(self, state: decoding.Slots, *, return_experts: bool) -> int:
        """Take finished answers out of their slots; returns how many."""
        active, count, token = (meshes.to_host(x) for x in (state.active, state.count, state.token))
        done = [slot for slot, held in enumerate(self.holds) if held is not None and not active[slot]]
        if not done:
            return 0
        tokens, logp, kept = (meshes.to_host(x) for x in (state.tokens, state.logp, state.kept))
        experts = meshes.to_host(decoding.chosen_experts(state)) if return_experts else None
        for slot in done:
            prompt, sample = self.holds[slot]  # pyright: ignore[reportGeneralTypeIssues]
            n = int(count[slot])
            finish = "stop" if int(token[slot]) in self.sampling.stop_ids else "length"
            support = kept[slot, :n].copy() if kept.shape[-1] else None
            fed = len(self.prompts[prompt]) + n - 1
            went = None if experts is None else experts[slot, :fed].copy()
            answer = Generation(tokens[slot, :n].copy(), logp[slot, :n].copy(), finish, support, went)
            self.answers[prompt][sample] = answer
            self.holds[slot] = None
        return len(done)
