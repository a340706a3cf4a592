"""Compiles for a TPU topology in a process of its own, for test_plan.py: python tpu_programs.py TOPOLOGY SLICES CACHE.

Prints JSON: the plan of every program of every stage, and, for the first topology, what the planner's sums are checked
against.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from test_stages import COMPUTE, STAGES

from posttrain.launch import compiled, cost, hlo, plan
from posttrain.model import config as configs
from posttrain.model import transformer
from posttrain.sharding import mesh as meshes
from posttrain.sharding import topology as topologies
from posttrain.train import programs, sft, state, stop
from posttrain.train.optimizer import AdamW
from posttrain.train.updater import abstract_sums, jit_accumulate

CHECKED = configs.TINY.replace(
    vocab_size=4096, embed_dim=512, head_dim=128, mlp_dim=1024, tie_embeddings=False, dtype="bfloat16"
)


def stages(topology, mesh, cache):
    """Plans of all programs, by stage and program."""
    found = {}
    for index, stage in enumerate(STAGES):
        planned = plan.configured(stage, {}).programs(mesh)
        with jax.set_mesh(mesh):
            rows = {name: plan.program(one, topology, mesh, cache) for name, one in planned.items()}
        found[f"{index} {type(stage).__name__}"] = rows
    return found


def unrolled(mesh):
    """FLOPs and bytes of a step on one device with every loop written out: ours, and the compiler's own.

    Traced without `jax.set_mesh` and with short rows, so that it attends by einsum, to all rows at once: what a kernel
    does inside and what a loop repeats, the compiler does not count.
    """
    loss = sft.loss(CHECKED)
    one = meshes.make_mesh(devices=mesh.devices.flat[:1])
    where = meshes.replicated(one)
    params = transformer.abstract_params(CHECKED)
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params["layers"])
    params = {**params, "layers": (layer,) * CHECKED.num_layers}
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), params)
    batch = programs.abstract_batch(dataclasses.replace(COMPUTE, row_tokens=128, micro_rows=8), one)
    traced = jax.jit(jax.value_and_grad(lambda p, b: loss(p, b)[0])).trace(params, batch)
    made = traced.lower().compile()
    analysis, memory = made.cost_analysis(), made.memory_analysis()
    text = made.as_text()
    assert analysis and memory and text
    module = hlo.parse(text)
    return {
        "flops": [cost.matmul_flops(traced.jaxpr), analysis["flops"]],
        "bytes": [module.bytes_accessed(hbm_only=False), analysis["bytes accessed"]],
        "arguments": [cost.array_bytes((params, batch)), memory.argument_size_in_bytes],
    }


def by_layers(mesh):
    """Collectives of a sharded step of models with 2 and 6 layers: how often each kind happens."""
    found = {}
    for layers in (2, 6):
        config = CHECKED.replace(num_layers=layers)
        params = state.abstract(config, AdamW(learning_rate=1.0).build(1), mesh).params
        batch = programs.abstract_batch(dataclasses.replace(COMPUTE, row_tokens=256, micro_rows=4), mesh)
        with jax.set_mesh(mesh):
            sums = abstract_sums(sft.loss(config), mesh, params, batch)
            function = jit_accumulate(sft.loss(config), sums)
            made = programs.Program(function=function, arguments=(sums, params, batch)).trace().lower().compile()
        module = hlo.parse(made.as_text())
        found[layers] = [[one.kind, one.times, one.bytes] for one in module.collectives()]
    return found


def too_large(topology, mesh, cache):
    """The plan of a program that wants more memory than there is."""
    big = jax.ShapeDtypeStruct((2**17, 2**17), jnp.float32, sharding=meshes.replicated(mesh))
    one = programs.Program(function=jax.jit(lambda x: (x @ x) @ x), arguments=(big,))
    with jax.set_mesh(mesh):
        return plan.program(one, topology, mesh, cache)


def donated(topology, mesh, cache):
    """Four layers of 4,096 x 4,096 that lose their gradient, the old weights' place taken by the new."""
    rows, width, layers = 8192, 4096, 4
    w = jax.ShapeDtypeStruct((layers, width, width), jnp.float32, sharding=meshes.replicated(mesh))
    x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16, sharding=meshes.replicated(mesh))

    def loss(w, x):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None), prevent_cse=False)
        return jnp.sum(jax.lax.scan(step, x, w)[0].astype(jnp.float32))

    function = jax.jit(lambda w, x: w - jax.grad(loss)(w, x), donate_argnums=0)
    with jax.set_mesh(mesh):
        return plan.program(programs.Program(function=function, arguments=(w, x)), topology, mesh, cache)["memory"]


def main() -> None:
    name, slices, cache = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    topology = topologies.parse(name, slices=slices)
    mesh = compiled.make_mesh(topology, {"tensor": 2}, None)
    found = {"stages": stages(topology, mesh, cache)}
    if name == "v5e:2x2" and slices == 1:
        flat = compiled.make_mesh(topology, {}, None)
        found |= {"unrolled": unrolled(mesh), "layers": by_layers(flat), "too large": too_large(topology, mesh, cache)}
        found["donated"] = donated(topology, flat, cache)
    print(json.dumps(found))


if __name__ == "__main__":
    stop.leave_after(main)
