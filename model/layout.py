"""How other people's files lay out a decoder: one tensor per layer and expert, kernels as [outputs, inputs]."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from . import transformer
from .config import ModelConfig
from .moe import EXPERT_KERNELS

INPUT_DIMS = {
    "q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1, "head": 1, "router": 1,
    **dict.fromkeys(EXPERT_KERNELS, 1),
}  # fmt: skip
"""How many leading dimensions of each kernel here are inputs; files have [outputs, inputs]."""


class Entry(NamedTuple):
    """One tensor of a file: which parameter, its layer (and expert) if it is stacked here, and its shape there."""

    path: tuple[str, ...]
    at: tuple[int, ...]
    shape: tuple[int, ...]


def entries(config: ModelConfig, names: Mapping[str, str]) -> dict[str, Entry]:
    """Every tensor of a file by its name: embedding, layer by layer, the rest.

    Args:
        config: the model.
        names: parameter name -> tensor name with `{}` for layer and expert, in the order within a layer.
    """
    leaves = {
        tuple(part.key for part in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(transformer.abstract_params(config))
    }
    order = list(names)
    found: list[tuple[tuple[int, int], str, Entry]] = []
    for path, shape in leaves.items():
        name, rank = path[-1], order.index(path[-1])
        stack = stacked(path[0], name)
        for index in np.ndindex(*shape[:stack]):
            place = index[0] if index else -1 if name == "embedding" else config.num_layers
            entry = Entry(path, index, file_shape(name, shape[stack:]))
            found.append(((place, rank), names[name].format(*index), entry))
    return {name: entry for _, name, entry in sorted(found, key=lambda item: item[0])}


def stacked(root: str, name: str) -> int:
    """How many leading dimensions of a parameter here are of separate tensors in files: layers, experts."""
    return 0 if root != "layers" else 2 if name in EXPERT_KERNELS else 1


def file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in a file of a parameter (one layer or expert of it) that has this shape here."""
    if name in INPUT_DIMS:
        split = INPUT_DIMS[name]
        return math.prod(shape[split:]), math.prod(shape[:split])
    return shape if name == "embedding" else (math.prod(shape),)


def from_file(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A file's tensor in this project's layout; a view, no copy."""
    return (tensor.T if name in INPUT_DIMS else tensor).reshape(shape)


def to_file(name: str, array: np.ndarray) -> np.ndarray:
    """One layer's (or expert's) parameter in a file's layout; a view, no copy."""
    theirs = file_shape(name, array.shape)
    return array.reshape(theirs[::-1]).T if name in INPUT_DIMS else array.reshape(theirs)


def check(
    plan: Mapping[str, Entry],
    stored: Mapping[str, tuple[Path, tuple[int, ...]]],
    *,
    folder: Path,
    unused: Callable[[str], bool],
) -> None:
    """Compare what a model needs with what files hold, before anything is read.

    Args:
        plan: the tensors that the config needs.
        stored: tensor name -> (file, shape).
        folder: named when a tensor is missing.
        unused: tells the tensors that may be left aside.

    Raises:
        ValueError: for the first tensor that is missing, of another shape, or without a place in the model.
    """
    for name, entry in plan.items():
        if name not in stored:
            raise ValueError(
                f"{folder}: tensor {name} is missing: the checkpoint is incomplete or its config another's"
            )
        path, shape = stored[name]
        if shape != entry.shape:
            raise ValueError(
                f"{path}: tensor {name} has shape {shape}, the config says {entry.shape}: "
                "weights and config are of different models"
            )
    extra = [name for name in stored if name not in plan and not unused(name)]
    if extra:
        raise ValueError(
            f"{stored[extra[0]][0]}: tensor {extra[0]} (one of {len(extra)}) has no place in the config's model: "
            "weights and config are of different models"
        )
