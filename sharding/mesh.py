"""Device meshes, and how trees of arrays lie on them."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from . import rules

_THREADS = 32  # for each device


def spare_threads() -> None:
    """Have XLA start more threads than there are CPU devices, if there are several. Before the first use of a device.

    In a program over several CPU devices each device's part holds a thread while it waits for the others' parts. XLA
    has a thread per core or device, whichever are more: two programs at a time can take them all and wait for ever (XLA
    ends the process after a minute). K programs on D devices need K (D - 1) + 1 threads. XLA reads $NPROC, which is
    left alone if it is set.
    """
    told = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    count = max(jax.config.values["jax_num_cpu_devices"], int(told[1]) if told else 1)
    if count > 1:
        os.environ.setdefault("NPROC", str(_THREADS * count))


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int = -1,
    expert: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """A mesh with the axes (data, fsdp, expert, context, tensor); one size may be -1, "the devices that remain".

    The data axis goes over TPU slices first, so that only it crosses the network between them; unless told, it is the
    number of slices.

    Raises:
        ValueError: if the sizes do not multiply to the number of devices, or data is no multiple of the slices.
    """
    spare_threads()
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = [slices if data is None else data, fsdp, expert, context, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh sizes {dict(zip(rules.MESH_AXES, sizes, strict=True))}: at most one may be -1, the rest at least 1"
        )
    fixed = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        named = dict(zip(rules.MESH_AXES, sizes, strict=True))
        raise ValueError(f"mesh {named} needs {math.prod(sizes)} devices, there are {len(devices)}: change the sizes")
    if devices[0].platform != "tpu":
        grid = np.asarray(devices).reshape(sizes)
    elif slices == 1:  # neighbours of an axis are then neighbours on the chips' torus
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        if sizes[0] % slices:
            raise ValueError(
                f"a data axis of {sizes[0]} does not divide over {slices} slices: only whole replicas lie in a slice, "
                "so choose a multiple"
            )
        within, between = [sizes[0] // slices, *sizes[1:]], [slices, 1, 1, 1, 1]
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return Mesh(grid, rules.MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def sharding(axes: rules.LogicalAxes, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """NamedSharding of one array with these logical axes."""
    return NamedSharding(mesh, rules.spec(axes, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """NamedSharding of an array that every device holds whole."""
    return NamedSharding(mesh, rules.replicated())


def shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of arrays.

    Args:
        axes: a tree of tuples of logical names.
        shapes: the same tree with anything that has a `.shape` at its leaves.
    """
    return jax.tree.map(lambda leaf, names: sharding(names, leaf.shape, mesh), shapes, axes)


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """NamedShardings of a batch: [B, ...] leaves, B over the data axes and the second dimension over context."""
    return jax.tree.map(
        lambda x: sharding(("batch", "length", None, None)[: x.ndim], x.shape, mesh),
        batch,
    )


def place(tree: Any, where: Any) -> Any:
    """Host arrays, the same on every host, onto the devices; each host hands its own devices their parts."""
    if jax.process_count() == 1:
        return jax.device_put(tree, where)
    # device_put would first send all of it to every host, to see that they agree
    return jax.tree.map(lambda x, at: jax.make_array_from_callback(x.shape, at, lambda index: x[index]), tree, where)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tell the compiler how `x` lies on the mesh set by `jax.set_mesh`; without a mesh, `x` itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, rules.spec(axes, x.shape, mesh))


def per_device(function: Callable[..., jax.Array], *axes: rules.LogicalAxes) -> Callable[..., jax.Array]:
    """`function` run by each device on its own parts of the arguments; the result lies like the first argument.

    Args:
        function: what one device computes; without a mesh set by `jax.set_mesh`, what is computed.
        axes: the logical axes of each argument.
    """

    def call(*arguments: jax.Array) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return function(*arguments)
        specs = tuple(rules.spec(names, x.shape, mesh) for names, x in zip(axes, arguments, strict=True))
        return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arguments)

    return call


def summed_per_device(
    function: Callable[..., jax.Array], *axes: rules.LogicalAxes, whole: Sequence[str], over: Sequence[str]
) -> Callable[..., jax.Array]:
    """As `per_device`, for a `function` that makes a part of a sum of each device's parts of a contracted axis.

    Args:
        function: what one device computes; without a mesh set by `jax.set_mesh`, what is computed.
        axes: the logical axes of each argument.
        whole: logical axes that each device gathers before it computes. Their gradients are scattered, then summed.
        over: logical axes over whose parts the result is summed.
    """

    def call(*arguments: jax.Array) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return function(*arguments)
        specs = tuple(rules.spec(names, x.shape, mesh) for names, x in zip(axes, arguments, strict=True))
        places = [
            dict(zip(names, rules.split(names, x.shape, mesh), strict=True))
            for names, x in zip(axes, arguments, strict=True)
        ]
        own = [{axis for parts in place.values() for axis in parts} for place in places]
        used = set().union(*own)
        summed = {axis for place in places for name in over for axis in place.get(name, ())}

        def in_order(chosen: set[str]) -> tuple[str, ...]:  # the same on every host, which a set is not
            return tuple(axis for axis in mesh.axis_names if axis in chosen)

        def local(*parts: jax.Array) -> jax.Array:
            parts = tuple(
                _gathered(_varying(x, in_order(used - mine)), names, place, whole)
                for x, mine, names, place in zip(parts, own, axes, places, strict=True)
            )
            out = jax.lax.psum(function(*parts), in_order(summed)) if summed else function(*parts)
            alike = in_order(used - summed - own[0])  # devices that have all computed the same
            return jax.lax.pmean(out, alike) if alike else out

        return jax.shard_map(local, in_specs=specs, out_specs=specs[0])(*arguments)

    return call


def _varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`x`, of which each device along these axes has a gradient of its own. Before a gather: else whole ones add up."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _gathered(
    x: jax.Array, names: rules.LogicalAxes, place: Mapping[str | None, tuple[str, ...]], whole: Sequence[str]
) -> jax.Array:
    for name in whole:
        if parts := place.get(name):
            x = jax.lax.all_gather(x, parts, axis=names.index(name), tiled=True)
    return x


def platform() -> str:
    """What a program traced now will run on: the platform of the mesh set by `jax.set_mesh`, else JAX's default.

    A program compiled ahead of time for a TPU is traced where there is none.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array as numpy. Where it lies on several hosts every one of them must ask, and all get all of it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def batch_parts(mesh: Mesh) -> int:
    """Number of parts that a batch's rows are split into."""
    return math.prod(mesh.shape[axis] for axis in rules.RULES["batch"])


def current_parts(axis: str, size: int) -> int:
    """Number of parts that a logical axis of this size is split into on the mesh set by `jax.set_mesh`; 1 without."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    where = NamedSharding(mesh, rules.spec((axis,), (size,), mesh))
    return size // where.shard_shape((size,))[0]
