"""Chunked divergences and chosen log-probs equal the plain ones: in value, in gradient, on a mesh, in less memory."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain.train.losses import chunked, chunked_logp, distill, gkd, mismatch, top_k

N, D, E, V, K = 40, 6, 5, 56, 3
COTANGENT = np.linspace(-1.0, 2.0, N).astype(np.float32)
TOKENS = jnp.asarray(np.random.default_rng(1).permuted(np.tile(np.arange(V), (N, 1)), axis=1)[:, :K], jnp.int32)


def inputs(scale=1.5):
    rng = np.random.default_rng(0)
    shapes = (N, D), (D, V), (N, E), (E, V)
    return tuple(jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for shape in shapes)


def whole_logp(hidden, head):
    return jnp.take_along_axis(jax.nn.log_softmax(hidden @ head), TOKENS, axis=-1)


def on_logits(divergence):
    return lambda a, b, c, d: divergence(a @ b, c @ d)


def tail_kl(logp_of):
    """Top-k reverse KL, whose inputs are log-probs that `logp_of` takes from hidden states and heads."""
    return lambda a, b, c, d: top_k.reverse_kl(logp_of(a, b), logp_of(c, d))


WHOLE = {
    "forward_kl": on_logits(distill.forward_kl),
    "reverse_kl": on_logits(distill.reverse_kl),
    "jsd": on_logits(partial(gkd.jsd, beta=0.3)),
    "top_k": tail_kl(whole_logp),
}


def in_chunks(name, chunk, vocab_shards):
    split = {"chunk": chunk, "vocab_shards": vocab_shards}
    if name == "top_k":
        return tail_kl(lambda hidden, head: chunked_logp.logp(hidden, head, TOKENS, **split))
    if name == "forward_kl":
        return partial(chunked.forward_kl, **split)
    return partial(chunked.jsd, beta={"reverse_kl": 1.0, "jsd": 0.3}[name], **split)


def value_and_gradients(function):
    def both(arrays, cotangent):
        value, pullback = jax.vjp(function, *arrays)
        return value, *pullback(cotangent)

    return jax.jit(both)


@cache
def whole(name):
    return value_and_gradients(WHOLE[name])


@cache
def pieces(name, chunk, vocab_shards=1):
    return value_and_gradients(in_chunks(name, chunk, vocab_shards))


def assert_close(actual, expected, rtol=1e-4, atol=1e-4):
    for x, y in zip(actual[:3], expected[:3], strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "name, chunk, vocab_shards",
    [*((name, 16, 1) for name in WHOLE), ("jsd", 20, 7), ("top_k", 20, 7), ("jsd", 1000, 1)],
)
def test_any_chunking_equals_the_whole_vocabulary(name, chunk, vocab_shards):
    expected = whole(name)(inputs(), COTANGENT)
    assert all(np.abs(x).max() > 0.1 for x in expected[:3])
    actual = pieces(name, chunk, vocab_shards)(inputs(), COTANGENT)
    assert_close(actual, expected)
    assert not actual[3].any() and not actual[4].any(), "the teacher is a constant"


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_large_logits_do_not_overflow(name):
    """exp(100) is beyond float32. Log-probs of such logits are exact to 1e-5, which the head multiplies by up to 20."""
    arrays = inputs(scale=6.0)
    assert float(jnp.abs(arrays[0] @ arrays[1]).max()) > 100
    assert_close(pieces(name, 16)(arrays, COTANGENT), whole(name)(arrays, COTANGENT), atol=0.1)


@pytest.mark.parametrize("name", WHOLE)
def test_at_the_teacher_value_and_gradient_vanish(name):
    hidden, head, _, _ = inputs()
    for x in pieces(name, 16)((hidden, head, hidden, head), COTANGENT)[:3]:
        np.testing.assert_allclose(x, 0.0, atol=2e-5)
    elsewhere = pieces(name, 16)((hidden + 0.3, head, hidden, head), COTANGENT)
    assert float(elsewhere[0].min()) > 0


def test_bfloat16_inputs_accumulate_in_float32_and_get_gradients_of_their_own_dtype():
    arrays = tuple(x.astype(jnp.bfloat16) for x in inputs())
    expected = whole("jsd")(tuple(x.astype(jnp.float32) for x in arrays), COTANGENT)
    actual = pieces("jsd", 16)(arrays, COTANGENT)
    assert tuple(x.dtype for x in actual) == (jnp.float32, *[jnp.bfloat16] * 4)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-4, atol=1e-4)
    assert_close(actual, expected, rtol=2**-7, atol=1e-3)


def test_rows_of_tokens_need_no_flattening():
    a, b, c, d = inputs()
    rows = a.reshape(4, -1, D), b, c.reshape(4, -1, E), d
    value, d_hidden, d_head, *_ = pieces("jsd", 16)(rows, COTANGENT.reshape(4, -1))
    assert_close((value.reshape(N), d_hidden.reshape(N, D), d_head), whole("jsd")(inputs(), COTANGENT))
    chosen = chunked_logp.logp(rows[0], b, TOKENS.reshape(4, -1, K), chunk=16)
    np.testing.assert_allclose(chosen.reshape(N, K), whole_logp(a, b), rtol=1e-4, atol=1e-4)


def test_a_token_chosen_twice_gets_both_gradients():
    hidden, head, _, _ = inputs()
    twice = jnp.tile(TOKENS[:, :1], (1, 2))
    double = jax.grad(lambda x: chunked_logp.logp(x, head, twice, chunk=16).sum())(hidden)
    once = jax.grad(lambda x: chunked_logp.logp(x, head, twice[:, :1], chunk=16).sum())(hidden)
    np.testing.assert_allclose(double, 2 * once, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk, vocab_shards", [(16, 1), (20, 7)])
def test_log_probs_among_kept_tokens_equal_those_of_masked_logits(chunk, vocab_shards):
    """The kept tokens come packed eight to a byte, as the sampler stores them."""
    hidden, head, _, _ = inputs()
    kept = np.random.default_rng(2).random((N, V)) < 0.3
    kept[np.arange(N), TOKENS[:, 0]] = True
    packed = jnp.asarray(np.packbits(kept, axis=-1))

    def plain(a, b):
        return mismatch.kept_logp(a @ b, TOKENS[:, 0], jnp.asarray(kept))

    def walked(a, b):
        return chunked_logp.kept_logp(a, b, TOKENS[:, 0], kept=packed, chunk=chunk, vocab_shards=vocab_shards)

    expected, actual = (value_and_gradients(f)((hidden, head), COTANGENT) for f in (plain, walked))
    assert_close(actual, expected)
    assert np.abs(expected[0] - whole_logp(hidden, head)[:, 0]).min() > 0.01, "the kept set matters"
    with pytest.raises(ValueError, match="kept has 6 bytes a token and a vocabulary of 56 needs 7"):
        chunked_logp.kept_logp(hidden, head, TOKENS[:, 0], kept=packed[:, :6], chunk=8)


@pytest.mark.parametrize("chunk", [5, 16, 1000])
def test_the_likeliest_tokens_are_those_of_the_whole_vocabulary(chunk):
    hidden, head, _, _ = inputs()
    best, ids = chunked_logp.top_k(hidden, head, K, chunk=chunk)
    expected, expected_ids = jax.lax.top_k(jax.nn.log_softmax(hidden @ head), K)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(best, expected, rtol=1e-4, atol=1e-4)


def largest_intermediate(function) -> int:
    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            yield from (size for inner in jaxprs_in_params(equation.params) for size in walk(inner))

    return max(walk(jax.make_jaxpr(function)(inputs(), COTANGENT).jaxpr))


@pytest.mark.parametrize("name", WHOLE)
def test_no_array_of_rows_times_vocabulary_exists(name):
    assert largest_intermediate(pieces(name, 10, 2)) < N * V / 3
    assert largest_intermediate(whole(name)) >= N * V


@pytest.mark.parametrize("name", ["jsd", "top_k"])
def test_heads_sharded_over_the_vocabulary_stay_where_they_are(name):
    """8 devices: rows over 2, the heads' vocabulary over 4. The unsharded result, and no column travels."""
    mesh = jax.make_mesh((2, 4), ("rows", "columns"), axis_types=(AxisType.Auto, AxisType.Auto))
    rows, head, row = (NamedSharding(mesh, spec) for spec in (P("rows", None), P(None, "columns"), P("rows")))
    shardings = rows, head, rows, head
    arguments = tuple(map(jax.device_put, inputs(), shardings)), jax.device_put(COTANGENT, row)
    compiled = jax.jit(pieces(name, 16, 4), out_shardings=(row, *shardings)).lower(*arguments).compile()
    actual = compiled(*arguments)
    assert_close(actual, whole(name)(inputs(), COTANGENT))
    assert not actual[2].sharding.is_fully_replicated
    text = compiled.as_text() or ""
    moved = re.findall(r"= \w+\[([\d,]+)\]\S* (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    assert "all-reduce" in text
    assert all(np.prod([int(n) for n in shape.split(",")]) < D * V / 4 for shape in moved), moved


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": 0}, "chunk=0"),
        ({"chunk": 8, "vocab_shards": 3}, "vocab_shards=3 does not divide the vocabulary of 56"),
        ({"chunk": 8, "beta": 1.5}, "beta=1.5"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        chunked.jsd(*inputs(), **settings)


def test_different_vocabularies_and_too_large_k_are_refused():
    hidden, head, teacher_hidden, teacher_head = inputs()
    with pytest.raises(ValueError, match="56 tokens and the teacher's 49"):
        chunked.forward_kl(hidden, head, teacher_hidden, teacher_head[:, :49], chunk=8)
    with pytest.raises(ValueError, match="k=57"):
        chunked_logp.top_k(hidden, head, 57, chunk=8)
