"""Rewards, advantages and turns along a sequence: GAE, returns, whitening, filters, penalties, Ghost Attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.train.losses import advantage, shaping, supervised

SEGMENTS = jnp.array([[7, 7, 7, 7, 3, 3, 3, 0], [5, 5, 5, 5, 5, 5, 0, 0]])
MASK = jnp.array([[0, 1, 0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 0, 0, 0]], jnp.float32)
# The counted tokens of each sequence: (row, columns).
SEQUENCES = (0, [1, 3]), (0, [4, 5, 6]), (1, [0, 1, 4])


def fields(num, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(num, 2, 8)), jnp.float32)


def test_gae_by_hand():
    """Two tokens, rewards 0 and 1, values 0.5 and 0.25: the last delta is 0.75, the first -0.375 + 0.4 * 0.75."""
    segments, ones = jnp.array([[1, 1]]), jnp.ones((1, 2))
    rewards, values = jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.25]])
    result = advantage.gae(rewards, values, ones, segments=segments, discount=0.5, decay=0.8)
    np.testing.assert_allclose(result, [[-0.375 + 0.4 * 0.75, 0.75]], rtol=1e-6)
    cut = advantage.gae(
        rewards, values, ones, segments=segments, bootstrap=jnp.array([[9.0, 2.0]]), discount=0.5, decay=0.8
    )
    np.testing.assert_allclose(cut, [[-0.375 + 0.4 * 1.75, 1.75]], rtol=1e-6)


@pytest.mark.parametrize("discount, decay", [(1.0, 1.0), (0.9, 0.7), (0.9, 0.0)])
def test_gae_equals_a_loop_over_packed_sequences_with_tool_output_inside(discount, decay):
    rewards, values, bootstrap = fields(3)
    actual = advantage.gae(
        rewards, values, MASK, segments=SEGMENTS, bootstrap=bootstrap, discount=discount, decay=decay
    )
    expected = np.zeros((2, 8))
    for row, columns in SEQUENCES:
        following, later = float(bootstrap[row, columns[-1]]), 0.0
        for t in reversed(columns):
            delta = float(rewards[row, t]) + discount * following - float(values[row, t])
            later = delta + discount * decay * later
            following, expected[row, t] = float(values[row, t]), later
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_gae_without_discount_or_decay_is_the_return_minus_the_value():
    rewards, values = fields(2)
    result = advantage.gae(rewards, values, MASK, segments=SEGMENTS, discount=1.0, decay=1.0)
    returns = advantage.rewards_to_go(rewards, MASK, segments=SEGMENTS)
    np.testing.assert_allclose(result, (returns - values) * MASK, atol=1e-5)
    for row, columns in SEQUENCES:
        assert float(returns[row, columns[0]]) == pytest.approx(float(rewards[row, columns].sum()), abs=1e-5)


def test_gae_is_a_constant():
    rewards, values = fields(2)
    for argument in (0, 1):
        gradient = jax.grad(lambda r, v: advantage.gae(r, v, MASK, segments=SEGMENTS).sum(), argnums=argument)
        assert not gradient(rewards, values).any()


def test_whitened_values_have_mean_zero_and_population_deviation_one_over_the_mask():
    values = fields(1)[0] * 3 + 5
    result = np.asarray(advantage.whiten(values.at[0, 0].set(jnp.inf), MASK))
    counted = np.asarray(MASK) > 0
    assert result[counted].mean() == pytest.approx(0.0, abs=1e-6)
    assert result[counted].std() == pytest.approx(1.0, abs=1e-5)
    assert not result[~counted].any()


@pytest.mark.parametrize("constant", [0.1, 0.0])
def test_whitening_equal_values_gives_exactly_zero(constant):
    assert not advantage.whiten(jnp.full((2, 8), constant), MASK).any()
    assert not advantage.whiten(fields(1)[0], jnp.zeros((2, 8))).any()


def test_reinforce_plus_plus_charges_each_token_for_the_kl_to_come():
    token_kl = fields(1)[0]
    rewards = jnp.where(SEGMENTS == 7, 1.0, jnp.where(SEGMENTS == 3, -2.0, 0.5))
    raw = np.zeros((2, 8))
    for row, columns in SEQUENCES:
        for i, t in enumerate(columns):
            raw[row, t] = float(rewards[row, t]) - 0.3 * float(token_kl[row, columns[i:]].sum())
    counted = np.asarray(MASK) > 0
    expected = np.where(counted, (raw - raw[counted].mean()) / raw[counted].std(), 0)
    actual = advantage.reinforce_plus_plus(rewards, token_kl, MASK, segments=SEGMENTS, kl_weight=0.3)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_groups_are_filtered_whole_by_their_pass_rate():
    rewards = jnp.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], jnp.float32)
    kept = advantage.has_pass_rate_within(rewards, low=0.01, high=0.625)
    assert kept[:, 0].tolist() == [False, True, False, False]
    assert (~advantage.is_uniform(rewards))[:, 0].tolist() == [False, True, True, False]


def test_the_overlong_penalty_is_a_ramp_in_tokens():
    lengths = jnp.array([0, 16384, 18432, 20480, 30000])
    penalty = shaping.soft_overlong_penalty(lengths, limit=20480, buffer=4096)
    assert penalty.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match="buffer=0 must be from 1 to limit=10"):
        shaping.soft_overlong_penalty(lengths, limit=10, buffer=0)


def test_only_answers_without_an_end_are_penalised_and_their_reward_is_replaced():
    rewards, ended = jnp.array([10.0, 10.0, 0.0]), jnp.array([True, False, True])
    assert shaping.penalize_missing_end(rewards, ended, penalty=-10.0).tolist() == [10.0, -10.0, 0.0]


def test_the_language_reward_is_a_share():
    share = shaping.language_consistency(jnp.array([0, 3, 4, 0]), jnp.array([4, 4, 4, 0]))
    assert share.tolist() == [0.0, 0.75, 1.0, 1.0]


def test_ppo_rewards_charge_kl_at_every_token_and_pay_the_score_at_the_last_that_counts():
    scores = jnp.where(SEGMENTS == 7, 1.0, jnp.where(SEGMENTS == 3, 2.0, 3.0))
    paid = jax.jit(shaping.at_last_token)(scores, MASK, SEGMENTS)
    expected = np.zeros((2, 8))
    expected[[0, 0, 1], [3, 6, 4]] = [1.0, 2.0, 3.0]
    np.testing.assert_array_equal(paid, expected)
    old, reference = jnp.array([-1.0, -2.0]), jnp.array([-1.5, -1.0])
    np.testing.assert_allclose(shaping.kl_penalty(old, reference, weight=0.2), [-0.1, 0.2], rtol=1e-6)
    assert not jax.grad(lambda x: shaping.kl_penalty(x, reference, weight=0.2).sum())(old).any()


def test_ghost_attention_counts_the_last_assistant_turn_alone():
    """Three dialogues in two rows; the second ends with a user turn, the third is one turn."""
    segments = jnp.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2], [4, 4, 4, 0, 0, 0, 0, 0, 0, 0]])
    mask = jnp.array([[0, 1, 0, 0.5, 1, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]], jnp.float32)
    last = jax.jit(supervised.last_turn)(mask, segments)
    assert last.tolist() == [[0, 0, 0, 0.5, 1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]]
