"""Corrections for the gap between sampler and trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.train.losses import masked, mismatch

MU = jnp.log(jnp.array([0.5, 0.4, 0.1]))
PI = jnp.log(jnp.array([0.4, 0.2, 0.4]))  # ratios 0.8, 0.5, 4


def test_weights_by_hand():
    np.testing.assert_allclose(mismatch.truncated_importance_weight(PI, MU, cap=2.0), [0.8, 0.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(mismatch.masked_importance_weight(PI, MU, low=0.6, high=3.0), [0.8, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(mismatch.masked_importance_weight(PI, MU, low=0.4, high=5.0), [0.8, 0.5, 4], rtol=1e-6)


def test_a_ratio_of_one_is_inside_a_range_that_ends_there():
    assert mismatch.masked_importance_weight(MU, MU, low=1.0, high=1.0).tolist() == [1.0, 1.0, 1.0]


def test_truncation_without_a_cap_is_plain_importance_sampling():
    function = jnp.array([3.0, -1.0, 2.0])
    weight = mismatch.truncated_importance_weight(PI, MU, cap=jnp.inf)
    np.testing.assert_allclose(jnp.sum(jnp.exp(MU) * weight * function), jnp.sum(jnp.exp(PI) * function), rtol=1e-6)


def test_truncation_at_one_never_weighs_up():
    assert float(mismatch.truncated_importance_weight(PI, MU, cap=1.0).max()) == 1.0


@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize(
    "weight", [mismatch.truncated_importance_weight, mismatch.masked_importance_weight], ids=lambda f: f.__name__
)
def test_weights_are_constants(weight, argument):
    assert not jax.grad(lambda *x: weight(*x).sum(), argnums=argument)(PI, MU).any()


def test_the_off_policy_mask_drops_only_drifted_sequences_with_negative_advantage():
    drift = jnp.array([0.6, 0.6, 0.4, 0.6])
    advantage = jnp.array([-1.0, 1.0, -1.0, 0.0])
    assert mismatch.off_policy_sequence_mask(drift, advantage, delta=0.5).tolist() == [0.0, 1.0, 1.0, 1.0]


def test_the_off_policy_mask_drops_nothing_when_the_sampler_is_the_policy():
    logp = -jnp.asarray(np.random.default_rng(0).exponential(size=(3, 5)), jnp.float32)
    drift = -masked.sequence_mean(mismatch.log_ratio(logp, logp), jnp.ones((3, 5)))
    assert mismatch.off_policy_sequence_mask(drift, -jnp.ones(3), delta=1e-6).tolist() == [1.0, 1.0, 1.0]


def test_drift_is_positive_where_the_policy_has_left_the_sample():
    """A sample that the policy has made less likely: log sampler - log policy > 0, so a negative advantage drops it."""
    behavior, logp = jnp.full((1, 4), -1.0), jnp.full((1, 4), -2.0)
    drift = -masked.sequence_mean(mismatch.log_ratio(logp, behavior), jnp.ones((1, 4)))
    assert drift.tolist() == [1.0]
    assert mismatch.off_policy_sequence_mask(drift, jnp.array([-1.0]), delta=0.5).tolist() == [0.0]


def test_metrics_by_hand_ignore_masked_tokens():
    ratio = jnp.log(jnp.array([1.0, 0.25, 3.0, 1e6]))
    mask = jnp.array([1.0, 1.0, 1.0, 0.0])
    metrics = mismatch.metrics(ratio, mask, low=0.5, high=4.0)
    assert float(metrics["log_ratio_mean"]) == pytest.approx(np.log(0.75) / 3)
    assert float(metrics["log_ratio_max"]) == pytest.approx(np.log(4))
    assert float(metrics["outside_share"]) == pytest.approx(1 / 3)
    assert all(float(x) == 0.0 for x in mismatch.metrics(ratio, jnp.zeros(4), low=0.5, high=4.0).values())
