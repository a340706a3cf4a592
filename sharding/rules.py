"""The one table from logical array axes to mesh axes. Nobody else writes a PartitionSpec."""

from collections.abc import Sequence

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "rows": ("data", "expert"),
    "dispatched": ("data", "fsdp"),
    "draws": ("data", "fsdp", "expert", "context", "tensor"),
    "length": ("context",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "choices": (),
    "layers": (),
    "head_dim": (),
    "norm": (),
}

LogicalAxes = tuple[str | None, ...]


def spec(axes: LogicalAxes, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical axes.

    A mesh axis is used once per array, at the first dimension that names it, and only where it divides the dimension:
    3 key heads on a tensor axis of 2 are replicated, never padded.

    Args:
        axes: a logical name, or None, per dimension.
        shape: the array's shape.
        mesh: supplies the size of each mesh axis.

    Raises:
        ValueError: for a name that is not in the table, or another number of axes than dimensions.
    """
    return PartitionSpec(*(parts or None for parts in split(axes, shape, mesh)))


def split(axes: LogicalAxes, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> list[tuple[str, ...]]:
    """The mesh axes that each dimension lies over, as `spec` says."""
    if len(axes) != len(shape):
        raise ValueError(
            f"logical axes {axes} do not fit an array of shape {tuple(shape)}: give one name per dimension"
        )
    used: set[str] = set()
    return [_entry(axis, size, mesh, used) for axis, size in zip(axes, shape, strict=True)]


def _entry(axis: str | None, size: int, mesh: Mesh | AbstractMesh, used: set[str]) -> tuple[str, ...]:
    if axis is None:
        return ()
    if axis not in RULES:
        raise ValueError(f"unknown logical axis {axis!r}: the table in sharding/rules.py has {sorted(RULES)}")
    chosen: list[str] = []
    for mesh_axis in RULES[axis]:
        parts = mesh.shape.get(mesh_axis, 1)
        if parts > 1 and mesh_axis not in used and size % parts == 0:
            chosen.append(mesh_axis)
            used.add(mesh_axis)
            size //= parts
    return tuple(chosen)


def replicated() -> PartitionSpec:
    """PartitionSpec of an array that every device holds whole."""
    return PartitionSpec()
