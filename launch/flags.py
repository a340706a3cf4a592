"""Presets of the TPU compiler's flags, by name, chip generation and libtpu version. None is used unless asked for.

Which flags a compiler takes, and which it says are unsafe, changes from release to release: every preset is compiled
with the installed one in tests/test_tpu.py. They come from MaxText (https://github.com/AI-Hypercomputer/maxtext,
benchmarks/xla_flags_library.py), axlearn (https://github.com/apple/axlearn, common/compiler_options.py) and Google's
recipes (https://github.com/AI-Hypercomputer/tpu-recipes). What they gain depends on the model; none was timed here.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from jax._src import hardware_utils  # which chips there are, before the library that has to be told is loaded

ANY: tuple[int, ...] = (9999,)
"""A libtpu version above all."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Flags by generation, each set with the first libtpu version that no longer takes it.

    `launch_only` are flags of the library, not of its compiler: they cannot be given with one program.
    """

    what: str
    flags: Mapping[str, Mapping[str, str]]
    until: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    launch_only: Mapping[str, str] = field(default_factory=dict)


_OVERLAP = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
_FUSED = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
_OFFLOAD = {
    "xla_tpu_host_transfer_overlap_limit": "24",
    "xla_max_concurrent_host_send_recv": "100",
    "xla_latency_hiding_scheduler_rerun": "2",
    "xla_tpu_enable_all_experimental_scheduler_features": "true",
}
_CHECKED = {"xla_tpu_enable_sdc_checker": "true", "xla_tpu_sdc_check_repeat_count": "5"}
_SLICES = {"xla_tpu_enable_megascale_barrier": "true", **_OVERLAP}

PRESETS = {
    "vmem": Preset(
        what="more on-chip memory for a program, for kernels and fusions that want it",
        flags={
            "v5p": {"xla_tpu_scoped_vmem_limit_kib": "65472"},
            "v6e": {"xla_tpu_scoped_vmem_limit_kib": "98304"},
            "tpu7x": {"xla_tpu_scoped_vmem_limit_kib": "61440"},
        },
    ),
    "overlap": Preset(
        what="all-reduces of data parallelism beside the backward pass",
        flags=dict.fromkeys(("v5e", "v5p", "v6e"), _OVERLAP),
    ),
    "fused": Preset(
        what="all-gathers fused with the products that need them; from libtpu 0.0.50 on v5e alone, where the compiler "
        "says of others that results may be wrong",
        flags=dict.fromkeys(("v5e", "v5p", "v6e"), _FUSED),
        until=dict.fromkeys(("v5p", "v6e"), (0, 0, 50)),
    ),
    "offload": Preset(
        what="transfers to and from host memory beside the compute", flags=dict.fromkeys(("v5p", "v6e"), _OFFLOAD)
    ),
    "multislice": Preset(
        what="several slices: a barrier between them, and an abort when one hangs",
        flags=dict.fromkeys(("v4", "v5e", "v5p", "v6e"), _SLICES),
        launch_only={
            "megascale_error_reporter_abort_on_hang": "true",
            "megascale_error_reporter_abort_on_error": "true",
            "megascale_graph_hang_threshold": "10m",
        },
    ),
    "checked": Preset(
        what="every program runs now and then twice, to find chips that compute wrongly; costs a sixth",
        flags=dict.fromkeys(("v5e", "v5p", "v6e"), _CHECKED),
    ),
}


def options(name: str, generation: str, libtpu: str) -> dict[str, str]:
    """The compiler's options of a preset.

    Raises:
        ValueError: for a preset that does not exist, or not for this generation and version; it says what does.
    """
    version = tuple(int(part) for part in libtpu.split(".") if part.isdecimal())
    offered = [one for one, of in PRESETS.items() if generation in of.flags and version < of.until.get(generation, ANY)]
    if name not in offered:
        raise ValueError(
            f"--flags {name}: there is no such preset for {generation} with libtpu {libtpu}; there are "
            f"{', '.join(offered) or 'none'}"
        )
    return dict(PRESETS[name].flags[generation])


def use(name: str) -> None:
    """Have every program of this process compiled with a preset. Before any device is used.

    Raises:
        ValueError: as `options` does, and where there is no TPU.
    """
    generation = _generation()
    if generation is None:
        raise ValueError(f"--flags {name}: flags are the TPU compiler's, and there is no TPU here; leave it out")
    chosen = {**options(name, generation, metadata.version("libtpu")), **PRESETS[name].launch_only}
    words = [f"--{flag}={value}" for flag, value in chosen.items()]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), *words]).strip()


def effective() -> dict[str, Any]:
    """What the report keeps: the compiler's version and the flags that it was given."""
    found: dict[str, Any] = {}
    if _generation() is not None:
        found["libtpu"] = metadata.version("libtpu")
    if given := os.environ.get("LIBTPU_INIT_ARGS"):
        found["flags"] = given
    return found


def _generation() -> str | None:
    """The generation of this machine's chips, from the ids of the devices on its bus; None without any."""
    count, chip = hardware_utils.num_available_tpu_chips_and_device_id()
    return chip.name if count and chip is not None else None
