"""What is wasteful in a planned program, each with a remedy."""

import math
from typing import Any

import jax

from ..sharding.topology import GIB, Topology
from ..train.programs import Program
from . import cost
from .compiled import Compiled

REPLICATED = 64 * 2**20
"""An array of at least this many bytes that every device holds whole is worth a warning."""
LANES = 128
PADDING = 0.2
"""So is memory of which this share is padding."""


def warnings(program: Program, found: Compiled, topology: Topology, mesh: jax.sharding.Mesh) -> list[str]:
    """One sentence each."""
    leaves = [leaf for leaf in jax.tree.leaves_with_path(program.arguments) if leaf[1].ndim]
    arrays = [*_replicated(leaves, mesh), *_narrow(leaves), *_padded(leaves, found)]
    return [*arrays, *_memory(found, topology), *_exposed(found)]


def _replicated(leaves: list[tuple[Any, Any]], mesh: jax.sharding.Mesh) -> list[str]:
    """Big arrays that lie whole on every device, or that a mesh axis could not divide."""
    said = []
    for path, leaf in leaves:
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if mesh.size == 1 or size < REPLICATED or leaf.sharding is None:
            continue
        name = jax.tree_util.keystr(path)
        if leaf.sharding.shard_shape(leaf.shape) == leaf.shape:
            axes = {axis: n for axis, n in mesh.shape.items() if n > 1}
            said.append(
                f"{name} {leaf.shape} ({size / GIB:.2f} GiB) lies whole on every device: choose other "
                f"sizes than {axes}, of which one divides it, or give it a logical axis that the mesh splits"
            )
    return said


def _narrow(leaves: list[tuple[Any, Any]]) -> list[str]:
    """Big arrays of which a mesh axis leaves a device less than the 128 numbers that a tile is wide.

    Seen of the TPU compiler: it then gathers them by summing over zeros, which moves twice as much.
    """
    found = []
    for path, leaf in leaves:
        if leaf.sharding is None or math.prod(leaf.shape) * leaf.dtype.itemsize < REPLICATED:
            continue
        pairs = zip(leaf.shape[-2:], leaf.sharding.shard_shape(leaf.shape)[-2:], strict=True)
        if any(part < min(whole, LANES) for whole, part in pairs):
            found.append(jax.tree_util.keystr(path))
    if not found:
        return []
    return [
        f"{len(found)} big arrays such as {found[0]} are split into pieces less than {LANES} wide, so that gathering "
        "them moves twice as much: a smaller fsdp axis, with the rest in data or tensor, avoids it"
    ]


def _padded(leaves: list[tuple[Any, Any]], found: Compiled) -> list[str]:
    logical = cost.array_bytes([leaf for _, leaf in leaves])
    if found.arguments and logical < (1 - PADDING) * found.arguments:
        return [
            f"{1 - logical / found.arguments:.0%} of the arguments' memory is padding to the chip's tiles of 8 x 128: "
            "split dimensions into fewer parts, so that at least 128 of the last remain"
        ]
    return []


def _memory(found: Compiled, topology: Topology) -> list[str]:
    hbm = topology.generation.hbm
    if found.fits and found.needed <= hbm:
        return []
    return [
        f"needs {found.needed / GIB:.1f} GiB of HBM and a device has {hbm / GIB:.1f}: use more chips, a larger fsdp or "
        "tensor axis, remat=full, or fewer micro_rows or slots"
    ]


def _exposed(found: Compiled) -> list[str]:
    said = []
    for network, across in (("ICI", False), ("DCN", True)):
        mine = [one for one in found.collectives if one.across_slices == across]
        total = math.fsum(one.times * one.bytes for one in mine)
        shown = math.fsum(one.times * one.bytes for one in mine if not one.hidden)
        if shown > 0.5 * total and shown > REPLICATED:
            worst = max((one for one in mine if not one.hidden), key=lambda one: one.times * one.bytes)
            remedy = (
                "more rows per update amortise it" if across else "a smaller tensor axis or more rows per device help"
            )
            said.append(
                f"{shown / GIB:.2f} GiB over {network} runs outside of any computation, most of it "
                f"{worst.times:.0f} times the {worst.kind} of {worst.source}: {remedy}"
            )
    return said
