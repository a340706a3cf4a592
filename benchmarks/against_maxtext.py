"""Memory of an SFT step beside MaxText's: both compiled for the same TPU slice, which need not be there.

    python benchmarks/against_maxtext.py --maxtext-python ENVIRONMENT/bin/python

See README.md for how to make that environment and what each side compiles.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import tyro
from jax.experimental.topologies import get_topology_desc
from rich.console import Console
from rich.table import Table

from posttrain.launch.compiled import environment
from posttrain.model import config as configs
from posttrain.sharding import mesh as meshes
from posttrain.train import programs, sft, state
from posttrain.train.compute import Compute
from posttrain.train.optimizer import AdamW

MODELS = {"llama3.1-8b": configs.LLAMA_31_8B, "llama3.1-70b": configs.LLAMA_31_70B}
INSTALL = (
    "make one with `python3.12 -m venv maxtext-env && maxtext-env/bin/pip install 'maxtext[tpu]==0.2.5' "
    "'libtpu==0.0.50.*'` and pass --maxtext-python maxtext-env/bin/python"
)
SIZES = ("argument_size_in_bytes", "temp_size_in_bytes", "peak_memory_in_bytes")
FIND = (
    "import importlib.metadata as m, maxtext, pathlib; print(m.version('maxtext'), pathlib.Path(maxtext.__path__[0]))"
)


@dataclass(frozen=True)
class Args:
    """Compare what a device holds during an SFT step with MaxText's."""

    maxtext_python: Path | None = None
    """Interpreter of an environment with MaxText; without it only this project is compiled."""
    model: str = "llama3.1-8b"
    """Shape of the model, by MaxText's name."""
    topology: str = "v5p:4x4x4"
    """The slice, by chips along each axis."""
    maxtext_topology: str = "v5p-128"
    """The same slice by MaxText's name (of v4 and v5p it counts cores, two a chip)."""
    rows: int = 1
    """Rows of a batch on each device."""
    row_tokens: int = 8192
    """Tokens of a row."""
    json: bool = False
    """Print JSON instead of a table."""


def ours(args: Args) -> dict[str, Any]:
    """Bytes of arguments and temporaries on each device, by our compiled train step."""
    os.environ.update(environment(os.environ))
    jax.config.update("jax_platforms", "cpu")
    topology = get_topology_desc(platform="tpu", topology_name=args.topology, wrap=_wrap(args.topology))
    mesh = meshes.make_mesh(devices=topology.devices)
    compute = Compute(dtype="bfloat16", remat="full", row_tokens=args.row_tokens, micro_rows=args.rows * mesh.size)
    config = compute.configure(MODELS[args.model])
    optimizer = AdamW(learning_rate=1e-5).build(100)
    arguments = state.abstract(config, optimizer, mesh), programs.abstract_batch(compute, mesh)
    began = time.monotonic()
    with jax.set_mesh(mesh):
        compiled = jax.jit(sft.train_step(config, optimizer), donate_argnums=0).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    version = f"jax {jax.__version__}, libtpu {metadata.version('libtpu')}"
    return _side({name: getattr(memory, name) for name in SIZES}, began, version)


def _side(memory: Mapping[str, int], began: float, version: str) -> dict[str, Any]:
    """One side's row. What a step needs beside its arguments is what its peak has more than they.

    `temp_size_in_bytes` counts more: a buffer that an argument leaves and a result takes is in it twice (a step that
    only subtracts a gradient from donated weights is said to have its whole peak as temporaries).
    """
    arguments, reported, peak = (memory[name] for name in SIZES)
    sizes = {"arguments": arguments, "temporaries": peak - arguments, "temp_size": reported}
    return {**sizes, "seconds": time.monotonic() - began, "version": version}


def _wrap(topology: str) -> tuple[bool, ...]:
    """Which axes of a slice are rings: all three of a slice in multiples of 4 chips, an axis of 16 of a flat one."""
    chips = [int(size) for size in topology.split(":")[1].split("x")]
    if len(chips) == 3:
        return (all(size % 4 == 0 for size in chips),) * 3
    return tuple(size == 16 for size in chips)


def maxtext(args: Args) -> dict[str, Any] | str:
    """The same of MaxText's train step, or a sentence that says why there is none."""
    if args.maxtext_python is None:
        return f"MaxText was not compiled: it needs an environment of its own; {INSTALL}"
    probe = subprocess.run([args.maxtext_python, "-c", FIND], capture_output=True, text=True, env=_environment())
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or ["no output"])[-1]
        return f"MaxText was not compiled: {args.maxtext_python} cannot import it ({last}); {INSTALL}"
    version, folder = probe.stdout.split()[-2:]
    settings = {
        "model_name": args.model,
        "compile_topology": args.maxtext_topology,
        "compile_topology_num_slices": 1,
        "per_device_batch_size": args.rows,
        "max_target_length": args.row_tokens,
        "remat_policy": "full",
        "dtype": "bfloat16",
        "weight_dtype": "float32",
        "dataset_type": "synthetic",
        "enable_checkpointing": "false",
        "run_name": "memory",
    }
    command = [args.maxtext_python, Path(__file__).with_name("maxtext_side.py"), Path(folder, "configs/base.yml")]
    command += [f"{name}={value}" for name, value in settings.items()]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as here:
        done = subprocess.run(
            [*map(str, command), f"base_output_directory={here}"], capture_output=True, text=True, env=_environment()
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return f"MaxText {version} did not compile this step (exit code {done.returncode}): {last}"
    found = json.loads(done.stdout.splitlines()[-1])
    versions = ", ".join(f"{name} {number}" for name, number in found.pop("versions").items())
    return _side(found, began, versions)


def _environment() -> dict[str, str]:
    ours = ("PYTHONPATH", "XLA_FLAGS", "TPU_LIBRARY_PATH")  # the last is set by importing JAX, to our own library
    without = {name: value for name, value in os.environ.items() if name not in ours}
    return environment(without) | {"DECOUPLE_GCLOUD": "TRUE"}


def show(args: Args, mine: dict[str, Any], theirs: dict[str, Any] | str) -> None:
    """The table that people read."""
    tokens = args.rows * args.row_tokens
    title = f"{args.model}, SFT step, {args.topology}, {args.rows} x {args.row_tokens} = {tokens:,} tokens a device"
    table = Table(title=f"{title}; GiB a device")
    for heading in ("", "arguments", "temporaries", "temp_size", "compiled in"):
        table.add_column(heading, justify="right" if heading else "left")
    sides = {f"posttrain ({mine['version']})": mine}
    if not isinstance(theirs, str):
        sides[theirs["version"]] = theirs
    sizes = ("arguments", "temporaries", "temp_size")
    for name, side in sides.items():
        table.add_row(name, *(f"{side[key] / 2**30:.2f}" for key in sizes), f"{side['seconds']:.0f} s")
    if not isinstance(theirs, str):
        table.add_row("ratio", *(f"{mine[key] / theirs[key]:.2f}" for key in sizes), "")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main(args: Args) -> None:
    if args.model not in MODELS:
        sys.exit(f"model {args.model!r} is not known here: use one of {', '.join(MODELS)}")
    mine, theirs = ours(args), maxtext(args)
    if args.json:
        print(json.dumps({"ours": mine, "maxtext": theirs}, indent=2))
    else:
        show(args, mine, theirs)
    if isinstance(theirs, str):
        print(theirs, file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args))
