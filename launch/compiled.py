"""Compiles programs for a TPU topology that is not here, and keeps what was learned of each on disk.

Runs in a process of its own, with the environment that `environment` gives: the TPU library reads it when it is loaded.
"""

import gzip
import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ..sharding import mesh as meshes
from ..sharding.topology import GIB, Topology
from . import hlo
from .hlo import Collective

FORMAT = "2"  # of what is kept of a program; another one is compiled again
UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40, "": 1}


class Compiled(NamedTuple):
    """What the TPU compiler says of a program, per device, in bytes. `needed` is known even if it does not fit.

    `temporaries` is what the peak has beside the arguments. The compiler's own `temp_size` counts twice what a result
    has in the place of a donated argument: programs that fit would be said not to.
    """

    fits: bool
    needed: float
    arguments: float = 0.0
    temporaries: float = 0.0
    accessed: float = 0.0
    collectives: tuple[Collective, ...] = ()


def environment(before: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that compiles for TPUs on a machine without one."""
    return {
        **before,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }


def check_compiler() -> None:
    """Raise ImportError unless the TPU compiler that this JAX was released with is installed."""
    wanted = next(
        (found[1] for line in metadata.requires("jax") or [] if (found := re.match(r"libtpu==([\d.]+)\.\*", line))), ""
    )
    try:
        version = metadata.version("libtpu")
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"planning needs the TPU compiler: run `pip install libtpu=={wanted}.*`") from error
    if not f"{version}.".startswith(f"{wanted}."):
        raise ImportError(
            f"libtpu {version} does not go with jax {jax.__version__}: run `pip install libtpu=={wanted}.*`"
        )


def make_mesh(
    topology: Topology, sizes: Mapping[str, int], chips_per_host: tuple[int, ...] | None
) -> jax.sharding.Mesh:
    """A mesh over the topology's devices; `data` goes over the slices and `fsdp` over the rest unless told.

    Raises:
        ValueError: for a topology that the compiler does not know, or sizes that do not fit it.
    """
    return meshes.make_mesh(**sizes, devices=_devices(topology, chips_per_host))


def _devices(topology: Topology, chips_per_host: tuple[int, ...] | None) -> Any:
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.generation.name == "v4":
        options["chip_config_name"] = "megacore"
    bounds = chips_per_host or _host(topology)
    options["chips_per_host_bounds"] = (*bounds, *(1,) * (3 - len(bounds)))
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.slice_name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"the TPU compiler has no topology {topology.slice_name}: {error}") from error


def _host(topology: Topology) -> tuple[int, ...]:
    """Chips of a host: up to 2x2, and one host for all eight of a v5e or v6e 2x4."""
    if topology.generation.dims == 2 and topology.shape == (2, 4):
        return topology.shape
    return tuple(min(2, size) for size in topology.shape[:2])


def analyse(traced: Any, *, trips: int, topology: Topology, cache: Path) -> Compiled:
    """Compile a traced program, or remember what the compiler made of it before; `trips` as in `hlo.parse`."""
    lowered = traced.lower()
    versions = [FORMAT, jax.__version__, metadata.version("libtpu"), str(topology)]
    key = hashlib.sha256("\n".join([*versions, lowered.as_text()]).encode()).hexdigest()
    path = cache / f"{key[:32]}.json.gz"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(gzip.compress(json.dumps(_compile(lowered)).encode()))
        partial.rename(path)
    found = json.loads(gzip.decompress(path.read_bytes()))
    if not found["fits"]:
        return Compiled(**found)
    module = hlo.parse(found.pop("hlo"), trips=trips)
    return Compiled(**found, accessed=module.bytes_accessed(hbm_only=True), collectives=tuple(module.collectives()))


def _compile(lowered: Any) -> dict[str, Any]:
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) and "hbm" in str(error).lower():
            return {"fits": False, "needed": _wanted(str(error))}
        raise
    memory = compiled.memory_analysis()
    peak, arguments = memory.peak_memory_in_bytes, memory.argument_size_in_bytes
    return {
        "fits": True,
        "needed": peak + memory.generated_code_size_in_bytes,
        "arguments": arguments,
        "temporaries": peak - arguments,
        "hlo": compiled.as_text(),
    }


def _wanted(message: str) -> float:
    """Bytes that a program wanted, from the compiler's message that there are not as many."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]?)", message) or re.search(r"\(([\d.]+)([KMGT]?)\)", message)
    return float(found[1]) * UNITS[found[2]] if found else float("inf")
