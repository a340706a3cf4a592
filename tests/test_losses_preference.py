"""Preference and reward-model losses by hand, with their gradients; rules that combine reward models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.train.losses import preference, reward

LOG2 = np.log(2)
ZERO = jnp.zeros(3)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_where_policy_and_reference_agree_every_loss_has_its_known_value():
    """Equal answers: log 2, whatever beta; KTO: half its weight; IPO: the target squared."""
    np.testing.assert_allclose(preference.dpo(ZERO, ZERO, beta=0.1), [LOG2] * 3, rtol=1e-6)
    np.testing.assert_allclose(preference.length_normalized_dpo(ZERO, ZERO, beta=5.0), [LOG2] * 3, rtol=1e-6)
    np.testing.assert_allclose(preference.dpo_with_nll(ZERO, ZERO, ZERO - 2, nll_weight=0.2), LOG2 + 0.4, rtol=1e-6)
    np.testing.assert_allclose(preference.ipo(ZERO, ZERO, tau=0.1), [25.0] * 3, rtol=1e-6)
    good = jnp.array([True, False, True])
    kto = preference.kto(ZERO, good, jnp.float32(0), desirable_weight=1.0, undesirable_weight=3.0)
    np.testing.assert_allclose(kto, [0.5, 1.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(preference.simpo(ZERO - 1, ZERO - 1, gamma=0.0), [LOG2] * 3, rtol=1e-6)
    np.testing.assert_allclose(preference.orpo(ZERO - 1, ZERO - 1, weight=0.5), 1 + 0.5 * LOG2, rtol=1e-6)
    np.testing.assert_allclose(reward.bradley_terry(ZERO + 4, ZERO + 4), [LOG2] * 3, rtol=1e-6)


def test_a_pair_by_hand_in_value_and_gradient():
    """h = 1 and -0.5, so a gap of 1.5; each gradient pulls the two apart by the same amount."""
    pair = jnp.float32(1.0), jnp.float32(-0.5)
    dpo = jax.value_and_grad(lambda c, r: preference.dpo(c, r, beta=0.4), argnums=(0, 1))
    value, gradient = dpo(*pair)
    assert float(value) == pytest.approx(-np.log(sigmoid(0.6)), rel=1e-5)
    np.testing.assert_allclose(gradient, [-0.4 * sigmoid(-0.6), 0.4 * sigmoid(-0.6)], rtol=1e-5)
    value, gradient = jax.value_and_grad(lambda c, r: preference.ipo(c, r, tau=0.25), argnums=(0, 1))(*pair)
    assert float(value) == pytest.approx(0.25)
    np.testing.assert_allclose(gradient, [-1.0, 1.0], rtol=1e-6)


def test_orpo_by_hand_in_value_and_gradient():
    """P = 0.8 and 0.5: odds 4 and 1. d log odds / d log P = 1 / (1 - P)."""
    chosen, rejected = jnp.log(jnp.float32(0.8)), jnp.log(jnp.float32(0.5))
    both = jax.value_and_grad(lambda c, r: preference.orpo(c, r, weight=0.5), argnums=(0, 1))
    value, gradient = both(chosen, rejected)
    assert float(value) == pytest.approx(-np.log(0.8) - 0.5 * np.log(0.8), rel=1e-5)
    np.testing.assert_allclose(gradient, [-1 - 0.5 * 0.2 * 5, 0.5 * 0.2 * 2], rtol=1e-5)


@pytest.mark.parametrize("mean_logp", [-1e-6, -0.5, -30.0, -200.0])
def test_orpo_is_finite_for_likelihoods_near_one_and_near_zero(mean_logp):
    both = jax.jit(jax.value_and_grad(preference.orpo, argnums=(0, 1)))
    value, gradient = both(jnp.float32(mean_logp), jnp.float32(-1.0))
    p, q = np.exp(np.float64(np.float32(mean_logp))), np.exp(-1.0)
    log_odds = np.float32(mean_logp) - np.log(-np.expm1(np.float64(np.float32(mean_logp)))) - np.log(q / (1 - q))
    assert float(value) == pytest.approx(-np.log(p) + 0.1 * np.logaddexp(0, -log_odds), rel=1e-4)
    assert np.isfinite(gradient).all()


def test_the_reference_of_kto_is_the_mean_of_other_prompts_answers_never_negative_and_constant():
    mismatched, weight = jnp.array([3.0, -1.0, jnp.nan]), jnp.array([1.0, 1.0, 0.0])
    assert float(preference.kto_reference_point(mismatched, weight)) == 1.0
    assert float(preference.kto_reference_point(-mismatched, weight)) == 0.0
    assert not jax.grad(preference.kto_reference_point)(mismatched, weight).any()
    d_z = jax.grad(lambda z: preference.kto(ZERO + 1, ZERO == 0, z).sum())(jnp.float32(0.5))
    assert float(d_z) == 0.0


def test_kto_by_hand_in_value_and_gradient():
    """beta (h - z0) = 0.5: v = sigma(0.5) if desirable, 2 sigma(-0.5) if not; the loss is weight - v."""
    answer, good = jnp.array([1.5, 1.5]), jnp.array([True, False])

    def loss(h):
        return preference.kto(h, good, jnp.float32(0.5), beta=0.5, undesirable_weight=2.0)

    np.testing.assert_allclose(loss(answer), [1 - sigmoid(0.5), 2 - 2 * sigmoid(-0.5)], rtol=1e-5)
    slope = 0.5 * sigmoid(0.5) * sigmoid(-0.5)
    np.testing.assert_allclose(jax.grad(lambda h: loss(h).sum())(answer), [-slope, 2 * slope], rtol=1e-5)


def test_simpo_asks_for_a_margin():
    value, slope = jax.value_and_grad(lambda c: preference.simpo(c, jnp.float32(-1), beta=2.0, gamma=0.5))(
        jnp.float32(-0.75)
    )
    assert float(value) == pytest.approx(LOG2)
    assert float(slope) == pytest.approx(-1.0)


def test_margins_move_the_point_of_indifference():
    """A gap of the margin costs log 2, and the gradient is that of sigma there: one half."""
    margins = jnp.array(reward.LARGE_MARGINS)
    value, pullback = jax.vjp(lambda c: reward.bradley_terry(c, jnp.zeros(4), margins), jnp.array([3.0, 2.0, 1.0, 0.0]))
    np.testing.assert_allclose(value, [LOG2] * 4, rtol=1e-6)
    np.testing.assert_allclose(pullback(jnp.ones(4))[0], [-0.5] * 4, rtol=1e-6)
    assert tuple(m / 3 for m in reward.LARGE_MARGINS) == reward.SMALL_MARGINS


def test_k_wise_is_the_mean_over_pairs_then_the_prompts_by_a_loop():
    """Ties dropped, missing answers dropped; a prompt of ties alone is worth nothing and weighs nothing."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 5)).astype(np.float32)
    ranks = np.array([[3, 1, 2, 2, 0], [0, 1, 9, 9, 9], [4, 4, 4, 4, 4]], np.float32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], np.float32)
    expected = np.zeros(3)
    for p in range(3):
        losses = [
            -np.log(sigmoid(scores[p, i] - scores[p, j]))
            for i in range(5)
            for j in range(5)
            if mask[p, i] and mask[p, j] and ranks[p, i] > ranks[p, j]
        ]
        expected[p] = np.mean(losses) if losses else 0.0
    pairs = reward.ranked_pairs(jnp.asarray(ranks), jnp.asarray(mask))
    assert pairs.sum((1, 2)).tolist() == [9.0, 1.0, 0.0]
    value, pullback = jax.vjp(jax.jit(lambda s: reward.k_wise(s, pairs)), jnp.asarray(scores))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    (gradient,) = pullback(jnp.ones(3))
    low = sigmoid(scores[1, 0] - scores[1, 1])
    np.testing.assert_allclose(gradient[1], [low, -low, 0, 0, 0], rtol=1e-5)
    assert not gradient[2].any()


def test_two_answers_k_wise_are_one_bradley_terry_pair():
    scores, one = jnp.array([[1.0, 0.2], [0.4, 2.0]]), jnp.ones((2, 2))
    pairs = reward.ranked_pairs(jnp.array([[1.0, 0.0], [1.0, 0.0]]), one)
    expected = reward.bradley_terry(scores[:, 0], scores[:, 1])
    np.testing.assert_allclose(jax.jit(reward.k_wise)(scores, pairs), expected, rtol=1e-6)


def test_pointwise_is_binary_cross_entropy_with_gradient_probability_minus_label():
    scores, labels = jnp.array([0.5, -2.0, 40.0]), jnp.array([1.0, 0.0, 0.25])
    value, pullback = jax.vjp(lambda s: reward.pointwise(s, labels), scores)
    np.testing.assert_allclose(value, [-np.log(sigmoid(0.5)), -np.log(sigmoid(2.0)), 30.0], rtol=1e-5)
    np.testing.assert_allclose(pullback(jnp.ones(3))[0], sigmoid(np.array([0.5, -2.0, 40.0])) - labels, rtol=1e-5)
    auxiliary = reward.safety_auxiliary(
        scores[:1], scores[1:2], chosen_is_safe=labels[:1], rejected_is_safe=labels[1:2]
    )
    np.testing.assert_allclose(auxiliary, [-0.5 * np.log(sigmoid(0.5) * sigmoid(2.0))], rtol=1e-5)


def test_safety_takes_over_on_marked_prompts_and_below_the_threshold():
    """sigma(-1.8) = 0.142 is below 0.15, sigma(-1.7) = 0.154 is not."""
    safety, helpfulness = jnp.array([-1.8, -1.7, 5.0, 5.0]), jnp.array([1.0, 2.0, 3.0, 4.0])
    marked = jnp.array([False, False, False, True])
    assert reward.safety_or_helpfulness(safety, helpfulness, marked).tolist() == pytest.approx([-1.8, 2.0, 3.0, 5.0])


def test_normalising_before_summing_takes_scale_and_offset_out():
    scores, mask = jnp.array([[1.0, 5.0], [3.0, 5.0], [99.0, 9.0]]), jnp.array([1.0, 1.0, 0.0])
    weights = jnp.array([2.0, 1.0])
    np.testing.assert_allclose(reward.weighted_sum(scores, weights), [7.0, 11.0, 207.0])
    assert reward.normalized_sum(scores, mask, weights).tolist() == [-2.0, 2.0, 0.0]
    scaled = reward.normalized_sum(scores * 100 + 7, mask, weights)
    np.testing.assert_allclose(scaled, [-2.0, 2.0, 0.0], rtol=1e-5)


def test_demonstrations_have_mean_zero_after_normalisation():
    demonstrations = jnp.array([1.0, 2.0, 6.0])
    centered = reward.centered_on_demonstrations(demonstrations, demonstrations)
    assert centered.tolist() == [-2.0, -1.0, 3.0]
