"""Truncated sampling draws only kept tokens, as often as it says, and reports the renormalised log-probability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from posttrain.model import config as configs
from posttrain.model import processing, sample, transformer
from posttrain.model.processing import Sampling

TRUNCATIONS = [
    Sampling(max_tokens=4, top_k=5),
    Sampling(max_tokens=4, top_p=0.7),
    Sampling(max_tokens=4, min_p=0.2),
    Sampling(max_tokens=4, temperature=0.6, top_k=9, top_p=0.9, min_p=0.05),
]
WHOLE = Sampling(max_tokens=4, temperature=1.3)


def reference(scores, sampling):
    """Probabilities after temperature, then top-k, then top-p, then min-p, in float64, one row."""
    probs = np.exp((scores - scores.max()).astype(np.float64) / sampling.temperature)
    order = np.argsort(-probs, kind="stable")
    best = probs[order[0]]
    if sampling.top_k:
        probs[order[sampling.top_k :]] = 0
    probs /= probs.sum()
    if sampling.top_p < 1:
        reached = np.cumsum(probs[order]) - probs[order]
        probs[order[reached >= sampling.top_p]] = 0
    if sampling.min_p:
        probs[np.exp((scores - scores.max()).astype(np.float64) / sampling.temperature) < sampling.min_p * best] = 0
    return probs / probs.sum()


@pytest.mark.parametrize("sampling", [WHOLE, *TRUNCATIONS], ids=str)
def test_processed_log_probabilities_equal_the_reference(sampling):
    scores = np.random.default_rng(1).normal(0, 2, (6, 300)).astype(np.float32)
    expected = np.stack([reference(row, sampling) for row in scores])
    assert (sampling == WHOLE) == bool(np.all(expected > 0))
    both = jax.jit(lambda x: (processing.processed(x, sampling), processing.support(x, sampling)))
    logp, packed = both(jnp.asarray(scores))
    np.testing.assert_allclose(np.exp(logp), expected, atol=1e-6)
    np.testing.assert_array_equal(np.unpackbits(np.asarray(packed), axis=-1, count=300), expected > 0)


@pytest.mark.parametrize("sampling", [WHOLE, TRUNCATIONS[-1]], ids=str)
def test_frequencies_match_the_probabilities(sampling):
    num, vocab = 20_000, 300
    scores = np.random.default_rng(2).normal(0, 2, vocab).astype(np.float32)
    keys = jax.random.split(jax.random.key(7), num)
    draw = jax.jit(lambda row, keys: processing.draw(jnp.broadcast_to(row, (num, vocab)), keys, sampling))
    tokens, logp = (np.asarray(x) for x in draw(jnp.asarray(scores), keys))
    expected = reference(scores, sampling)
    np.testing.assert_allclose(np.exp(logp), expected[tokens], rtol=1e-4)
    assert np.all(expected[tokens] > 0)
    counts, often = np.bincount(tokens, minlength=vocab), expected * num >= 5
    observed = [*counts[often], counts[~often].sum()]
    wanted = [*(expected[often] * num), expected[~often].sum() * num]
    if wanted[-1] < 5:
        observed, wanted = [*observed[:-2], observed[-2] + observed[-1]], [*wanted[:-2], wanted[-2] + wanted[-1]]
    assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-3


def test_a_token_of_probability_zero_is_never_drawn_at_the_ends_of_the_unit_interval():
    logp = jnp.asarray([[-jnp.inf, jnp.log(0.5), -jnp.inf, jnp.log(0.5), -jnp.inf]])
    almost_one = np.nextafter(np.float32(1), np.float32(0))
    for first in (0.0, almost_one):
        for second, token in ((0.0, 1), (almost_one, 3)):
            assert processing._categorical(logp, jnp.asarray([[first, second]], jnp.float32))[0] == token


def test_equally_good_tokens_at_the_border_are_all_kept():
    scores = jnp.asarray([[2.0, 1.0, 1.0, 1.0, 0.0]])
    np.testing.assert_array_equal(processing.kept(scores, Sampling(max_tokens=1, top_k=2))[0], [1, 1, 1, 1, 0])


def test_the_best_token_always_survives():
    scores = jnp.asarray([[0.0, 30.0, 0.0]])
    for sampling in (Sampling(max_tokens=1, top_p=1e-6), Sampling(max_tokens=1, min_p=0.999)):
        np.testing.assert_array_equal(processing.kept(scores, sampling)[0], [0, 1, 0])


def test_generation_hands_back_the_kept_tokens_and_the_renormalised_log_probabilities():
    config = configs.ModelConfig(
        vocab_size=90, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, context=40,
        tie_embeddings=True, init_std=0.3,
    )  # fmt: skip
    params = jax.jit(lambda key: transformer.init(config, key))(jax.random.key(5))
    prompts, sampling = [[1, 2, 3], [4]], TRUNCATIONS[-1]
    settings = {"num_samples": 2, "sampling": sampling, "noise": sample.Noise(seed=3)}
    answers = sample.generate(config, params, prompts, return_kept=True, **settings)

    @jax.jit
    def scores(params, tokens):
        at = jnp.arange(8)[None]
        hidden, _ = transformer.apply(config, params, tokens, positions=at, segments=jnp.full((1, 8), 1024))
        return transformer.logits(config, params, hidden)[0]

    for prompt, group in zip(prompts, answers, strict=True):
        for answer in group:
            assert answer.kept is not None and answer.kept.shape == (4, 12) and answer.kept.dtype == np.uint8
            text = [*prompt, *answer.tokens.tolist()]
            rows = np.asarray(scores(params, np.asarray([text + [0] * (8 - len(text))], np.int32)))
            for index, token in enumerate(answer.tokens):
                expected = reference(rows[len(prompt) - 1 + index], sampling)
                np.testing.assert_array_equal(np.unpackbits(answer.kept[index], count=90), expected > 0)
                np.testing.assert_allclose(answer.logp[index], np.log(expected[token]), atol=1e-4)
    plain = sample.generate(config, params, prompts, **settings)
    assert all(answer.kept is None for group in plain for answer in group)
    assert [a.tokens.tolist() for g in plain for a in g] == [a.tokens.tolist() for g in answers for a in g]
