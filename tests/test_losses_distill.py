"""Distillation losses: the sampled token has the full-vocabulary gradient in expectation; teachers are constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.train.losses import distill, masked, policy

STUDENT, TEACHER, SAMPLER = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7)), jnp.float32)


def closed_form():
    """p ((log p - log q) - KL), the gradient of the reverse KL with respect to the student's logits."""
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x)) for x in (STUDENT, TEACHER))
    p = np.exp(log_p)
    return p * ((log_p - log_q) - np.sum(p * (log_p - log_q)))


def test_full_vocabulary_kl_by_hand():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    student, teacher = (jnp.log(jnp.asarray(x, jnp.float32)) for x in (p, q))
    assert float(distill.reverse_kl(student, teacher)) == pytest.approx(0.25 * np.log(2), rel=1e-5)
    assert float(distill.forward_kl(student, teacher)) == pytest.approx(0.25 * np.log(2), rel=1e-5)
    ratio = np.log(2) * np.array([1, 0, -1])
    np.testing.assert_allclose(
        jax.grad(distill.reverse_kl)(student, teacher), p * (ratio - 0.25 * np.log(2)), atol=1e-6
    )
    np.testing.assert_allclose(jax.grad(distill.forward_kl)(student, teacher), p - q, atol=1e-6)


def test_the_two_directions_differ_and_equal_numpy():
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(scale=3, size=(2, 3, 11)).astype(np.float32) for _ in range(2))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (student.astype(float), teacher.astype(float)))
    arrays = jnp.asarray(student), jnp.asarray(teacher)
    np.testing.assert_allclose(distill.reverse_kl(*arrays), (p * np.log(p / q)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(distill.forward_kl(*arrays), (q * np.log(q / p)).sum(-1), rtol=1e-4)
    assert float(jnp.abs(distill.reverse_kl(*arrays) - distill.forward_kl(*arrays)).max()) > 0.1


@pytest.mark.parametrize("divergence", [distill.reverse_kl, distill.forward_kl], ids=lambda f: f.__name__)
def test_tokens_that_neither_can_produce_change_nothing(divergence):
    dead = jnp.array([-jnp.inf, -jnp.inf])
    student, teacher = jnp.concatenate([STUDENT, dead]), jnp.concatenate([TEACHER, dead])
    value, gradient = jax.jit(jax.value_and_grad(divergence))(student, teacher)
    np.testing.assert_allclose(value, divergence(STUDENT, TEACHER), rtol=1e-6)
    np.testing.assert_allclose(gradient[:7], jax.grad(divergence)(STUDENT, TEACHER), atol=1e-6)
    assert gradient[7:].tolist() == [0.0, 0.0]


def test_the_expected_sampled_token_gradient_is_the_full_vocabulary_one():
    log_p, log_q = jax.nn.log_softmax(STUDENT), jax.nn.log_softmax(TEACHER)

    def expected_loss(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(log_p) * policy.policy_gradient(logp, distill.sampled_token_advantage(log_q, logp)))

    np.testing.assert_allclose(jax.grad(expected_loss)(STUDENT), closed_form(), atol=1e-6)
    np.testing.assert_allclose(jax.grad(distill.reverse_kl)(STUDENT, TEACHER), closed_form(), atol=1e-6)


def test_mopd_has_the_reverse_kl_gradient_under_any_sampler_while_nothing_is_masked():
    mu, log_q = jax.nn.log_softmax(SAMPLER), jax.nn.log_softmax(TEACHER)

    def expected_loss(logits, high):
        logp = jax.nn.log_softmax(logits)
        advantage = distill.sampled_token_advantage(log_q, logp)
        return jnp.sum(jnp.exp(mu) * distill.mopd(logp, mu, advantage, low=0.0, high=high))

    np.testing.assert_allclose(jax.grad(expected_loss)(STUDENT, jnp.inf), closed_form(), atol=1e-6)
    assert np.abs(jax.grad(expected_loss)(STUDENT, 1.0) - closed_form()).max() > 0.01


def test_mopd_by_hand():
    """Weights pi / mu of 0.8, 0.5 (the edge, kept) and 4 (dropped); the weight and the advantage are constants."""
    logp, mu = jnp.log(jnp.array([0.4, 0.25, 0.4])), jnp.log(jnp.array([0.5, 0.5, 0.1]))
    advantage = jnp.array([1.0, -2.0, 3.0])
    value, pullback = jax.vjp(lambda *x: distill.mopd(*x, low=0.5, high=2.0), logp, mu, advantage)
    np.testing.assert_allclose(value, [-0.8 * np.log(0.4), np.log(0.25), 0.0], rtol=1e-5)
    d_logp, d_mu, d_advantage = pullback(jnp.ones(3))
    np.testing.assert_allclose(d_logp, [-0.8, 1.0, 0.0], rtol=1e-5)
    assert not d_mu.any() and not d_advantage.any()


def test_a_teacher_equal_to_the_student_gives_no_advantage_loss_or_gradient():
    """Ragged, with padding: exactly 0, not nearly."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 7)).astype(np.float32)
    targets = rng.integers(0, 7, (3, 5, 1))
    mask = (np.arange(5)[None, :] < np.array([[5], [2], [0]])).astype(np.float32)

    def sampled_token(student, teacher):
        logp, teacher_logp = (
            jnp.take_along_axis(jax.nn.log_softmax(x), targets, -1)[..., 0] for x in (student, teacher)
        )
        return distill.mopd(logp, logp, distill.sampled_token_advantage(teacher_logp, logp))

    @jax.jit
    def values_and_gradients(student, teacher):
        losses = sampled_token, distill.reverse_kl, distill.forward_kl
        return [
            jax.value_and_grad(lambda x, loss=loss: masked.sum(loss(x, teacher), jnp.asarray(mask)))(student)
            for loss in losses
        ]

    (value, gradient), *divergences = values_and_gradients(logits, logits)
    assert float(value) == 0.0 and not gradient.any()
    for value, gradient in divergences:
        assert float(value) == 0.0
        assert float(jnp.abs(gradient).max()) < 1e-7
    assert all(float(jnp.abs(gradient).max()) > 0.01 for _, gradient in values_and_gradients(logits, logits[::-1]))


def test_clipping_bounds_the_advantage_on_both_sides():
    assert distill.clip_advantage(jnp.array([-9.0, 1.0, 9.0]), limit=2.0).tolist() == [-2.0, 1.0, 2.0]


@pytest.mark.parametrize("divergence", [distill.reverse_kl, distill.forward_kl], ids=lambda f: f.__name__)
def test_the_teacher_gets_no_gradient(divergence):
    assert not jax.grad(divergence, argnums=1)(STUDENT, TEACHER).any()
    assert not jax.grad(lambda t: distill.sampled_token_advantage(t, STUDENT).sum())(TEACHER).any()
