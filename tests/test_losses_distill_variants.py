"""Distillation beyond one teacher and one divergence: GKD's family, top-k with a tail, MiniLLM, routing, outcomes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.train.losses import distill, gkd, masked, on_policy, policy, top_k

LN2 = np.log(2)
JSD = jax.jit(jax.value_and_grad(gkd.jsd))


def random_logits(num, vocab=9, seed=0, scale=2.0):
    return tuple(jnp.asarray(scale * np.random.default_rng(seed).normal(size=(2, num, vocab)), jnp.float32))


def test_jsd_by_hand():
    """T = (1, 0), S = (1/2, 1/2), beta 1/2: M = (3/4, 1/4)."""
    student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.array([0.0, -jnp.inf])
    expected = 0.5 * np.log(4 / 3) + 0.5 * (0.5 * np.log(2 / 3) + 0.5 * np.log(2))
    value, gradient = JSD(student, teacher)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    # d/dp_v = (1 - beta) log(p / m); along the softmax p (x - mean x).
    slopes = 0.5 * np.log(np.array([2 / 3, 2]))
    np.testing.assert_allclose(gradient, 0.5 * (slopes - slopes.mean()), rtol=1e-5)


def test_jsd_at_its_ends_is_the_forward_and_the_reverse_kl():
    student, teacher = random_logits(4)
    np.testing.assert_array_equal(gkd.jsd(student, teacher, beta=0.0), distill.forward_kl(student, teacher))
    np.testing.assert_array_equal(gkd.jsd(student, teacher, beta=1.0), distill.reverse_kl(student, teacher))
    # Near the ends the mixture formula is beta, or 1 - beta, times those: it would vanish in the limit.
    near = gkd.jsd(student, teacher, beta=1e-3) / 1e-3
    np.testing.assert_allclose(near, distill.forward_kl(student, teacher), rtol=0.05)
    with pytest.raises(ValueError, match="beta=-0.1"):
        gkd.jsd(student, teacher, beta=-0.1)


def test_jsd_of_one_half_is_symmetric_bounded_by_log_two_and_zero_only_at_the_teacher():
    student, teacher = random_logits(50, scale=20.0)
    there, back = gkd.jsd(student, teacher), gkd.jsd(teacher, student)
    np.testing.assert_allclose(there, back, atol=1e-5)
    assert float(there.min()) > 0 and 0.6 < float(there.max()) <= LN2 + 1e-6
    np.testing.assert_allclose(gkd.jsd(teacher, teacher), 0.0, atol=1e-6)


def test_tokens_that_neither_can_produce_change_nothing_in_jsd():
    dead = jnp.full(2, -jnp.inf)
    student, teacher = (x[0] for x in random_logits(1))
    value, gradient = JSD(jnp.append(student, dead), jnp.append(teacher, dead))
    expected, expected_gradient = JSD(student, teacher)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradient, [*expected_gradient, 0, 0], atol=1e-6)


def top(logits, k=4):
    return jax.nn.log_softmax(logits)[..., :k]


def test_top_k_with_a_tail_by_hand():
    """S = {a}: p = 1/2 and q = 1/4, so the tails are 1/2 and 3/4."""
    p, q = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
    reverse = 0.5 * LN2 + 0.5 * np.log(2 / 3)
    forward = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    value, slope = jax.jit(jax.value_and_grad(top_k.reverse_kl))(p, q)
    assert float(value) == pytest.approx(reverse, rel=1e-5)
    # d/d log p = p (log(p/q) + 1) - p (log(tail p / tail q) + 1): the tail shrinks as p grows.
    np.testing.assert_allclose(slope, [0.5 * (LN2 - np.log(2 / 3))], rtol=1e-5)
    value, slope = jax.jit(jax.value_and_grad(top_k.forward_kl))(p, q)
    assert float(value) == pytest.approx(forward, rel=1e-5)
    np.testing.assert_allclose(slope, [-0.25 + 0.75], rtol=1e-5)
    value, slope = jax.jit(jax.value_and_grad(top_k.generalized_reverse_kl))(p, q)
    assert float(value) == pytest.approx(0.5 * LN2 - 0.25, rel=1e-5)
    np.testing.assert_allclose(slope, [0.5 * LN2], rtol=1e-5)


def test_a_tail_bucket_never_adds_to_the_divergence_and_k_of_all_but_one_is_all_of_it():
    student, teacher = random_logits(50)
    for bucket, full in ((top_k.reverse_kl, distill.reverse_kl), (top_k.forward_kl, distill.forward_kl)):

        @jax.jit
        def at_every_k(s, t, bucket=bucket, full=full):
            return full(s, t), [bucket(top(s, k), top(t, k)) for k in (1, 4, 8)]

        whole, values = at_every_k(student, teacher)
        assert float(values[0].min()) >= -1e-6
        assert all(float(jnp.max(less - more)) < 1e-4 for less, more in zip(values, [*values[1:], whole], strict=True))
        assert float(jnp.max(whole - values[1])) > 0.1
        np.testing.assert_allclose(values[2], whole, rtol=1e-3, atol=1e-4)


def test_only_agreement_within_the_k_tokens_counts_and_there_value_and_gradient_vanish():
    """Same log-probs on the k tokens, other tokens permuted. A plain sum of p log(p / q) would not vanish nearby."""
    teacher = random_logits(3)[0]
    student = jnp.concatenate([teacher[:, :4], teacher[:, 4:][:, ::-1]], axis=1)
    for loss in (top_k.reverse_kl, top_k.forward_kl, top_k.generalized_reverse_kl):
        value, slope = jax.jit(jax.value_and_grad(lambda x, loss=loss: loss(top(x), top(teacher)).sum()))(student)
        assert float(value) == pytest.approx(0.0, abs=1e-5)
        np.testing.assert_allclose(slope, 0.0, atol=1e-5)
        assert float(loss(top(student + jnp.eye(3, 9)), top(teacher)).min()) > 1e-3


def test_a_tail_that_rounds_to_nothing_stays_finite():
    student, teacher = jnp.array([30.0, 0.0, 0.0]), jnp.array([0.0, 0.0, 0.0])
    for loss in (top_k.reverse_kl, top_k.forward_kl):
        value, slope = jax.jit(jax.value_and_grad(lambda x, loss=loss: loss(top(x, 1), top(teacher, 1))))(student)
        assert np.isfinite(value) and np.isfinite(slope).all()


def enumerated(seed=0):
    """All nine answers of two tokens from three: indices, and random logits of the first and the second token."""
    rng = np.random.default_rng(seed)
    first, second = np.divmod(np.arange(9), 3)

    def parameters():
        return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3,), (3, 3)))

    def logp(parameters):
        one, two = (jax.nn.log_softmax(x) for x in parameters)
        return jnp.stack([one[first], two[first, second]], axis=1)

    return parameters(), parameters(), logp


ONES, SEGMENTS = jnp.ones((9, 2)), jnp.broadcast_to(jnp.arange(1, 10)[:, None], (9, 2))


def test_the_long_horizon_advantage_has_the_gradient_of_the_sequence_kl_and_the_single_step_one_has_not():
    student, teacher, logp = enumerated()
    sampled = jnp.exp(logp(student).sum(1))

    def sequence_kl(x):
        total = logp(x).sum(1)
        return jnp.sum(jnp.exp(total) * (total - logp(teacher).sum(1)))

    def expected_loss(x, discount):
        now = logp(x)
        a = on_policy.long_horizon_advantage(logp(teacher), now, ONES, segments=SEGMENTS, discount=discount)
        return jnp.sum(sampled[:, None] * policy.policy_gradient(now, a))

    truth, gradient = jax.jit(jax.grad(sequence_kl))(student), jax.jit(jax.grad(expected_loss), static_argnums=1)
    for x, y in zip(gradient(student, 1.0), truth, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    assert np.abs(gradient(student, 0.0)[0] - truth[0]).max() > 0.01


def test_minillm_without_a_horizon_is_the_sampled_token_advantage():
    student, teacher, logp = enumerated()
    rows = logp(teacher), logp(student), ONES
    plain = distill.sampled_token_advantage(rows[0], rows[1])
    np.testing.assert_allclose(on_policy.minillm_advantage(*rows, segments=SEGMENTS, discount=0.0), plain, atol=1e-6)
    mean = on_policy.minillm_advantage(*rows, segments=SEGMENTS, discount=1.0)
    np.testing.assert_allclose(mean, jnp.stack([plain.mean(1), plain[:, 1]], axis=1), atol=1e-6)


def test_samples_of_the_mixture_are_weighted_back_to_the_student():
    student, teacher = (jax.nn.log_softmax(x[0]) for x in random_logits(1))
    mixed = on_policy.mixed_sampler_logp(teacher, student, teacher_share=0.2)
    np.testing.assert_allclose(jnp.exp(mixed), 0.2 * jnp.exp(teacher) + 0.8 * jnp.exp(student), rtol=1e-5)
    with pytest.raises(ValueError, match="teacher_share=0.0"):
        on_policy.mixed_sampler_logp(teacher, student, teacher_share=0.0)


def test_an_outcome_of_weight_zero_or_of_equal_rewards_changes_nothing():
    gap, outcome = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.5])
    assert on_policy.with_outcome(gap, outcome, alpha=0.0).tolist() == [1.0, -2.0]
    assert on_policy.with_outcome(gap, 0 * outcome, alpha=3.0).tolist() == [1.0, -2.0]
    assert on_policy.with_outcome(gap, outcome, alpha=3.0).tolist() == [2.5, -0.5]
    assert distill.clip_advantage(jnp.array([9.0, -9.0, 1.0]), limit=2.0).tolist() == [2.0, -2.0, 1.0]


def routed():
    rng = np.random.default_rng(0)
    teacher = jnp.array([[0, 0, 0, 0], [2, 2, 2, 2], [1, 1, 1, 1]])
    mask = jnp.array([[1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]], jnp.float32)
    logp, *teachers = -jnp.asarray(rng.exponential(size=(4, 3, 4)), jnp.float32)
    return teacher, mask, logp, jnp.stack(teachers)


def test_each_token_is_scored_by_exactly_its_own_teacher():
    teacher, mask, logp, teachers = routed()
    own = on_policy.of_teacher(teachers, teacher)
    np.testing.assert_array_equal(own, jnp.stack([teachers[0, 0], teachers[2, 1], teachers[1, 2]]))
    other = on_policy.of_teacher(teachers.at[1, :2].set(jnp.nan).at[0, 1:].set(jnp.nan), teacher)
    np.testing.assert_array_equal(own, other)
    means = on_policy.per_teacher_mean(own - logp, mask, teacher, num_teachers=4)
    expected = [np.mean((own - logp)[row][mask[row] > 0]) for row in (0, 2, 1)]
    np.testing.assert_allclose(means, [*expected, 0.0], rtol=1e-5)


def test_the_gradient_over_teachers_is_the_weighted_sum_of_each_ones_and_tool_output_adds_nothing():
    teacher, mask, logp, teachers = routed()
    shares = jnp.array([0.5, 2.0, 3.0])

    def loss(x, own_mask, own_teacher):
        gap = distill.sampled_token_advantage(own_teacher, x)
        return masked.sum(distill.mopd(x, logp, gap), own_mask)

    gradient = jax.jit(jax.grad(loss))
    weights = on_policy.teacher_weights(mask, teacher, shares)
    together = gradient(logp, weights, on_policy.of_teacher(teachers, teacher))
    alone = [gradient(logp, mask * (teacher == i), teachers[i]) for i in range(3)]
    np.testing.assert_allclose(together, sum(w * g for w, g in zip(shares, alone, strict=True)), rtol=1e-5)
    np.testing.assert_array_equal(together == 0, mask == 0)
