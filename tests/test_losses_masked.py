"""Reductions: weights are global, empty masks are harmless, packing changes nothing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.train.losses import masked

LENGTHS = ([3, 1, 4], [5, 2], [8], [1, 1, 1])


def packed_batch(num_columns=10):
    """Rows of packed sequences: values, mask (the first token of a long sequence is a prompt), segments."""
    rng = np.random.default_rng(0)
    shape = (len(LENGTHS), num_columns)
    values = rng.normal(size=shape).astype(np.float32)
    mask, segments = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for i, length in enumerate(lengths):
            segments[row, start : start + length] = 1024 * (i + 1)
            mask[row, start + (length > 1) : start + length] = 1.0
            start += length
    return values, mask, segments


def test_sum_and_mean_by_hand():
    values, mask = jnp.array([1.0, 2.0, 5.0]), jnp.array([1.0, 0.0, 0.5])
    assert float(masked.sum(values, mask)) == 3.5
    assert float(masked.weight(mask)) == 1.5
    assert float(masked.mean(values, mask)) == pytest.approx(3.5 / 1.5)
    np.testing.assert_allclose(jax.grad(masked.mean)(values, mask), [1 / 1.5, 0.0, 0.5 / 1.5], rtol=1e-6)


def test_an_empty_mask_gives_zero_and_no_gradient():
    values, mask = jnp.array([[1.0, jnp.inf]]), jnp.zeros((1, 2))
    for reduction in (masked.mean, lambda v, m: masked.sequence_mean(v, m)[0]):
        value, gradient = jax.jit(jax.value_and_grad(reduction))(values, mask)
        assert float(value) == 0.0
        assert np.all(np.asarray(gradient) == 0.0)


def test_a_masked_out_nan_counts_for_nothing():
    mask = jnp.array([1.0, 0.0])
    value, gradient = jax.value_and_grad(lambda x: masked.sum(x, mask))(jnp.array([2.0, jnp.nan]))
    assert float(value) == 2.0
    assert gradient.tolist() == [1.0, 0.0]


def test_bfloat16_values_are_summed_in_float32():
    values = jnp.ones(4096, jnp.bfloat16)
    assert masked.sum(values, jnp.ones(4096)).dtype == jnp.float32
    assert float(masked.sum(values, jnp.ones(4096, jnp.bfloat16))) == 4096.0


@jax.jit
@jax.grad
def summed_gradient(parameter, values, weights):
    return masked.sum(jnp.tanh(parameter * values), weights)


@pytest.mark.parametrize("split", [[1, 3], [1, 1, 1, 1]])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_the_gradient_is_the_same_for_any_split_into_micro_batches(split, per_sequence):
    values, mask, segments = packed_batch()
    weights = np.asarray(masked.per_sequence(jnp.asarray(mask), jnp.asarray(segments))) if per_sequence else mask
    whole = summed_gradient(0.7, values, weights) / weights.sum()
    edges = np.cumsum([0, *split])
    parts = [(values[a:b], weights[a:b]) for a, b in itertools.pairwise(edges)]
    sums = [(summed_gradient(0.7, v, w), masked.weight(jnp.asarray(w))) for v, w in parts]
    np.testing.assert_allclose(sum(s for s, _ in sums) / sum(w for _, w in sums), whole, rtol=1e-6)
    assert abs(np.mean([s / w for s, w in sums]) / whole - 1) > 1e-3, "a mean of means must be told apart"


def test_segment_reductions_equal_a_loop_over_sequences():
    values, mask, segments = packed_batch()
    expected_sum, expected_mean, expected_weight = (np.zeros_like(values) for _ in range(3))
    for row in range(len(values)):
        for segment in set(segments[row]):
            where = segments[row] == segment
            counted = where & (mask[row] > 0)
            expected_sum[row, where] = values[row, counted].sum()
            if counted.any():
                expected_mean[row, where] = values[row, counted].mean()
                expected_weight[row, counted] = 1 / counted.sum()
    np.testing.assert_allclose(masked.segment_sum(*map(jnp.asarray, (values, mask, segments))), expected_sum, atol=1e-6)
    np.testing.assert_allclose(
        masked.segment_mean(*map(jnp.asarray, (values, mask, segments))), expected_mean, atol=1e-6
    )
    np.testing.assert_allclose(masked.per_sequence(jnp.asarray(mask), jnp.asarray(segments)), expected_weight)


def test_per_sequence_weights_count_sequences_and_sum_their_means():
    values, mask, segments = packed_batch()
    means = [
        values[row, (segments[row] == s) & (mask[row] > 0)].mean()
        for row in range(len(values))
        for s in set(segments[row]) - {0}
    ]
    weights = masked.per_sequence(jnp.asarray(mask), jnp.asarray(segments))
    assert float(masked.weight(weights)) == pytest.approx(len(means))
    assert float(masked.sum(jnp.asarray(values), weights)) == pytest.approx(sum(means), abs=1e-5)


def test_packed_sequences_reduce_as_unpacked_ones():
    values, mask, segments = packed_batch()
    rows = [(r, s) for r in range(len(values)) for s in sorted(set(segments[r]) - {0})]
    unpacked = np.zeros((len(rows), values.shape[1]), np.float32)
    unpacked_mask = np.zeros_like(unpacked)
    for i, (row, segment) in enumerate(rows):
        where = segments[row] == segment
        unpacked[i, : where.sum()] = values[row, where]
        unpacked_mask[i, : where.sum()] = mask[row, where]
    packed_mean = masked.segment_mean(*map(jnp.asarray, (values, mask, segments)))
    packed_sum = masked.segment_sum(*map(jnp.asarray, (values, mask, segments)))
    first = [int(np.argmax(segments[row] == segment)) for row, segment in rows]
    at = (np.array([row for row, _ in rows]), np.array(first))
    arrays = jnp.asarray(unpacked), jnp.asarray(unpacked_mask)
    np.testing.assert_allclose(masked.sequence_mean(*arrays), packed_mean[at], atol=1e-6)
    np.testing.assert_allclose(masked.sequence_sum(*arrays), packed_sum[at], atol=1e-6)


def test_segments_may_come_in_any_order_and_interleaved():
    values = jnp.array([[1.0, 10.0, 2.0, 20.0]])
    segments = jnp.array([[9, -3, 9, -3]])
    assert masked.segment_sum(values, jnp.ones_like(values), segments).tolist() == [[3.0, 30.0, 3.0, 30.0]]
