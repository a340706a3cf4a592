"""Parameters from somebody else's file, one leaf at a time, straight onto the devices that keep them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from . import layout, transformer
from .config import ModelConfig
from .transformer import Params

ReadTensor = Callable[[str, tuple[int, ...], tuple[int, ...]], np.ndarray]
"""(parameter name, its layer and expert, shape) -> that one's array in this project's layout, any float type."""

Bounds = tuple[tuple[int, int], ...]


def materialise(config: ModelConfig, read_tensor: ReadTensor, *, mesh: jax.sharding.Mesh | None) -> Params:
    """Float32 parameters of a model, each placed by its sharding (on the default device without a mesh).

    The host holds one leaf at a time: the parts that this process's devices keep, and one tensor of the file.
    """
    shapes = transformer.abstract_params(config)
    if mesh is None:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: _leaf(path, leaf.shape, read_tensor, None), shapes)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, place: _leaf(path, leaf.shape, read_tensor, place),
        shapes,
        transformer.shardings(config, mesh),
    )


def _leaf(
    path: tuple[Any, ...], shape: tuple[int, ...], read_tensor: ReadTensor, place: jax.sharding.Sharding | None
) -> jax.Array:
    name = path[-1].key
    whole = tuple((0, size) for size in shape)
    if place is None:
        regions = {whole: np.empty(shape, np.float32)}
    else:
        local = [_bounds(index, shape) for index in place.addressable_devices_indices_map(shape).values() if index]
        regions = {
            bounds: np.empty([stop - start for start, stop in bounds], np.float32) for bounds in local or [whole]
        }
    stack = layout.stacked(path[0].key, name)
    for index in np.ndindex(*shape[:stack]):
        holders = [bounds for bounds in regions if _within(index, bounds)]
        if not holders:
            continue
        tensor = read_tensor(name, index, shape[stack:])
        for bounds in holders:
            local = tuple(at - start for at, (start, _) in zip(index, bounds, strict=False))
            regions[bounds][local or ...] = tensor[_slices(bounds[stack:])]
    if place is None:
        return jax.device_put(regions[whole]).block_until_ready()
    array = jax.make_array_from_callback(shape, place, lambda index: regions[_bounds(index or (), shape)])
    return array.block_until_ready()


def _within(index: tuple[int, ...], bounds: Bounds) -> bool:
    return all(start <= at < stop for at, (start, stop) in zip(index, bounds, strict=False))


def _bounds(index: Sequence[slice], shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _slices(bounds: Bounds) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in bounds)
