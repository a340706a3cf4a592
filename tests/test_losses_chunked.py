"""The chunked full-vocabulary KL is the plain one: in value, in gradient, on a mesh, and without its memory."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain.train.losses import distill

N, D, E, V = 40, 6, 5, 56
COTANGENT = np.linspace(-1.0, 2.0, N).astype(np.float32)


def inputs(scale=1.5):
    rng = np.random.default_rng(0)
    shapes = (N, D), (D, V), (N, E), (E, V)
    return tuple(jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for shape in shapes)


def plain(student_hidden, student_head, teacher_hidden, teacher_head):
    return distill.reverse_kl(student_hidden @ student_head, teacher_hidden @ teacher_head)


def value_and_gradients(function):
    def both(arrays, cotangent):
        value, pullback = jax.vjp(function, *arrays)
        return value, *pullback(cotangent)

    return jax.jit(both)


whole = value_and_gradients(plain)


@cache
def chunked(chunk, vocab_shards=1):
    return value_and_gradients(partial(distill.chunked_reverse_kl, chunk=chunk, vocab_shards=vocab_shards))


def assert_close(actual, expected, rtol=1e-4, atol=1e-4):
    """Value and the student's gradients; the teacher's are a test of their own."""
    for x, y in zip(actual[:3], expected[:3], strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=rtol, atol=atol)


@pytest.mark.parametrize("chunk, vocab_shards", [(1000, 1), (16, 1), (55, 1), (20, 7)])
def test_any_chunking_equals_the_whole_vocabulary(chunk, vocab_shards):
    assert_close(chunked(chunk, vocab_shards)(inputs(), COTANGENT), whole(inputs(), COTANGENT))


def test_large_logits_do_not_overflow():
    arrays = inputs(scale=12.0)
    assert float(jnp.abs(arrays[0] @ arrays[1]).max()) > 500
    assert_close(chunked(16)(arrays, COTANGENT), whole(arrays, COTANGENT), atol=1e-2)


def test_the_teacher_gets_no_gradient():
    _, d_hidden, d_head, d_teacher_hidden, d_teacher_head = chunked(16)(inputs(), COTANGENT)
    assert not d_teacher_hidden.any() and not d_teacher_head.any()
    assert d_hidden.any() and d_head.any()


def test_it_is_exactly_zero_at_the_teacher_and_positive_elsewhere():
    hidden, head, _, _ = inputs()
    at_teacher = chunked(16)((hidden, head, hidden, head), COTANGENT)
    assert not any(np.any(x) for x in at_teacher)
    elsewhere = chunked(16)((hidden + 0.1, head, hidden, head), COTANGENT)
    assert float(elsewhere[0].min()) > 0


def test_batches_of_rows_need_no_flattening():
    student_hidden, student_head, teacher_hidden, teacher_head = inputs()
    rows = (student_hidden.reshape(4, -1, D), student_head, teacher_hidden.reshape(4, -1, E), teacher_head)
    value, d_hidden, d_head, *_ = chunked(16)(rows, COTANGENT.reshape(4, -1))
    assert value.shape == (4, N // 4)
    assert_close((value.reshape(N), d_hidden.reshape(N, D), d_head), whole(inputs(), COTANGENT))


def test_bfloat16_inputs_accumulate_in_float32_and_get_gradients_of_their_own_dtype():
    dtypes = jnp.bfloat16, jnp.bfloat16, jnp.bfloat16, jnp.float32
    arrays = tuple(x.astype(dtype) for x, dtype in zip(inputs(), dtypes, strict=True))
    actual = chunked(16)(arrays, COTANGENT)
    expected = whole(tuple(x.astype(jnp.float32) for x in arrays), COTANGENT)
    assert tuple(x.dtype for x in actual) == (jnp.float32, *dtypes)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-4, atol=1e-4)
    assert_close(actual, expected, rtol=2**-7, atol=1e-3)


def test_teacher_logits_rebuilt_from_hidden_states_are_the_teachers_own():
    """Chunks of a cached hidden state times the head against logits that the teacher computed by itself."""
    student_hidden, student_head, teacher_hidden, teacher_head = inputs()
    teacher_logits = jnp.asarray(
        np.asarray(teacher_hidden, np.float64) @ np.asarray(teacher_head, np.float64), jnp.float32
    )
    expected = distill.reverse_kl(student_hidden @ student_head, teacher_logits)
    np.testing.assert_allclose(chunked(16)(inputs(), COTANGENT)[0], expected, rtol=1e-4, atol=1e-5)


def largest_intermediate(function) -> int:
    """Elements of the largest array that any operation of the program makes, however nested."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            yield from (size for inner in jaxprs_in_params(equation.params) for size in walk(inner))

    return max(walk(jax.make_jaxpr(function)(inputs(), COTANGENT).jaxpr))


@pytest.mark.parametrize("vocab_shards", [1, 2])
def test_no_array_of_rows_times_vocabulary_exists(vocab_shards):
    assert largest_intermediate(chunked(10, vocab_shards)) < N * V / 3
    assert largest_intermediate(whole) >= N * V


@cache
def compiled_on_mesh(vocab_shards):
    """The program and its arguments on 8 devices: rows over 2, the heads' vocabulary over 4."""
    mesh = jax.make_mesh((2, 4), ("rows", "columns"), axis_types=(AxisType.Auto, AxisType.Auto))
    rows, head, row = (NamedSharding(mesh, spec) for spec in (P("rows", None), P(None, "columns"), P("rows")))
    shardings = rows, head, rows, head
    arguments = tuple(map(jax.device_put, inputs(), shardings)), jax.device_put(COTANGENT, row)
    function = jax.jit(chunked(16, vocab_shards), out_shardings=(row, *shardings))
    return function.lower(*arguments).compile(), arguments


@pytest.mark.parametrize("vocab_shards", [1, 4])
def test_heads_sharded_over_the_vocabulary_give_the_unsharded_result(vocab_shards):
    program, arguments = compiled_on_mesh(vocab_shards)
    actual = program(*arguments)
    assert_close(actual, whole(inputs(), COTANGENT))
    assert not actual[2].sharding.is_fully_replicated


def test_each_device_walks_its_own_columns_of_a_sharded_head():
    """With vocab_shards set, nothing is gathered; with 1, the heads must travel."""
    gather = re.compile(r"\b(?:all-gather|all-to-all|collective-permute)(?:-start)?\(")
    in_shards, in_one_piece = (compiled_on_mesh(vocab_shards)[0].as_text() or "" for vocab_shards in (4, 1))
    assert "all-reduce" in in_shards
    assert not gather.search(in_shards)
    assert gather.search(in_one_piece)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"chunk": 0}, "chunk=0"),
        ({"chunk": 8, "vocab_shards": 3}, "vocab_shards=3 does not divide the vocabulary of 56"),
    ],
)
def test_impossible_chunks_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        distill.chunked_reverse_kl(*inputs(), **settings)


def test_different_vocabularies_are_refused():
    hidden, head, teacher_hidden, teacher_head = inputs()
    with pytest.raises(ValueError, match="56 tokens and the teacher's 49"):
        distill.chunked_reverse_kl(hidden, head, teacher_hidden, teacher_head[:, :49], chunk=8)
