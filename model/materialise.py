"""Parameters from somebody else's file, one leaf at a time, straight onto the devices that keep them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from . import transformer
from .config import ModelConfig
from .transformer import Params

ReadTensor = Callable[[str, int | None, tuple[int, ...]], np.ndarray]
"""(parameter name, layer or None, shape) -> that layer's array in this project's layout, any float type."""

Bounds = tuple[tuple[int, int], ...]


def materialise(config: ModelConfig, read_tensor: ReadTensor, *, mesh: jax.sharding.Mesh | None) -> Params:
    """Float32 parameters of a model, each placed by its sharding (on the default device without a mesh).

    The host holds one leaf at a time: the parts that this process's devices keep, plus one layer's tensor.
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
    if path[0].key == "layers":
        for layer in range(shape[0]):
            tensor = read_tensor(name, layer, shape[1:])
            for bounds, region in regions.items():
                if bounds[0][0] <= layer < bounds[0][1]:
                    region[layer - bounds[0][0]] = tensor[_slices(bounds[1:])]
    else:
        tensor = read_tensor(name, None, shape)
        for bounds, region in regions.items():
            region[...] = tensor[_slices(bounds)]
    if place is None:
        return jax.device_put(regions[whole]).block_until_ready()
    array = jax.make_array_from_callback(shape, place, lambda index: regions[_bounds(index or (), shape)])
    return array.block_until_ready()


def _bounds(index: Sequence[slice], shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _slices(bounds: Bounds) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in bounds)
