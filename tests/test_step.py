"""A step is the same for any split of its batch into micro-batches, padding, packing or devices."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posttrain.data.pack import Example, Group, pack_groups
from posttrain.model import config as configs
from posttrain.model import transformer
from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint, rl, sft, state, step, teaching
from posttrain.train.objective import UnbiasedKL
from posttrain.train.optimizer import AdamW
from posttrain.train.updater import Updater, micro_batches

CONFIG = configs.ModelConfig(
    vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=64, context=32,
    tie_embeddings=True, init_std=0.2,
)  # fmt: skip
ROWS, LENGTH = 8, 16
ADAM = AdamW(learning_rate=1e-2, eps=1e-4).build(3)
FIELDS = ("advantage", "behavior_logp", "old_logp", "reference_logp", "teacher_logp")
LOSSES = {
    "sft": sft.loss(CONFIG),
    "rl": rl.loss(CONFIG, rl.Objective(kl=UnbiasedKL(weight=0.1))),
    "sampled": teaching.SampledToken(outcome=0.3).loss(CONFIG),
    "full": teaching.FullVocabulary(chunk=24, outcome=0.3).loss(CONFIG),
}
SPLITS = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def one_device():
    return meshes.make_mesh(devices=jax.devices()[:1])


@functools.cache
def maker(mesh):
    return jax.jit(partial(transformer.init, CONFIG), out_shardings=transformer.shardings(CONFIG, mesh))


def initial(mesh, seed=0):
    return maker(mesh)(jax.random.key(seed))


@pytest.fixture(scope="module")
def batch():
    """Eight rows with very different numbers of counted tokens, and every field that a loss may ask for."""
    rng = np.random.default_rng(0)

    def example(size):
        fields = {name: rng.normal(-4, 0.3, size) for name in FIELDS[1:]}
        return Example(
            tokens=rng.integers(0, 64, size),
            mask=np.ones(size, np.float32),
            fields={"advantage": rng.normal(0, 1, size), **fields},
        )

    groups = [Group(prompt=rng.integers(0, 64, 3), answers=[example(size)]) for size in (14, 13, 13, 12, 2, 1, 1)]
    packed = dict(pack_groups(groups, length=LENGTH, rows=ROWS, fields=FIELDS).batch)
    packed["teacher_hidden"] = rng.normal(0, 1, (ROWS, LENGTH, 32)).astype(np.float32)
    assert len(set(packed["mask"].sum(axis=1).tolist())) > 3
    return packed


def close(left, right, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol), left, right)


def constants(name, mesh):
    return teaching.FullVocabulary().constants(initial(mesh, seed=9)) if name == "full" else ()


def three_steps(name, split, batch):
    """Parameters and metrics after three steps on a (data, fsdp, tensor) mesh, or on one device."""
    mesh = meshes.make_mesh(data=split[0], fsdp=split[1], tensor=split[2]) if split else one_device()
    now = state.create(initial(mesh), ADAM, mesh)
    before = [leaf.sharding for leaf in jax.tree.leaves(now)]
    batch = jax.device_put(batch, meshes.batch_shardings(batch, mesh))
    metrics = {}
    with jax.set_mesh(mesh):
        train = jax.jit(
            step.make_train_step(LOSSES[name], ADAM), out_shardings=(jax.tree.map(lambda x: x.sharding, now), None)
        )
        for _ in range(3):
            now, metrics = train(now, batch, *constants(name, mesh))
    assert [leaf.sharding for leaf in jax.tree.leaves(now)] == before
    return jax.device_get((now.params, metrics))


@pytest.fixture(scope="module")
def unsharded(batch):
    return {name: three_steps(name, None, batch) for name in LOSSES}


@pytest.mark.parametrize(
    "name, split", [*(("sft", split) for split in SPLITS), *((n, (2, 2, 2)) for n in list(LOSSES)[1:])]
)
def test_three_sharded_steps_are_three_unsharded_steps(name, split, batch, unsharded):
    params, metrics = three_steps(name, split, batch)
    close(params, unsharded[name][0], 2e-5)
    close(metrics, unsharded[name][1], 1e-4)


def test_those_steps_move_the_parameters_far(batch, unsharded):
    for name, (params, _) in unsharded.items():
        moved = jax.tree.map(lambda a, b: float(np.mean(np.abs(a - b))), params, jax.device_get(initial(one_device())))
        assert moved["embedding"] > 1e-3, name


@functools.cache
def descent(name, accumulate):
    return jax.jit(step.make_train_step(LOSSES[name], optax.sgd(1.0), accumulate=accumulate))


def one_step(batch, accumulate=1, name="sft"):
    """Minus the gradient, by plain gradient descent with rate 1, and the metrics."""
    now = state.create(initial(one_device()), optax.sgd(1.0), one_device())
    after, metrics = descent(name, accumulate)(now, batch)
    return jax.tree.map(jnp.subtract, after.params, now.params), metrics


@pytest.fixture(scope="module")
def whole(batch):
    return one_step(batch)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulated_micro_batches_are_one_batch(batch, whole, accumulate):
    update, metrics = one_step(batch, accumulate)
    close(update, whole[0], 1e-6)
    close(metrics, whole[1], 1e-5)


def test_the_gradient_is_of_the_global_mean_and_not_of_the_mean_of_means(batch, whole):
    def mean(params, rows):
        total, weight, _ = LOSSES["sft"](params, rows)
        return total / jnp.maximum(weight, 1.0)

    gradient = jax.jit(jax.grad(mean))
    params = initial(one_device())
    descent = jax.tree.map(jnp.negative, gradient(params, batch))
    close(whole[0], descent, 1e-6)
    halves = [gradient(params, {name: x[half::2] for name, x in batch.items()}) for half in range(2)]
    mean_of_means = jax.tree.map(lambda a, b: -(a + b) / 2, *halves)
    assert np.max(np.abs(mean_of_means["embedding"] - whole[0]["embedding"])) > 1e-3


def test_padded_rows_change_nothing(batch, whole):
    padded = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in batch.items()}
    update, metrics = one_step(padded)
    close(update, whole[0], 1e-6)
    close(metrics, whole[1], 1e-5)


def test_without_a_counted_token_nothing_moves_and_nothing_is_nan(batch):
    for name in ("sft", "rl", "sampled"):
        update, metrics = one_step({**batch, "mask": np.zeros_like(batch["mask"])}, name=name)
        assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(update)), name
        assert all(np.isfinite(value) for value in metrics.values()), name


@pytest.mark.parametrize("rows", [3])
def test_the_updater_takes_the_same_step_in_micro_batches(batch, whole, rows):
    mesh, descent = one_device(), optax.sgd(1.0)
    updater = Updater(LOSSES["sft"], descent, mesh)
    now = state.create(initial(mesh), descent, mesh)
    sums = None
    for micro in micro_batches(batch, rows, mesh):
        assert micro["tokens"].shape == (rows, LENGTH)
        sums = updater.add(sums, now, micro)
    assert sums is not None
    after, metrics = updater.finish(now, sums)
    close(jax.tree.map(jnp.subtract, after.params, initial(mesh)), whole[0], 1e-6)
    close(metrics, whole[1], 1e-5)
    assert int(after.step) == 1
    compiled = updater._accumulate, updater._update
    assert [program._cache_size() for program in compiled] == [1, 1]  # pyright: ignore


def test_the_state_is_made_sharded_and_no_device_holds_a_whole_matrix():
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    model = checkpoint.open_model("tiny", mesh)
    optimizer = AdamW(learning_rate=1e-3).build(1)
    now = state.create(model.params, optimizer, mesh)
    matrices = [leaf for leaf in jax.tree.leaves(now) if leaf.ndim > 1 and leaf.shape[-1] != 1]
    assert len(matrices) >= 3 * 8
    for leaf in matrices:
        norm = leaf.shape == (2, 128)  # the layers' norms are replicated
        parts = 2 if model.config.vocab_size in leaf.shape else 4  # a vocabulary of 267 does not split over tensor
        held = {shard.data.size for shard in leaf.addressable_shards}
        assert held == {leaf.size if norm else leaf.size // parts}, leaf.shape
    abstract = state.abstract(model.config, optimizer, mesh)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), now, abstract)
    assert all(jax.tree.leaves(same))


def test_a_tiny_model_learns_one_batch_by_heart(batch):
    mesh, optimizer = one_device(), AdamW(learning_rate=3e-3).build(100)
    train = jax.jit(sft.train_step(CONFIG, optimizer), donate_argnums=0)
    now, losses = state.create(initial(mesh), optimizer, mesh), []
    for _ in range(100):
        now, metrics = train(now, batch)
        losses.append(metrics["loss"])
    assert losses[0] > 3.5 and losses[-1] < 0.05
