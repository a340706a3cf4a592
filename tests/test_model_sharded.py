"""A model spread over eight devices computes what it computes on one, and never lies whole on any of them."""

import math
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import model
from posttrain.model import transformer
from posttrain.model.materialise import materialise
from posttrain.sharding import mesh as meshes

CONFIG = model.ModelConfig(
    vocab_size=96, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, attention_bias=True
)
SPLITS = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 1, "tensor": 8},
    {"data": 1, "fsdp": 4, "context": 2},
]


def random_params(config: model.ModelConfig):
    rng = np.random.default_rng(0)
    shapes = transformer.abstract_params(config)
    return jax.tree.map(lambda leaf: rng.normal(0.0, 0.2, leaf.shape).astype(np.float32), shapes)


def logp_and_gradient(params, tokens, segments):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def loss(params):
        hidden, _ = model.apply(CONFIG, params, tokens, positions=positions, segments=segments)
        logp = model.token_logp(CONFIG, params, hidden, jnp.roll(tokens, -1, axis=1), chunk=32)
        return jnp.sum(logp), logp

    return jax.grad(loss, has_aux=True)(params)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, CONFIG.vocab_size, (8, 8), dtype=np.int32)
    return tokens, np.repeat([[1024, 2048]], [5, 3], axis=1).repeat(8, axis=0).astype(np.int32)


@pytest.fixture(scope="module")
def unsharded(inputs):
    return jax.device_get(jax.jit(logp_and_gradient)(random_params(CONFIG), *inputs))


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_sharded_log_probabilities_and_gradients_equal_unsharded_ones(inputs, unsharded, split):
    mesh = meshes.make_mesh(**split)
    params = jax.device_put(random_params(CONFIG), transformer.shardings(CONFIG, mesh))
    batch = jax.device_put(inputs, meshes.batch_shardings(inputs, mesh))
    with jax.set_mesh(mesh):
        gradient, logp = jax.jit(logp_and_gradient)(params, *batch)
    expected_gradient, expected_logp = unsharded
    np.testing.assert_allclose(logp, expected_logp, rtol=1e-4, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), gradient, expected_gradient)


def test_init_with_shardings_never_makes_a_whole_matrix_on_one_device():
    mesh = meshes.make_mesh(data=1, fsdp=4, tensor=2)
    config = CONFIG.replace(attention_bias=False)
    places = transformer.shardings(config, mesh)
    program = jax.jit(partial(model.init, config), out_shardings=places).lower(jax.random.key(0)).compile()
    parts = jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), transformer.abstract_params(config), places)
    largest = max(math.prod(shape) for shape in jax.tree.leaves(parts, is_leaf=lambda x: isinstance(x, tuple)))
    found = re.findall(r"(?:f|u|s)(?:8|16|32|64)\[([\d,]+)\]", program.as_text() or "")
    sizes = {math.prod(map(int, shape.split(","))) for shape in found}
    assert largest in sizes
    assert max(sizes) <= 2 * largest, (
        f"the program of one device holds {max(sizes)} numbers, its largest part is {largest}"
    )


def test_a_loaded_model_lies_where_the_mesh_says_and_is_saved_from_there(tmp_path):
    params = random_params(CONFIG)
    model.save_hf(tmp_path / "one", CONFIG, params)
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    config, loaded = model.load(tmp_path / "one", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    places = transformer.shardings(config, mesh)
    assert jax.tree.all(jax.tree.map(lambda leaf, place: leaf.sharding == place, loaded, places))
    gate = loaded["layers"]["mlp"]["gate"]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 16, 32)}
    model.save_hf(tmp_path / "two", config, loaded)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_loading_reads_every_tensor_once_whatever_the_mesh():
    params = random_params(CONFIG)
    reads: list[tuple[str, tuple[int, ...]]] = []

    def read_tensor(name: str, index: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        reads.append((name, index))
        assert (not index) == (name in ("embedding", "head", "final_norm"))
        return np.zeros(shape, np.float16)

    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    loaded = materialise(CONFIG, read_tensor, mesh=mesh)
    assert len(set(reads)) == len(reads)
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, params)


IN_FLIGHT = """
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from posttrain.sharding import mesh as meshes

where = NamedSharding(meshes.make_mesh(data=2, fsdp=1), PartitionSpec("data"))
program = jax.jit(lambda x: jnp.tanh(x + (0.5 * x).sum(0) + jnp.tanh(x).sum()), out_shardings=where)
values = [jax.device_put(jnp.full((64, 64), 1.0), where) for _ in range(4)]
for _ in range(100):
    for _ in range(10):
        values = [program(value) for value in values]
    jax.block_until_ready(values)
"""


def test_several_programs_at_a_time_do_not_wait_for_each_other_for_ever():
    limits = {"warn_stuck_timeout": 5, "terminate_timeout": 5}
    flags = " ".join(f"--xla_cpu_collective_call_{name}_seconds={value}" for name, value in limits.items())
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    environment |= {"XLA_FLAGS": flags, "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(
        [sys.executable, "-c", IN_FLIGHT], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
