"""Group advantages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.train.losses import advantage

ALL = [advantage.group_centered, advantage.group_normalized, advantage.leave_one_out]


def test_group_advantages_by_hand():
    rewards = jnp.array([[1.0, 0.0, 0.0], [2.0, 4.0, 6.0]])
    root = np.sqrt(2.0)
    np.testing.assert_allclose(advantage.group_centered(rewards), [[2 / 3, -1 / 3, -1 / 3], [-2, 0, 2]], atol=1e-6)
    np.testing.assert_allclose(
        advantage.group_normalized(rewards), [[root, -root / 2, -root / 2], [-np.sqrt(1.5), 0, np.sqrt(1.5)]], atol=1e-6
    )
    np.testing.assert_allclose(advantage.leave_one_out(rewards), [[1, -0.5, -0.5], [-3, 0, 3]], atol=1e-6)


@pytest.mark.parametrize("advantages", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1e6 + 0.1])
def test_equal_rewards_have_advantage_exactly_zero(advantages, reward):
    rewards = jnp.stack([jnp.full(7, reward), jnp.arange(7.0)])
    result = np.asarray(advantages(rewards))
    assert np.all(result[0] == 0.0)
    assert np.abs(result[1]).min() == pytest.approx(0.0, abs=1e-6) and np.abs(result[1]).max() > 1


def test_the_standard_deviation_is_the_populations():
    rewards = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    expected = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True, ddof=0)
    np.testing.assert_allclose(advantage.group_normalized(jnp.asarray(rewards)), expected, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_normalised_advantages_do_not_depend_on_the_scale_of_rewards(scale):
    rewards = jnp.array([[0.0, 1.0, 1.0, 0.5]])
    np.testing.assert_allclose(
        advantage.group_normalized(rewards * scale), advantage.group_normalized(rewards), rtol=1e-5
    )


def test_centred_advantage_times_g_over_g_minus_one_is_leave_one_out():
    rewards = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    others = (rewards.sum(1, keepdims=True) - rewards) / 5
    np.testing.assert_allclose(advantage.leave_one_out(jnp.asarray(rewards)), rewards - others, atol=1e-6)
    np.testing.assert_allclose(advantage.group_centered(jnp.asarray(rewards)) * 6 / 5, rewards - others, atol=1e-6)


def test_leave_one_out_of_a_single_answer_is_refused():
    with pytest.raises(ValueError, match="at least 2 answers to a prompt, got 1"):
        advantage.leave_one_out(jnp.ones((3, 1)))


@pytest.mark.parametrize("advantages", ALL, ids=lambda f: f.__name__)
def test_advantages_are_constants_for_gradients(advantages):
    assert not jax.grad(lambda r: jnp.square(advantages(r)).sum())(jnp.array([[0.0, 1.0, 3.0]])).any()
