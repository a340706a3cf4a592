"""The key-value cache: a pytree passed into `apply` and returned by it. Slot s of a row holds position s."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from .config import ModelConfig

AXES = ("layers", "batch", "kv_heads", None, "head_dim")
EXPERT_AXES = ("layers", "batch", None, None)


class Cache(NamedTuple):
    """Keys and values of every layer, [L, B, N, S, K], or a tuple of L arrays [B, N, S, K] beside unstacked weights.

    `experts` are those that each position went to in a mixture, None for a dense model. What lies beyond a row's last
    position is never seen.
    """

    key: Float[Array, "L B N S K"] | tuple[Float[Array, "B N S K"], ...]
    value: Float[Array, "L B N S K"] | tuple[Float[Array, "B N S K"], ...]
    experts: UInt[Array, "L B S k"] | tuple[UInt[Array, "B S k"], ...] | None = None

    @property
    def slots(self) -> int:
        """Positions that a row can hold."""
        return self.key[0].shape[2]


def empty(config: ModelConfig, batch: int, slots: int) -> Cache:
    """A cache of zeros for `batch` rows of up to `slots` positions, in the model's compute type."""
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    keys, values = jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
    if not config.num_experts:
        return Cache(keys, values)
    numbers = jnp.zeros((config.num_layers, batch, slots, config.experts_per_token), config.expert_dtype)
    return Cache(keys, values, numbers)


def axes(cache: Cache) -> Cache:
    """The logical axes of every array, in the cache's own tree."""

    def of(part: Array | tuple[Array, ...] | None, names: tuple[str | None, ...]) -> Any:
        return tuple(names[1:] for _ in part) if isinstance(part, tuple) else part if part is None else names

    return Cache(of(cache.key, AXES), of(cache.value, AXES), of(cache.experts, EXPERT_AXES))


def read(cache: Cache, layer: Int[Array, ""] | int) -> tuple[Float[Array, "B N S K"], Float[Array, "B N S K"]]:
    """One layer's keys and values."""
    return cache.key[layer], cache.value[layer]


def write(
    cache: Cache,
    layer: Int[Array, ""] | int,
    positions: Int[Array, "B T"],
    new: tuple[Float[Array, "B T N K"], Float[Array, "B T N K"]],
) -> Cache:
    """Put the keys and values of some positions into one layer, in place where the buffer may be reused.

    Positions at or past the last slot are dropped.
    """
    rows = jnp.arange(positions.shape[0])[:, None]

    def put(buffer: Array | tuple[Array, ...], values: Array) -> Array | tuple[Array, ...]:
        if isinstance(buffer, tuple):
            one = buffer[layer].at[rows, :, positions].set(values.astype(buffer[layer].dtype), mode="drop")
            return (*buffer[:layer], one, *buffer[layer + 1 :])
        return buffer.at[layer, rows, :, positions].set(values.astype(buffer.dtype), mode="drop")

    return cache._replace(key=put(cache.key, new[0]), value=put(cache.value, new[1]))


def note(
    cache: Cache, layer: Int[Array, ""] | int, positions: Int[Array, "B T"], experts: Int[Array, "B T k"]
) -> Cache:
    """Put down which experts some positions went to in one layer; positions as for `write`."""
    rows, buffer = jnp.arange(positions.shape[0])[:, None], cache.experts
    if isinstance(buffer, tuple):
        one = buffer[layer].at[rows, positions].set(experts.astype(buffer[layer].dtype), mode="drop")
        return cache._replace(experts=(*buffer[:layer], one, *buffer[layer + 1 :]))
    return cache._replace(experts=buffer.at[layer, rows, positions].set(experts.astype(buffer.dtype), mode="drop"))


def unstack(cache: Cache) -> Cache:
    """The same cache with a tuple of layers, as `apply` wants it beside unstacked weights."""
    return Cache(*(None if part is None else tuple(part[layer] for layer in range(len(part))) for part in cache))
