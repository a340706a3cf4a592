"""Memory of an SFT step beside MaxText's: both compiled for the same TPU slice, which need not be there.

    python benchmarks/against_maxtext.py --maxtext-python ENVIRONMENT/bin/python

See README.md for how to make that environment and what each side compiles.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
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
    "make one with `python3.12 -m venv maxtext-env && maxtext-env/bin/pip install 'maxtext[tpu]==0.2.5'` and pass "
    "--maxtext-python maxtext-env/bin/python"
)
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
    sizes = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    return {**sizes, "seconds": time.monotonic() - began, "version": f"jax {jax.__version__}"}


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
    found = subprocess.run([args.maxtext_python, "-c", FIND], capture_output=True, text=True, env=_environment())
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["no output"])[-1]
        return f"MaxText was not compiled: {args.maxtext_python} cannot import it ({last}); {INSTALL}"
    version, folder = found.stdout.split()[-2:]
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
    command = [args.maxtext_python, "-m", "maxtext.trainers.pre_train.train_compile", Path(folder, "configs/base.yml")]
    command += [f"{name}={value}" for name, value in settings.items()]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as here:
        done = subprocess.run(
            [*map(str, command), f"base_output_directory={here}"], capture_output=True, text=True, env=_environment()
        )
    sizes = dict(re.findall(r"(argument|temp)_size_in_bytes=(\d+)", done.stdout))
    if done.returncode or len(sizes) != 2:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return f"MaxText {version} did not compile this step (exit code {done.returncode}): {last}"
    measured = {"arguments": int(sizes["argument"]), "temporaries": int(sizes["temp"])}
    return {**measured, "seconds": time.monotonic() - began, "version": version}


def _environment() -> dict[str, str]:
    without = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    return environment(without) | {"DECOUPLE_GCLOUD": "TRUE"}


def show(args: Args, mine: dict[str, Any], theirs: dict[str, Any] | str) -> None:
    """The table that people read."""
    tokens = args.rows * args.row_tokens
    title = f"{args.model}, SFT step, {args.topology}, {args.rows} x {args.row_tokens} = {tokens:,} tokens a device"
    table = Table(title=f"{title}; GiB a device")
    for heading in ("", "arguments", "temporaries", "compiled in"):
        table.add_column(heading, justify="right" if heading else "left")
    sides = {f"posttrain ({mine['version']})": mine}
    if not isinstance(theirs, str):
        sides[f"MaxText {theirs['version']}"] = theirs
    for name, side in sides.items():
        sizes = (f"{side[key] / 2**30:.2f}" for key in ("arguments", "temporaries"))
        table.add_row(name, *sizes, f"{side['seconds']:.0f} s")
    if not isinstance(theirs, str):
        table.add_row("ratio", *(f"{mine[key] / theirs[key]:.2f}" for key in ("arguments", "temporaries")), "")
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
