"""Merging whole models: exact where it should be, array by array like the whole tree, and only what fits together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.data import tokenizer as tokenizers
from posttrain.model import hf
from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint, merge, merge_math
from posttrain.train.merge import Dare, Linear, Slerp, TaskArithmetic, Ties


def mesh():
    return meshes.make_mesh(devices=jax.devices()[:1])


@functools.cache
def stored(folder):
    """The parameters of a stored model by name."""
    return dict(checkpoint.leaves(folder, mesh()))


def perturbed(model, seed):
    leaves, tree = jax.tree.flatten(model.params)
    rng = np.random.default_rng(seed)
    moved = [leaf + jnp.asarray(0.02 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return model._replace(params=jax.tree.unflatten(tree, moved))


@pytest.fixture(scope="module")
def base():
    return checkpoint.open_model("tiny", mesh())


@pytest.fixture(scope="module")
def models(base, tmp_path_factory):
    """Paths of a base and two fine-tuned models, `a` and `b`."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in {"base": base, "a": perturbed(base, 1), "b": perturbed(base, 2)}.items():
        checkpoint.save_model(folder / name / "model", model)
    return {name: str(folder / name) for name in ("base", "a", "b")}


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: Linear(models=(a, a)),
        lambda a, b: Linear(models=(a, b), weights=(1.0, 0.0)),
        lambda a, b: Slerp(models=(a, b), base=b, t=0.0),
    ],
    ids=["equal models", "weights 1 and 0", "slerp at 0"],
)
def test_a_merge_that_is_one_of_its_models_is_that_model_bit_for_bit(make, models, tmp_path):
    make(models["a"], models["b"]).train(tmp_path / "merged", mesh())
    merged, expected = stored(tmp_path / "merged"), stored(models["a"])
    assert merged.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(np.asarray(merged[name]), np.asarray(leaf))


def test_ties_of_two_equal_models_untrimmed_is_that_model(models, tmp_path):
    Ties(models=(models["a"], models["a"]), base=models["base"], density=1.0).train(tmp_path / "merged", mesh())
    for name, leaf in stored(models["a"]).items():
        np.testing.assert_allclose(stored(tmp_path / "merged")[name], leaf, atol=1e-7)


def merged_leaves(models, names, how):
    """What `how` makes of the given arrays of a, b and base; stacked layers one by one."""
    sources = [stored(models[source]) for source in ("a", "b", "base")]
    for name in names:
        arrays = [source[name] for source in sources]
        yield name, jnp.stack([how(*one) for one in zip(*arrays, strict=True)]) if "layers" in name else how(*arrays)


def test_merging_array_by_array_equals_merging_the_whole_tree_layer_by_layer(models, tmp_path):
    stage = Ties(models=(models["a"], models["b"]), base=models["base"], density=0.3)
    stage.train(tmp_path / "merged", mesh())
    merged, base = stored(tmp_path / "merged"), stored(models["base"])
    assert [(name, x.shape, x.dtype) for name, x in merged.items()] == [(n, x.shape, x.dtype) for n, x in base.items()]

    def how(a, b, base):
        return merge_math.ties(base, [a, b], density=0.3)

    for name, expected in merged_leaves(models, ("embedding", "layers.mlp.up", "final_norm"), jax.jit(how)):
        np.testing.assert_allclose(merged[name], expected, atol=1e-6, err_msg=name)
    stacked = [stored(models[source])["layers.mlp.up"] for source in ("a", "b", "base")]
    assert np.max(np.abs(merged["layers.mlp.up"] - how(*stacked))) > 1e-3


def test_dare_drops_by_seed_and_name_alone(models, tmp_path):
    stage = Dare(models=(models["a"], models["b"]), base=models["base"], drop=0.5, seed=1)
    stage.train(tmp_path / "merged", mesh())
    name, merged = "embedding", stored(tmp_path / "merged")
    sources = [stored(models[source])[name] for source in ("a", "b", "base")]
    np.testing.assert_allclose(merged[name], stage.tensor(name, sources), atol=1e-7)
    assert np.mean(np.asarray(merged[name]) != np.asarray(stage.tensor("another", sources))) > 0.3
    untouched = np.mean(np.asarray(merged[name]) == np.asarray(sources[-1]))
    assert 0.2 < untouched < 0.3


def test_a_base_in_another_format_gives_the_same_merge(base, models, tmp_path):
    hf.save_hf(tmp_path / "base", base.config, base.params)
    base.tokenizer.save(tmp_path / "base")
    stage = TaskArithmetic(models=(models["a"], models["b"]), base=str(tmp_path / "base"), weights=(0.5, 0.25))
    stage.train(tmp_path / "merged", mesh())

    def how(a, b, base):
        return merge_math.task_arithmetic(base, [a, b], weights=[0.5, 0.25])

    for name, expected in merged_leaves(models, ("embedding", "layers.attention.k"), how):
        np.testing.assert_allclose(stored(tmp_path / "merged")[name], expected, atol=1e-7)


def test_a_merge_over_eight_devices_is_the_merge_of_one(models, tmp_path):
    eight = meshes.make_mesh(fsdp=2, tensor=4)
    Linear(models=(models["a"], models["b"])).train(tmp_path / "merged", eight)
    for name, leaf in stored(tmp_path / "merged").items():
        halves = [stored(models[source])[name] for source in ("a", "b")]
        np.testing.assert_allclose(leaf, merge_math.linear(halves, [1.0, 1.0]), atol=1e-7)
    stage, name = Ties(models=(models["a"], models["b"]), base=models["base"], density=0.3), "layers.mlp.gate"
    one, spread = (
        jax.jit(lambda *leaves: stage._leaf(name, leaves))(
            *(dict(checkpoint.leaves(path, where))[name] for path in stage.sources())
        )
        for where in (mesh(), eight)
    )
    assert len({str(shard.index) for shard in spread.addressable_shards}) > 1
    np.testing.assert_allclose(spread, one, atol=1e-7)


def test_models_that_do_not_belong_together_are_refused_by_the_field_that_differs(base, models, tmp_path):
    longer = base._replace(config=base.config.replace(rope_theta=5000.0))
    checkpoint.save_model(tmp_path / "longer" / "model", longer)
    with pytest.raises(
        ValueError, match="has rope_theta 10000.0 and .*longer has 5000.0: only models of one architecture"
    ):
        Linear(models=(models["a"], str(tmp_path / "longer"))).train(tmp_path / "x", mesh())
    other = tokenizers.tiny()
    other.backend.add_special_tokens(["<|new|>"])
    checkpoint.save_model(tmp_path / "other" / "model", base._replace(tokenizer=other))
    with pytest.raises(ValueError, match="different tokenizers: their weights mean different tokens"):
        Linear(models=(models["a"], str(tmp_path / "other"))).train(tmp_path / "y", mesh())
    with pytest.raises(ValueError, match="at least two models"):
        Linear(models=(models["a"],)).train(tmp_path / "z", mesh())
    assert not (tmp_path / "x" / "model").exists()


def test_models_that_compute_differently_may_be_merged(base, models, tmp_path):
    checkpoint.save_model(tmp_path / "half" / "model", base._replace(config=base.config.replace(dtype="bfloat16")))
    assert merge.compatible((models["a"], str(tmp_path / "half"))).dtype == "float32"
