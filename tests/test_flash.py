"""Attention in blocks, the kernel for TPUs (interpreted) and that for CPUs, is the einsum reference: values and
gradients, for every way of packing a row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.model import attention, flash

GROUP = attention.BRANCHES
PACKED = {
    "one conversation": [GROUP] * 40,
    "conversations of odd lengths": [GROUP] * 13 + [2 * GROUP] * 1 + [3 * GROUP] * 19 + [4 * GROUP] * 7,
    "answers to a shared prompt": [GROUP] * 11 + [GROUP + 1] * 9 + [GROUP + 2] * 9 + [2 * GROUP] * 5 + [2049] * 6,
    "padding at the end": [GROUP] * 17 + [GROUP + 1] * 3 + [0] * 20,
    "padding in between": [0] * 5 + [GROUP] * 12 + [0] * 8 + [2 * GROUP] * 15,
    "nothing but padding": [0] * 40,
}  # fmt: skip


def arrays(heads=4, kv_heads=2, length=40, dim=8, rows=1):
    rng = np.random.default_rng(0)
    shapes = [(rows, heads, length, dim), (rows, kv_heads, length, dim), (rows, kv_heads, length, dim)]
    return [rng.normal(0, 1, shape).astype(np.float32) for shape in shapes]


def reference(query, key, value, segments):
    return attention.attend(query.swapaxes(1, 2), key, value, attention.segment_mask(segments)).swapaxes(1, 2)


def kernel(query, key, value, segments, block=16):
    start = jnp.zeros(1, jnp.int32)
    return flash.attend(query, key, value, (segments, segments), start, block=block, interpret=True)


def by_row(query, key, value, segments):
    return attention.attend_packed(query, key, value, attention.segment_mask(segments))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)
    monkeypatch.setattr(attention, "SHORT", 1)


both = pytest.mark.parametrize("blocked", [kernel, by_row], ids=["tpu", "cpu"])


def with_gradients(attend, inputs, segments):
    cotangent = jnp.cos(jnp.arange(inputs[0].size, dtype=jnp.float32)).reshape(inputs[0].shape)

    def value(*inputs):
        out = attend(*inputs, segments)
        return jnp.sum(out.astype(jnp.float32) * cotangent), out

    (_, out), gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return out, *gradients


def close(actual, expected, atol=2e-5):
    np.testing.assert_allclose(np.asarray(actual, np.float32), np.asarray(expected, np.float32), atol=atol)


@both
@pytest.mark.parametrize("packed", PACKED)
def test_values_and_gradients_are_those_of_the_reference(packed, blocked):
    segments = jnp.asarray([PACKED[packed]], jnp.int32)
    jax.tree.map(close, *(with_gradients(f, arrays(), segments) for f in (blocked, reference)))


@both
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (6, 2)])
def test_any_number_of_query_heads_shares_a_key_head(heads, kv_heads, blocked):
    segments = jnp.asarray([PACKED["answers to a shared prompt"], PACKED["padding at the end"]], jnp.int32)
    inputs = arrays(heads, kv_heads, rows=2)
    jax.tree.map(close, *(with_gradients(f, inputs, segments) for f in (blocked, reference)))


@pytest.mark.parametrize("block", [8, 24, 64])
def test_a_row_need_not_be_a_multiple_of_a_block(block):
    segments = jnp.asarray([PACKED["answers to a shared prompt"]], jnp.int32)
    blocked = partial(kernel, block=block)
    jax.tree.map(close, *(with_gradients(f, arrays(), segments) for f in (blocked, reference)))


@both
def test_padding_gets_zeros_and_gives_no_gradient(blocked):
    segments = jnp.asarray([PACKED["padding in between"]], jnp.int32)
    empty = np.asarray(segments[0]) == 0
    for array in with_gradients(blocked, arrays(), segments):
        assert np.all(np.asarray(array)[:, :, empty] == 0) and np.any(np.asarray(array)[:, :, ~empty] != 0)


@both
def test_low_precision_stays_as_close_as_the_reference_does(blocked):
    segments = jnp.asarray([PACKED["answers to a shared prompt"]], jnp.int32)
    low = [x.astype(jnp.bfloat16) for x in arrays()]
    exact = with_gradients(reference, [np.asarray(x, np.float32) for x in low], segments)
    for ours, theirs, want in zip(
        *(with_gradients(f, low, segments) for f in (blocked, reference)), exact, strict=True
    ):
        assert ours.dtype == jnp.bfloat16
        error, usual = (float(jnp.max(jnp.abs(x.astype(jnp.float32) - want))) for x in (ours, theirs))
        assert error < max(2 * usual, 1e-2)


def test_the_queries_of_one_part_of_a_row_see_the_keys_before_it():
    segments = jnp.asarray([PACKED["answers to a shared prompt"]], jnp.int32)
    query, key, value = map(jnp.asarray, arrays())
    whole = kernel(query, key, value, segments)
    for start in (8, 23):
        part = slice(start, start + 17)
        at = jnp.full(1, start, jnp.int32)
        own = segments[:, part], segments
        close(flash.attend(query[:, :, part], key, value, own, at, block=16, interpret=True), whole[:, :, part])
        rows = attention.attend_packed(query[:, :, part], key, value, attention.segment_mask(segments)[:, part])
        close(rows, whole[:, :, part])


def test_rows_split_in_blocks_or_computed_together_are_the_same(monkeypatch):
    segments = jnp.asarray([PACKED["answers to a shared prompt"], PACKED["padding in between"]], jnp.int32)
    alone = with_gradients(by_row, arrays(rows=2), segments)
    monkeypatch.setattr(attention, "SHORT", 64)
    monkeypatch.setattr(attention, "BLOCK", 64)
    jax.tree.map(close, with_gradients(by_row, arrays(rows=2), segments), alone)
