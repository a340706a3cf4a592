"""Policy-gradient and supervised losses against numbers by hand, numpy and their own limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.train.losses import advantage, kl, masked, policy, supervised


def random_tokens(seed=0, shape=(4, 7)):
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=shape).astype(np.float32)
    logp = old + rng.normal(scale=0.4, size=shape).astype(np.float32)
    return logp, old, rng.normal(size=shape).astype(np.float32)


def test_supervised_losses_by_hand():
    x = jnp.array([-1.0, -2.0, 3.0])
    assert supervised.nll(x).tolist() == [1.0, 2.0, -3.0]
    assert supervised.z_loss(x).tolist() == [1.0, 4.0, 9.0]
    assert jax.grad(lambda x: supervised.z_loss(x).sum())(x).tolist() == [-2.0, -4.0, 6.0]


def test_policy_gradient_by_hand():
    logp, a = jnp.array([-1.0, -2.0, -0.5]), jnp.array([2.0, -1.0, 0.0])
    assert policy.policy_gradient(logp, a).tolist() == [2.0, -2.0, 0.0]
    assert jax.grad(lambda x: policy.policy_gradient(x, a).sum())(logp).tolist() == [-2.0, 1.0, 0.0]


def test_clipped_policy_gradient_by_hand():
    """Ratios 1.1, 1.5, 0.5 with clips 0.2 and 0.28: kept, clipped above, clipped below."""
    ratio, a = np.array([1.1, 1.5, 0.5]), jnp.array([2.0, 1.0, -1.0])
    old = jnp.array([-1.0, -1.0, -1.0])
    logp = old + jnp.log(jnp.asarray(ratio, jnp.float32))

    def loss(x):
        return policy.clipped_policy_gradient(x, old, a, clip_low=0.2, clip_high=0.28)

    np.testing.assert_allclose(loss(logp), [-2.2, -1.28, 0.8], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: loss(x).sum())(logp), [-2.2, 0.0, 0.0], rtol=1e-6)
    assert policy.is_clipped(logp, old, a, clip_low=0.2, clip_high=0.28).tolist() == [0.0, 1.0, 1.0]


def test_clipped_policy_gradient_equals_numpy():
    logp, old, a = random_tokens()
    rho = np.exp(logp - old)
    expected = -np.minimum(rho * a, np.clip(rho, 0.7, 1.4) * a)
    actual = policy.clipped_policy_gradient(*map(jnp.asarray, (logp, old, a)), clip_low=0.3, clip_high=0.4)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_exactly_the_clipped_tokens_get_no_gradient():
    logp, old, a = map(jnp.asarray, random_tokens())
    gradient = jax.jit(jax.grad(lambda x: policy.clipped_policy_gradient(x, old, a).sum()))(logp)
    clipped = policy.is_clipped(logp, old, a)
    assert 0 < int(clipped.sum()) < clipped.size
    np.testing.assert_array_equal(gradient == 0, clipped == 1)


def test_the_first_minibatch_is_plain_reinforce():
    logp, _, a = map(jnp.asarray, random_tokens())
    clipped = jax.grad(lambda x: policy.clipped_policy_gradient(x, logp, a).sum())(logp)
    np.testing.assert_array_equal(clipped, jax.grad(lambda x: policy.policy_gradient(x, a).sum())(logp))
    assert not policy.is_clipped(logp, logp, a).any()


def test_no_gradient_flows_into_old_logp_or_advantage():
    arrays = tuple(map(jnp.asarray, random_tokens()))
    d_old, d_advantage = jax.grad(lambda *x: policy.clipped_policy_gradient(*x).sum(), argnums=(1, 2))(*arrays)
    assert not d_old.any() and not d_advantage.any()
    assert not jax.grad(lambda a: policy.policy_gradient(arrays[0], a).sum())(arrays[2]).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_losses_are_float32_whatever_the_inputs_are(dtype):
    logp, old, a = (jnp.asarray(x, dtype) for x in random_tokens())
    for values in (
        policy.clipped_policy_gradient(logp, old, a),
        policy.policy_gradient(logp, a),
        supervised.nll(logp),
        kl.importance_weighted_k3(logp, old, old),
    ):
        assert values.dtype == jnp.float32


@pytest.mark.parametrize(
    "advantages",
    [advantage.group_centered, advantage.group_normalized, advantage.leave_one_out],
    ids=lambda f: f.__name__,
)
def test_groups_with_equal_rewards_give_zero_gradient(advantages):
    logp, old, _ = map(jnp.asarray, random_tokens(shape=(4, 7)))
    per_answer = advantages(jnp.full((1, 4), 0.1, jnp.float32))[0]
    per_token = jnp.broadcast_to(per_answer[:, None], logp.shape)
    losses = (
        lambda x: policy.policy_gradient(x, per_token),
        lambda x: policy.clipped_policy_gradient(x, old, per_token),
    )
    for loss in losses:
        gradient = jax.grad(lambda x, loss=loss: masked.mean(loss(x), jnp.ones_like(x)))(logp)
        assert np.all(np.asarray(gradient) == 0.0)
