"""Programs compiled for TPUs that are not here; prints as JSON what each holds and sends. Run by test_tpu.py."""

import json
import os
import re
from functools import partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.topologies import get_topology_desc

from posttrain.launch import flags
from posttrain.launch.compiled import environment
from posttrain.model import flash
from posttrain.model.config import ModelConfig
from posttrain.sharding import mesh as meshes
from posttrain.train import programs, sft, state, stop
from posttrain.train.compute import Compute
from posttrain.train.optimizer import AdamW

GENERATIONS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
CONFIG = ModelConfig(
    vocab_size=24_576,
    embed_dim=512,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    mlp_dim=1536,
    context=1024,
)
AXES = (("embed", None), ("batch", None))
KERNELS = 3
"""Forward, dK and dV, dQ."""
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def kernels(devices: Any, dim: int) -> int:
    """Attention, forward and backward, on one device: the number of kernels in the compiled program."""
    mesh = meshes.make_mesh(devices=devices[:1])

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
        out = flash.attend(query, key, value, (segments, segments), jnp.zeros(1, jnp.int32))
        return jnp.sum(out.astype(jnp.float32))

    where = meshes.replicated(mesh)
    like = partial(jax.ShapeDtypeStruct, sharding=where)
    arrays = [like((1, heads, 1300, dim), jnp.bfloat16) for heads in (4, 2, 2)]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    with jax.set_mesh(mesh):
        text = gradient.lower(*arrays, like((1, 1300), jnp.int32)).compile().as_text() or ""
    return text.count('custom_call_target="tpu_custom_call"')


def presets(generation: str, devices: Any) -> dict[str, str]:
    """What the compiler says of each preset, for a small sharded gradient: nothing, or why it refuses."""
    mesh = meshes.make_mesh(data=2, fsdp=2, devices=devices[:4])
    place = lambda *axes: meshes.sharding(axes, (1024, 1024), mesh)  # noqa: E731
    weights, inputs = (jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=place(*axes)) for axes in AXES)
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w) @ w.T).astype(jnp.float32)))
    with jax.set_mesh(mesh):
        lowered, found = gradient.lower(weights, inputs), {}
    for name in flags.PRESETS:
        try:
            options: Any = flags.options(name, generation, metadata.version("libtpu"))
        except ValueError:
            continue
        try:
            lowered.compile(compiler_options=options)
            found[name] = ""
        except jax.errors.JaxRuntimeError as error:
            found[name] = str(error)
    return found


def train_step(topology: str) -> dict[str, Any]:
    """The SFT step of a small model, its parameters split over all devices."""
    mesh = meshes.make_mesh(devices=get_topology_desc(platform="tpu", topology_name=topology).devices)
    compute = Compute(dtype="bfloat16", remat="full", row_tokens=CONFIG.context, micro_rows=mesh.size)
    config = compute.configure(CONFIG)
    optimizer = AdamW(learning_rate=1e-5).build(10)
    arguments = state.abstract(config, optimizer, mesh), programs.abstract_batch(compute, mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(sft.train_step(config, optimizer), donate_argnums=0).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    return {
        "devices": mesh.size,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "largest": max(map(_size, re.findall(r" = \w+\[([\d,]+)\]", text))),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "outside": [_size(shape) for line in _outside_loops(text) for shape in _collectives(line)],
    }


def _size(shape: str) -> int:
    size = 1
    for length in shape.split(","):
        size *= int(length)
    return size


def _collectives(line: str) -> list[str]:
    """Shapes of what a collective operation gives; none for other lines."""
    found = re.search(rf" = (.*?) (?:{COLLECTIVES})(?:-start)?\(", line)
    return re.findall(r"\w+\[([\d,]+)\]", found[1]) if found else []


def _outside_loops(text: str) -> list[str]:
    """Lines of the computations that no loop's body reaches."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%([\w.-]+) \(", line):
            name = head[1]
        bodies.setdefault(name, []).append(line)
    calls = {name: set(re.findall(r"=%([\w.-]+)", " ".join(lines))) & set(bodies) for name, lines in bodies.items()}
    inside = set(re.findall(r"body=%([\w.-]+)", text))
    while new := {called for name in inside for called in calls.get(name, ())} - inside:
        inside |= new
    return [line for name, lines in bodies.items() if name not in inside for line in lines]


def main() -> None:
    os.environ.update(environment(os.environ))
    jax.config.update("jax_platforms", "cpu")
    found: dict[str, Any] = {"step": train_step("v5p:2x2x1"), "kernels": {}, "presets": {}}
    for generation, name in GENERATIONS.items():
        devices = get_topology_desc(platform="tpu", topology_name=name).devices
        found["presets"][generation] = presets(generation, devices)
        for dim in (64, 128):
            found["kernels"][f"{generation} {dim}"] = kernels(devices, dim)
    megacore = get_topology_desc(platform="tpu", topology_name="v4:2x2x1", chip_config_name="megacore")
    found["presets"]["v4"] = presets("v4", megacore.devices)
    print(json.dumps(found))


if __name__ == "__main__":
    stop.leave_after(main)
