"""Merging of models, one tensor at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.train import merge_math

BASE, A, B, C = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 5)), jnp.float32)
ties = jax.jit(merge_math.ties, static_argnames=("density", "scale"))
trim = jax.jit(merge_math.trim, static_argnames="density")
dare = jax.jit(merge_math.dare, static_argnames=("drop", "weights", "scale"))
KEY = jax.random.key(7)


def numpy_ties(base, leaves, density, scale):
    taus = [np.asarray(leaf, np.float64) - np.asarray(base, np.float64) for leaf in leaves]
    for tau in taus:
        kept = np.argsort(-np.abs(tau), axis=None)[: round(density * tau.size)]
        mask = np.zeros(tau.size, bool)
        mask[kept] = True
        tau[~mask.reshape(tau.shape)] = 0
    merged = np.zeros_like(taus[0])
    for index in np.ndindex(*merged.shape):
        entries = np.array([tau[index] for tau in taus])
        agreeing = entries[np.sign(entries) == np.sign(entries.sum())]
        agreeing = agreeing[agreeing != 0]
        merged[index] = agreeing.mean() if agreeing.size else 0
    return np.asarray(base) + scale * merged


def test_linear_normalises_its_weights_and_equals_numpy():
    weights = (1.0, 2.0, 5.0)
    expected = np.average(np.stack([A, B, C]), axis=0, weights=weights)
    np.testing.assert_allclose(merge_math.linear([A, B, C], weights), expected, atol=1e-6)
    np.testing.assert_array_equal(merge_math.linear([A, B], (1.0, 1.0)), merge_math.linear([A, B], (0.5, 0.5)))


def test_linear_with_one_weight_returns_that_model_bit_for_bit():
    odd = A.at[0, 0].set(-0.0).at[0, 1].set(1e-42)
    broken = B.at[0, 0].set(jnp.nan)
    merged = merge_math.linear([odd, broken], (3.0, 0.0))
    np.testing.assert_array_equal(np.asarray(merged).view(np.uint32), np.asarray(odd).view(np.uint32))
    np.testing.assert_array_equal(merge_math.linear([broken, odd], (0.0, 1.0)), odd)


def test_bfloat16_models_are_averaged_in_float32_and_rounded_once():
    leaves = [jnp.asarray([x], jnp.bfloat16) for x in (256.0, 1.0, 1.0, 2.0)]
    merged = merge_math.linear(leaves, [1.0] * 4)
    assert merged.dtype == jnp.bfloat16
    assert float(merged[0]) == 65.0
    assert float(sum(leaves[1:], start=leaves[0])[0] / 4) == 64.5


def test_slerp_endpoints_are_exact_with_and_without_a_base():
    for base in (None, BASE):
        np.testing.assert_array_equal(merge_math.slerp(A, B, 0.0, base=base), A)
        np.testing.assert_array_equal(merge_math.slerp(A, B, 1.0, base=base), B)


def test_slerp_of_orthogonal_vectors_keeps_the_norm():
    x, y = jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0])
    half = merge_math.slerp(x, y, 0.5)
    np.testing.assert_allclose(half, [np.sqrt(2), np.sqrt(2)], rtol=1e-6)
    np.testing.assert_allclose(merge_math.slerp(x, y, 1 / 3), [2 * np.cos(np.pi / 6), 2 * np.sin(np.pi / 6)], rtol=1e-6)
    longer = jnp.linalg.norm(merge_math.slerp(x, 3 * y, 0.4))
    assert 2 < float(longer) < 6
    base = jnp.array([10.0, 20.0])
    np.testing.assert_allclose(merge_math.slerp(base + x, base + y, 0.5, base=base), base + half, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1.0001])
def test_slerp_of_nearly_parallel_vectors_is_linear(scale):
    other = A * scale + 1e-4
    np.testing.assert_allclose(merge_math.slerp(A, other, 0.3), 0.7 * A + 0.3 * other, atol=1e-6)


def test_slerp_with_an_untouched_model_is_linear():
    np.testing.assert_allclose(merge_math.slerp(BASE, A, 0.25, base=BASE), BASE + 0.25 * (A - BASE), atol=1e-6)
    assert not merge_math.slerp(jnp.zeros(3), jnp.zeros(3), 0.5).any()


def test_task_arithmetic_adds_the_task_vectors():
    expected = BASE + 0.7 * ((A - BASE) + (B - BASE))
    np.testing.assert_allclose(merge_math.task_arithmetic(BASE, [A, B], scale=0.7), expected, atol=1e-6)
    weighted = BASE + 2 * (A - BASE) - (B - BASE)
    np.testing.assert_allclose(merge_math.task_arithmetic(BASE, [A, B], weights=(2.0, -1.0)), weighted, atol=1e-5)
    np.testing.assert_array_equal(merge_math.task_arithmetic(BASE, [A, B], weights=(0.0, 0.0)), BASE)


def test_ties_by_hand():
    """Half of four entries kept. Entry 0: signs conflict, +3 wins over -1... and is kept alone. Entry 3: a tie, 0."""
    base = jnp.array([1.0, 1.0, 1.0, 1.0])
    x = base + jnp.array([3.0, 0.1, 0.2, 2.0])
    y = base + jnp.array([-1.0, 0.1, 0.2, -2.0])
    z = base + jnp.array([1.0, 0.3, 4.0, 0.2])
    np.testing.assert_allclose(ties(base, [x, y, z], density=0.5), [1 + 2.0, 1, 1 + 4.0, 1], rtol=1e-6)
    np.testing.assert_allclose(ties(base, [x, y, z], density=0.5, scale=0.5), [2.0, 1, 3.0, 1], rtol=1e-6)


@pytest.mark.parametrize("density", [0.2, 0.9])
def test_ties_equals_numpy(density):
    expected = numpy_ties(BASE, [A, B, C], density, 0.8)
    np.testing.assert_allclose(ties(BASE, [A, B, C], density=density, scale=0.8), expected, atol=1e-6)


def test_ties_of_one_whole_model_returns_it():
    np.testing.assert_allclose(ties(BASE, [A], density=1.0), A, atol=1e-6)
    base, model = BASE.astype(jnp.bfloat16), A.astype(jnp.bfloat16)
    np.testing.assert_array_equal(ties(base, [model], density=1.0), model)


def test_ties_gives_up_entries_whose_signs_cancel():
    x, y = BASE + 0.5, BASE - 0.5
    exact = (jnp.round(BASE * 8) / 8, jnp.round(BASE * 8) / 8 + 0.5, jnp.round(BASE * 8) / 8 - 0.5)
    np.testing.assert_array_equal(ties(exact[0], exact[1:], density=1.0), exact[0])
    assert float(jnp.abs(ties(BASE, [x, x, y], density=1.0) - x).max()) < 1e-6


@pytest.mark.parametrize("density", [0.01, 0.37])
@pytest.mark.parametrize("size", [1, 1000])
def test_trimming_keeps_the_largest_entries_that_a_sort_would_keep(density, size):
    rng = np.random.default_rng(size)
    tau = jnp.asarray(rng.normal(size=size) * np.exp(5 * rng.normal(size=size)), jnp.float32)
    kept = max(1, round(density * size))
    threshold = np.sort(np.abs(tau))[-kept]
    np.testing.assert_array_equal(trim(tau, density=density), np.where(np.abs(tau) >= threshold, tau, 0.0))


def test_a_sparse_task_vector_is_kept_whole():
    tau = jnp.array([0.0, 0.0, 0.0, 1.0, -2.0, 0.0])
    np.testing.assert_array_equal(trim(tau, density=0.5), tau)


def test_stacked_layers_are_trimmed_by_themselves_under_vmap():
    """One layer moved far more than the other: trimmed together, the quiet layer would lose everything."""
    base = jnp.zeros((2, 4))
    leaf = jnp.array([[1.0, 2.0, 3.0, 4.0], [100.0, 200.0, 300.0, 400.0]])
    merged = jax.vmap(partial(ties, density=0.5))(base, [leaf])
    assert merged.tolist() == [[0, 0, 3, 4], [0, 0, 300, 400]]
    assert ties(base, [leaf], density=0.5).tolist() == [[0, 0, 0, 0], [100, 200, 300, 400]]


def test_dare_drops_the_share_asked_for_and_has_the_task_vector_as_its_mean():
    base, leaf = jnp.zeros(20_000), jnp.full(20_000, 2.0)
    once = np.asarray(dare(base, [leaf], drop=0.3, key=KEY))
    assert set(np.unique(once)) == {0.0, np.float32(2 / 0.7)}
    assert np.mean(once == 0) == pytest.approx(0.3, abs=0.02)
    keys = jax.random.split(KEY, 4000)
    many = jax.jit(jax.vmap(lambda key: dare(BASE, [A, B], drop=0.3, key=key, weights=(1.0, 0.5))))(keys)
    expected = np.asarray(BASE + (A - BASE) + 0.5 * (B - BASE))
    error = np.std(np.asarray(many), axis=0) / np.sqrt(len(keys))
    np.testing.assert_array_less(np.abs(np.mean(np.asarray(many, np.float64), axis=0) - expected), 5 * error + 1e-6)


def test_dare_repeats_with_its_key_and_masks_models_independently():
    merge = partial(dare, BASE, drop=0.5)
    np.testing.assert_array_equal(merge([A, B], key=KEY), merge([A, B], key=KEY))
    assert not np.array_equal(merge([A, B], key=KEY), merge([A, B], key=jax.random.key(8)))
    difference = dare(jnp.zeros(99), [jnp.ones(99), -jnp.ones(99)], drop=0.5, key=KEY)
    assert set(np.unique(difference)) == {-2.0, 0.0, 2.0}


def test_dare_without_drops_is_task_arithmetic():
    np.testing.assert_array_equal(
        dare(BASE, [A, B], drop=0.0, key=KEY, scale=0.5), merge_math.task_arithmetic(BASE, [A, B], scale=0.5)
    )


def every_merge(base, leaves):
    return {
        "linear": merge_math.linear([base, *leaves], [1.0] * (len(leaves) + 1)),
        "slerp": merge_math.slerp(leaves[0], leaves[1], 0.4, base=base),
        "raw slerp": merge_math.slerp(leaves[0], leaves[1], 0.4),
        "task_arithmetic": merge_math.task_arithmetic(base, leaves, scale=0.5),
        "ties": ties(base, leaves, density=0.5),
        "dare": dare(base, leaves, drop=0.2, key=KEY),
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_merges_keep_shape_and_dtype_and_compute_as_float32_does(dtype):
    base, *leaves = (x.astype(dtype) for x in (BASE, A, B))
    exact = every_merge(base.astype(jnp.float32), [x.astype(jnp.float32) for x in leaves])
    for name, merged in every_merge(base, leaves).items():
        assert merged.dtype == dtype and merged.shape == base.shape, name
        np.testing.assert_array_equal(merged, exact[name].astype(dtype), err_msg=name)


def test_merges_of_equal_models_return_the_model():
    for name, merged in every_merge(A, [A, A]).items():
        np.testing.assert_allclose(merged, A, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "merge, message",
    [
        (lambda: merge_math.linear([A, B[:5]], (1.0, 1.0)), r"shapes \[\(6, 5\), \(5, 5\)\]"),
        (lambda: merge_math.linear([A, B], (1.0, -1.0)), "sum to 0"),
        (lambda: merge_math.linear([A, B], (1.0, 1.0, 1.0)), "3 merge weights for 2 models"),
        (lambda: merge_math.linear([], ()), "no model to merge"),
        (lambda: ties(BASE[:1], [A], density=1.0), "cannot be merged"),
        (lambda: ties(BASE, [A], density=0.0), "density=0.0"),
        (lambda: dare(BASE, [A], drop=1.0, key=KEY), "drop=1.0"),
        (lambda: merge_math.task_arithmetic(BASE, []), "no model to merge"),
    ],
)
def test_impossible_merges_are_refused(merge, message):
    with pytest.raises(ValueError, match=message):
        merge()
