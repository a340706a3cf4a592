"""The identity of a model's weights: what is computed from them and kept on disk says whose it is."""

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


def of(params: Any) -> str:
    """64 hexadecimal digits that depend on every bit of every parameter, its name and its shape.

    The same on any mesh and machine: each device adds up its own part in integers, whose sum has no order. A checksum,
    which finds other weights, and no defence against somebody who makes weights to fit it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get(_checksums([leaf for _, leaf in leaves]))
    lines = [
        [jax.tree_util.keystr(path), str(leaf.dtype), list(leaf.shape), [int(x) for x in found]]
        for (path, leaf), found in zip(leaves, sums, strict=True)
    ]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


@jax.jit
def _checksums(leaves: list[Array]) -> list[Array]:
    return [_checksum(leaf) for leaf in leaves]


def _checksum(x: Array) -> UInt32[Array, "2"]:
    """Two sums, modulo 2^32, of a hash of each element's bits and its place."""
    size = jnp.dtype(x.dtype).itemsize
    bits = jax.lax.bitcast_convert_type(x, {4: jnp.uint32, 2: jnp.uint16}[size]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for dim in range(x.ndim):
        stride = math.prod(x.shape[dim + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride)
    first = _mixed(bits ^ _mixed(place + jnp.uint32(1)))
    second = _mixed(bits + _mixed(place ^ jnp.uint32(0x9E3779B9)))
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])


def _mixed(x: Array) -> Array:
    """MurmurHash3's finaliser: every bit of the result depends on every bit given."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
