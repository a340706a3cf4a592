"""KL estimators: values by hand, and the expected gradient that each has as a loss, by enumerating a vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from posttrain.train.losses import kl

LOGITS, REFERENCE, OLD = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7)), jnp.float32)


def true_gradient(forward: bool):
    def divergence(logits):
        log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(REFERENCE)
        return jnp.sum(jnp.exp(log_q) * (log_q - log_p)) if forward else jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    return np.asarray(jax.jit(jax.grad(divergence))(LOGITS))


def expected_gradient(estimator, sampler):
    """E over tokens from `sampler` of the gradient of the estimator as a loss; no gradient through sampling."""
    p = jax.nn.softmax(sampler)
    return np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(p * estimator(jax.nn.log_softmax(x)))))(LOGITS))


def reference():
    return jax.nn.log_softmax(REFERENCE)


def test_estimators_by_hand():
    logp, ref = jnp.log(jnp.array([0.5, 0.25, 0.2])), jnp.log(jnp.array([0.5, 0.5, 0.1]))
    np.testing.assert_allclose(kl.k1(logp, ref), [0, -0.693147, 0.693147], atol=1e-6)
    np.testing.assert_allclose(kl.k2(logp, ref), [0, 0.240227, 0.240227], atol=1e-6)
    np.testing.assert_allclose(kl.k3(logp, ref), [0, 2 - 0.693147 - 1, 0.5 + 0.693147 - 1], atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: kl.k3(x, ref).sum())(logp), [0, 1 - 2, 1 - 0.5], atol=1e-6)
    old = jnp.log(jnp.array([0.25, 0.25, 0.4]))
    np.testing.assert_allclose(kl.importance_weighted_k3(logp, old, ref), [0, 0.306853, 0.0965736], atol=1e-6)


@pytest.mark.parametrize("estimator", [kl.k1, kl.k3], ids=lambda f: f.__name__)
def test_k1_and_k3_are_unbiased_in_value(estimator):
    log_p, log_q = jax.nn.log_softmax(LOGITS), reference()
    exact = jnp.sum(jnp.exp(log_p) * (log_p - log_q))
    np.testing.assert_allclose(jnp.sum(jnp.exp(log_p) * estimator(log_p, log_q)), exact, rtol=1e-5)


def test_k1_as_a_loss_has_no_expected_gradient():
    gradient = expected_gradient(lambda logp: kl.k1(logp, reference()), LOGITS)
    np.testing.assert_allclose(gradient, np.zeros(7), atol=1e-6)


def test_k1_as_a_reward_has_the_reverse_kl_gradient():
    gradient = expected_gradient(lambda logp: lax.stop_gradient(kl.k1(logp, reference())) * logp, LOGITS)
    np.testing.assert_allclose(gradient, true_gradient(forward=False), atol=1e-6)


def test_k3_as_a_reward_has_the_difference_of_both_gradients():
    gradient = expected_gradient(lambda logp: lax.stop_gradient(kl.k3(logp, reference())) * logp, LOGITS)
    np.testing.assert_allclose(gradient, true_gradient(forward=False) - true_gradient(forward=True), atol=1e-6)
    assert np.abs(gradient).max() > 0.05


def test_k2_as_a_loss_has_the_reverse_kl_gradient():
    gradient = expected_gradient(lambda logp: kl.k2(logp, reference()), LOGITS)
    np.testing.assert_allclose(gradient, true_gradient(forward=False), atol=1e-6)


def test_k3_as_a_loss_has_the_forward_kl_gradient():
    gradient = expected_gradient(lambda logp: kl.k3(logp, reference()), LOGITS)
    np.testing.assert_allclose(gradient, true_gradient(forward=True), atol=1e-6)
    assert np.abs(gradient - true_gradient(forward=False)).max() > 0.05


@pytest.mark.parametrize("sampler", [LOGITS, OLD], ids=["on_policy", "off_policy"])
def test_importance_weighted_k3_has_the_reverse_kl_gradient(sampler):
    old = jax.nn.log_softmax(sampler)
    gradient = expected_gradient(lambda logp: kl.importance_weighted_k3(logp, old, reference()), sampler)
    np.testing.assert_allclose(gradient, true_gradient(forward=False), atol=1e-6)


def test_stopping_the_gradient_of_the_ratio_brings_the_forward_kl_back():
    old = jax.nn.log_softmax(OLD)
    gradient = expected_gradient(lambda logp: lax.stop_gradient(jnp.exp(logp - old)) * kl.k3(logp, reference()), OLD)
    np.testing.assert_allclose(gradient, true_gradient(forward=True), atol=1e-6)
    assert np.abs(gradient - true_gradient(forward=False)).max() > 0.05


def test_k3_is_zero_only_at_the_reference_and_never_negative():
    logp = jnp.linspace(-3.0, 3.0, 601) - 5.0
    values = np.asarray(kl.k3(logp, jnp.full_like(logp, -5.0)))
    assert values.min() == values[300] == 0.0
    assert np.all(np.delete(values, 300) > 0)
