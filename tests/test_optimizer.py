"""Optimizers: schedules by hand, where their states lie, what they do, and the copies of the weights they keep."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posttrain.model import config as configs
from posttrain.model import transformer
from posttrain.sharding import mesh as meshes
from posttrain.train import optimizer as optimizers
from posttrain.train import state as states
from posttrain.train.optimizer import Adafactor, AdamW, Muon

CONFIG = configs.ModelConfig(
    vocab_size=256, embed_dim=128, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=128, mlp_dim=256, context=32
)
OPTIMIZERS = {
    "adamw": AdamW(learning_rate=0.1, ema=0.9),
    "muon": Muon(learning_rate=0.1),
    "adafactor": Adafactor(learning_rate=0.1),
}


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.85, 0.7, 0.55, 0.4, 0.25]),
        ("wsd", [0.5, 1, 1, 1, 1, 1, 0.7, 0.4]),
    ],
)
def test_schedules_by_hand(schedule, rates):
    settings = {"learning_rate": 2.0, "warmup_steps": 2, "final": 0.1, "decay": 0.375}
    rate = AdamW(schedule=schedule, **settings).rate(8)
    np.testing.assert_allclose([np.asarray(rate(step)) / 2 for step in range(8)], rates, rtol=1e-5)


def test_a_cosine_ends_at_its_final_share():
    rate = AdamW(learning_rate=2.0, schedule="cosine", final=0.1).rate(10)
    np.testing.assert_allclose([np.asarray(rate(step)) for step in (0, 5, 10)], [2.0, 1.1, 0.2], rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_lies_like_the_parameters_and_a_step_keeps_it_there(name):
    mesh = meshes.make_mesh(fsdp=4, tensor=2)
    optimizer = OPTIMIZERS[name].build(3)
    params = jax.jit(
        lambda key: transformer.init(CONFIG, key), out_shardings=transformer.shardings(CONFIG, mesh)
    )(jax.random.key(0))  # fmt: skip
    now, planned = states.create(params, optimizer, mesh), states.abstract(CONFIG, optimizer, mesh)
    large = 0
    for leaf, like in zip(jax.tree.leaves(now.opt_state), jax.tree.leaves(planned.opt_state), strict=True):
        assert leaf.sharding == like.sharding and leaf.shape == like.shape
        if leaf.size >= CONFIG.embed_dim**2:
            large += leaf.size
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size
    per_parameter = large / sum(leaf.size for leaf in jax.tree.leaves(params))
    assert {"adamw": 2.9, "muon": 0.9, "adafactor": 0}[name] <= per_parameter < {"adamw": 3, "muon": 1.4}.get(name, 0.1)

    where = jax.tree.map(lambda x: x.sharding, (now.params, now.opt_state))

    def step(params, opt_state):
        updates, opt_state = optimizer.update(jax.tree.map(jnp.sin, params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    moved, _ = jax.jit(step, out_shardings=where)(now.params, now.opt_state)
    alone = jax.device_get(now)
    expected, _ = jax.jit(step)(alone.params, alone.opt_state)
    for a, b, before in zip(*map(jax.tree.leaves, (moved, expected, params)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)
        assert np.any(np.asarray(a) != np.asarray(before))


def test_muon_orthogonalises_each_layers_matrices_from_inputs_to_outputs():
    params = transformer.init(CONFIG, jax.random.key(1))
    gradient = transformer.init(CONFIG, jax.random.key(2))
    optimizer = Muon(learning_rate=1.0, rms=0.2, clip_norm=1e9).build(1)
    updates: Any = optimizer.update(gradient, optimizer.init(params), params)[0]
    attention = updates["layers"]["attention"]
    wide = {
        "q": np.asarray(attention["q"]).reshape(2, 128, 256),
        "o": np.asarray(attention["o"]).reshape(2, 256, 128),
        "down": np.asarray(updates["layers"]["mlp"]["down"]),
    }
    for name, matrices in wide.items():
        singular = np.linalg.svd(matrices, compute_uv=False) / (0.2 * max(matrices.shape[1:]) ** 0.5)
        assert np.quantile(singular, 0.1) > 0.4 and np.max(singular) < 1.4, name
        assert 0.1 < np.sqrt(np.mean(matrices**2)) < 0.25, name


def test_the_average_and_the_reference_follow_the_weights_as_they_should():
    optimizer = optimizers.with_reference(AdamW(learning_rate=0.1, ema=0.75).build(5), every=2)
    params: Any = {"w": jnp.asarray([1.0, -2.0])}
    opt_state, average, seen = optimizer.init(params), np.asarray(params["w"]), [np.asarray(params["w"])]
    for _ in range(5):
        updates, opt_state = optimizer.update({"w": jnp.asarray([1.0, -1.0])}, opt_state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["w"]))
        average = 0.75 * average + 0.25 * seen[-1]
        done = len(seen) - 1
        np.testing.assert_array_equal(optimizers.reference_of(opt_state)["w"], seen[done - done % 2])
    np.testing.assert_allclose(optimizers.average_of(opt_state)["w"], average, rtol=1e-6)
    assert optimizers.average_of(AdamW(learning_rate=0.1).build(1).init(params)) is None


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="ema is 1.0"):
        AdamW(learning_rate=0.1, ema=1.0)
    with pytest.raises(ValueError, match="decay is 0"):
        Muon(learning_rate=0.1, schedule="wsd", decay=0.0)
