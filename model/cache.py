"""The key-value cache: a pytree passed into `apply` and returned by it. Slot s of a row holds position s."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from .config import ModelConfig

AXES = ("layers", "batch", "kv_heads", None, "head_dim")
EXPERT_AXES = ("layers", "batch", None, None)
Buffer = Array | tuple[Array, ...]


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
    """The logical axes of every array (which may be abstract), in the cache's own tree."""

    def of(part: Any, names: tuple[str | None, ...]) -> Any:
        return tuple(names[1:] for _ in part) if isinstance(part, tuple) else names

    experts = None if cache.experts is None else of(cache.experts, EXPERT_AXES)
    return Cache(of(cache.key, AXES), of(cache.value, AXES), experts)


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
    where = jnp.arange(positions.shape[0])[:, None], slice(None), positions
    return cache._replace(
        key=_put(cache.key, layer, where, new[0]),
        value=_put(cache.value, layer, where, new[1]),
    )


def note(
    cache: Cache, layer: Int[Array, ""] | int, positions: Int[Array, "B T"], experts: Int[Array, "B T k"]
) -> Cache:
    """Put down which experts some positions went to in one layer; positions as for `write`."""
    if cache.experts is None:
        return cache
    where = jnp.arange(positions.shape[0])[:, None], positions
    return cache._replace(experts=_put(cache.experts, layer, where, experts))


def _put(buffer: Buffer, layer: Int[Array, ""] | int, where: tuple[Any, ...], values: Array) -> Buffer:
    if isinstance(buffer, tuple):
        one = buffer[layer].at[where].set(values.astype(buffer[layer].dtype), mode="drop")
        return (*buffer[:layer], one, *buffer[layer + 1 :])
    return buffer.at[(layer, *where)].set(values.astype(buffer.dtype), mode="drop")


def unstack(cache: Cache) -> Cache:
    """The same cache with a tuple of layers, as `apply` wants it beside unstacked weights."""

    def layers(part: Buffer) -> tuple[Array, ...]:
        return tuple(part[layer] for layer in range(len(part)))

    experts = None if cache.experts is None else layers(cache.experts)
    return Cache(layers(cache.key), layers(cache.value), experts)
