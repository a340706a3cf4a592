"""Memory of a full-vocabulary distillation step, compiled for a TPU slice that need not be there.

    python benchmarks/distill_memory.py

Says whether any array of the compiled program holds tokens x vocabulary, and whether the step fits. README.md has what
it printed.
"""

import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.experimental.topologies import get_topology_desc
from rich.console import Console
from rich.table import Table

from posttrain.launch.compiled import environment
from posttrain.model.config import PUBLISHED
from posttrain.sharding import mesh as meshes
from posttrain.sharding import topology as topologies
from posttrain.train import distill, programs, state
from posttrain.train.compute import Compute
from posttrain.train.optimizer import AdamW
from posttrain.train.teaching import FullVocabulary

GIB = 2**30


@dataclass(frozen=True)
class Args:
    """Compile one update of a student from the cached hidden states of a teacher of the same shape."""

    model: str = "llama3.1-8b"
    """Shape of student and teacher."""
    topology: str = "v5p:4x4x4"
    """The slice."""
    rows: int = 1
    """Rows of a batch on each device."""
    row_tokens: int = 8192
    """Tokens of a row."""
    beta: float = 1.0
    """1 is KL(student || teacher), 0 the other direction, between them lies GKD's divergence."""
    json: bool = False
    """Print JSON instead of a table."""


def compile_step(args: Args) -> dict[str, Any]:
    """What a device holds, in bytes, and the largest arrays of the compiled program, in entries."""
    os.environ.update(environment(os.environ))
    jax.config.update("jax_platforms", "cpu")
    slice_ = topologies.parse(args.topology)
    devices = get_topology_desc(platform="tpu", topology_name=args.topology, wrap=_wrap(args.topology)).devices
    mesh = meshes.make_mesh(devices=devices)
    compute = Compute(dtype="bfloat16", remat="full", row_tokens=args.row_tokens, micro_rows=args.rows * mesh.size)
    config = compute.configure(PUBLISHED[args.model])
    objective, optimizer = FullVocabulary(beta=args.beta), AdamW(learning_rate=1e-5).build(100)
    fields = {"advantage": (), "behavior_logp": (), **objective.fields(config)}
    teacher = state.abstract_params(config, mesh)
    head = teacher["head"]
    batch = programs.abstract_batch(compute, mesh, fields)
    now = state.abstract(config, optimizer, mesh)
    began = time.monotonic()
    with jax.set_mesh(mesh):
        step = jax.jit(distill.train_step(config, optimizer, objective), donate_argnums=0)
        compiled = step.lower(now, batch, head).compile()
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    sizes = {(kind, shape): _entries(shape) for kind, shape in re.findall(r"\b(\w+)\[([\d,]+)\]", text)}
    tokens, vocab = args.rows * args.row_tokens, config.vocab_size
    # However it is cut into dimensions, its size is a multiple of the vocabulary; that of activations is not.
    logits = [f"{kind}[{shape}]" for (kind, shape), n in sizes.items() if n >= tokens * vocab and n % vocab == 0]
    largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:5]
    held = sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(teacher)) / mesh.size
    return {
        "tokens x vocabulary": tokens * vocab,
        "logits": logits,
        "largest": {f"{kind}[{shape}]": sizes[kind, shape] for kind, shape in largest},
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
        "teacher beside": held,
        "hbm": slice_.generation.hbm / slice_.generation.devices_per_chip,
        "seconds": time.monotonic() - began,
    }


def _entries(shape: str) -> int:
    return math.prod(map(int, shape.split(",")))


def _wrap(topology: str) -> tuple[bool, ...]:
    """Which axes of a slice are rings: all three of a slice in multiples of 4 chips, an axis of 16 of a flat one."""
    chips = [int(size) for size in topology.split(":")[1].split("x")]
    if len(chips) == 3:
        return (all(size % 4 == 0 for size in chips),) * 3
    return tuple(size == 16 for size in chips)


def main(args: Args) -> None:
    """Compile, print, and fail if an array is as large as tokens x vocabulary or the step does not fit."""
    if args.model not in PUBLISHED:
        sys.exit(f"model {args.model!r} is not known here: use one of {', '.join(PUBLISHED)}")
    found = compile_step(args)
    total = found["arguments"] + found["temporaries"] + found["teacher beside"]
    fits = total < found["hbm"]
    if args.json:
        print(json.dumps({**found, "fits": fits}, indent=2))
    else:
        tokens = args.rows * args.row_tokens
        table = Table(title=f"{args.model}, distillation step, {args.topology}, {tokens:,} tokens a device")
        table.add_column("on each device")
        table.add_column("", justify="right")
        for name in ("arguments", "temporaries", "teacher beside", "hbm"):
            table.add_row(name, f"{found[name] / GIB:.2f} GiB")
        table.add_row("tokens x vocabulary", f"{found['tokens x vocabulary']:,} entries")
        for name, entries in found["largest"].items():
            table.add_row(f"  {name}", f"{entries:,} entries")
        table.add_row("compiled in", f"{found['seconds']:.0f} s")
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    if found["logits"] or not fits:
        sys.exit(f"the step does not fit, or holds logits of all its tokens: {found['logits'] or 'none of these'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
