"""What the policy-gradient variants have in common and where they part; corrections for the sampler, by enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.model import processing
from posttrain.train.losses import advantage, kl, masked, mismatch, policy, value

OLD = jnp.full((1, 4), -1.0)
SEGMENTS = jnp.array([[1, 1, 2, 2]])
ONES = jnp.ones((1, 4))


def at_ratio(*ratios):
    return OLD + jnp.log(jnp.array([ratios], jnp.float32))


def gradient(loss, logp):
    return np.asarray(jax.jit(jax.grad(lambda x: loss(x).sum()))(logp))[0]


def random_rows(seed=0, shape=(4, 6)):
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=shape)
    arrays = old + rng.normal(scale=0.3, size=shape), old, rng.normal(size=shape)
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def test_dual_clip_bounds_the_loss_of_bad_tokens_only():
    """Ratios 5, 2, 5, 0.5 with A = -1, -1, 1, -1 and c = 3: bounded at 3, in full, clipped by PPO at 1.2 and 0.8."""
    a = jnp.array([[-1.0, -1.0, 1.0, -1.0]])

    def loss(x):
        return policy.dual_clipped_policy_gradient(x, OLD, a, dual_clip=3.0)

    logp = at_ratio(5, 2, 5, 0.5)
    np.testing.assert_allclose(loss(logp), [[3.0, 2.0, -1.2, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(gradient(loss, logp), [0.0, 2.0, 0.0, 0.0], rtol=1e-6)
    with pytest.raises(ValueError, match="dual_clip=0.5 must be above 1"):
        policy.dual_clipped_policy_gradient(logp, OLD, a, dual_clip=0.5)


def test_gspo_by_hand_clips_sequences_whole_and_shares_their_gradient():
    """Sequence ratios sqrt(4 * 1) = 2, clipped at 1.5, and sqrt(2 * 0.5) = 1, whose tokens get A / 2 each."""
    a = jnp.array([[1.0, 1.0, -3.0, -3.0]])
    weights = masked.per_sequence(ONES, SEGMENTS)

    def loss(x):
        return weights * policy.gspo(x, OLD, a, mask=ONES, segments=SEGMENTS, clip_low=0.5, clip_high=0.5)

    logp = at_ratio(4, 1, 2, 0.5)
    np.testing.assert_allclose(2 * loss(logp), [[-1.5, -1.5, 3.0, 3.0]], rtol=1e-5)
    np.testing.assert_allclose(gradient(loss, logp), [0, 0, 1.5, 1.5], rtol=1e-5)


def test_gspo_of_one_token_answers_is_the_token_ratio_loss():
    logp, old, a = random_rows()
    each = jnp.broadcast_to(jnp.arange(6), (4, 6))
    clip = {"clip_low": 0.2, "clip_high": 0.28}

    def one(x):
        return policy.gspo(x, old, a, mask=jnp.ones((4, 6)), segments=each, **clip)

    def other(x):
        return policy.clipped_policy_gradient(x, old, a, **clip)

    np.testing.assert_allclose(one(logp), other(logp), rtol=1e-5)
    np.testing.assert_allclose(gradient(one, logp), gradient(other, logp), atol=1e-6)
    assert policy.is_clipped(logp, old, a, **clip).any()


def test_cispo_by_hand_keeps_the_gradient_of_every_token():
    """Ratios 8 and 0.1 become weights 5 and 0.1: of log pi and not of the ratio, so the gradient is -w A."""
    a = jnp.array([[1.0, 2.0, -1.0, 1.0]])
    logp = at_ratio(8, 0.1, 1, 1)

    def loss(x):
        return policy.cispo(x, OLD, a, upper=5.0)

    weight = np.array([5.0, 0.1, 1.0, 1.0])
    np.testing.assert_allclose(loss(logp)[0], -weight * a[0] * logp[0], rtol=1e-5)
    np.testing.assert_allclose(gradient(loss, logp), -weight * a[0], rtol=1e-5)
    np.testing.assert_allclose(policy.cispo(logp, OLD, a, lower=0.5)[0, 1], -0.5 * 2 * logp[0, 1], rtol=1e-5)


def test_cispo_on_policy_is_reinforce():
    logp, _, a = random_rows()
    np.testing.assert_array_equal(
        gradient(lambda x: policy.cispo(x, logp, a), logp), gradient(lambda x: policy.policy_gradient(x, a), logp)
    )


def test_dapo_with_answers_of_one_length_is_grpo_up_to_scale():
    """Token-level and per-sequence weights then differ by the length alone; with ragged answers by more."""
    logp, old, a = random_rows()
    rows = jnp.broadcast_to(jnp.arange(1, 5)[:, None], (4, 6))

    def mean(x, weights):
        loss = policy.clipped_policy_gradient(x, old, a, clip_low=0.2, clip_high=0.28)
        return masked.sum(loss, weights) / masked.weight(weights)

    both = jax.jit(jax.grad(mean))
    full, ragged = jnp.ones((4, 6)), jnp.asarray(np.tri(4, 6, 2), jnp.float32)
    np.testing.assert_allclose(both(logp, full), both(logp, masked.per_sequence(full, rows)), atol=1e-7)
    assert np.abs(both(logp, ragged) - both(logp, masked.per_sequence(ragged, rows))).max() > 0.01


@pytest.mark.parametrize(
    "advantages",
    [advantage.group_centered, advantage.group_normalized, advantage.leave_one_out],
    ids=lambda f: f.__name__,
)
def test_equal_rewards_give_exactly_no_gradient_in_every_variant(advantages):
    logp, old, _ = random_rows()
    a = jnp.broadcast_to(advantages(jnp.full((1, 4), 0.1))[0][:, None], logp.shape)
    rows = jnp.broadcast_to(jnp.arange(1, 5)[:, None], (4, 6))
    mask = jnp.ones((4, 6))

    @jax.jit
    @jax.grad
    def total(x):
        losses = (
            policy.policy_gradient(x, a),
            policy.clipped_policy_gradient(x, old, a),
            policy.dual_clipped_policy_gradient(x, old, a),
            policy.gspo(x, old, a, mask=mask, segments=rows),
            policy.cispo(x, old, a),
            policy.deepseek_v32(
                x, old, a, behavior_logp=old, reference_logp=old, mask=mask, segments=rows, delta=0.1, kl_weight=0.0
            ),
        )
        return sum(weight * loss.sum() for weight, loss in zip((1, 2, 4, 8, 16, 32), losses, strict=True))

    assert not np.asarray(total(logp)).any()


def v32(logp, old, a, behavior, reference, *, delta=0.5, kl_weight=0.0):
    return policy.deepseek_v32(
        logp, old, a, behavior_logp=behavior, reference_logp=reference, mask=ONES, segments=SEGMENTS, delta=delta,
        kl_weight=kl_weight,
    )  # fmt: skip


def test_v32_drops_drifted_negative_sequences_and_never_positive_ones():
    """Both sequences have become e times less likely than when sampled; only the one with A < 0 is dropped."""
    logp, behavior = OLD - 1, OLD
    a = jnp.array([[-1.0, -1.0, 1.0, 1.0]])
    dropped = v32(logp, logp, a, behavior, logp)
    np.testing.assert_allclose(dropped, [[0, 0, -1, -1]])
    np.testing.assert_allclose(v32(logp, logp, a, behavior, logp, delta=1.5), [[1, 1, -1, -1]])
    np.testing.assert_allclose(v32(logp, logp, a, logp, logp, delta=1e-6), [[1, 1, -1, -1]])


def test_v32_masks_the_policy_term_and_not_the_kl_term():
    a, reference = jnp.array([[-1.0, -1.0, 1.0, 1.0]]), OLD - 0.5
    loss = v32(OLD - 1, OLD - 1, a, OLD, reference, kl_weight=2.0)
    penalty = 2.0 * float(kl.k3(jnp.float32(-2.0), jnp.float32(-1.5)))
    np.testing.assert_allclose(loss, [[penalty, penalty, penalty - 1, penalty - 1]], rtol=1e-5)


def test_the_v32_kl_term_has_the_reverse_kl_gradient_off_policy():
    logits, reference, old = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    log_ref, log_old = jax.nn.log_softmax(reference), jax.nn.log_softmax(old)

    def expected_loss(x):
        row = jax.nn.log_softmax(x)[None]
        loss = v32(row, log_old[None], jnp.zeros((1, 4)), log_old[None], log_ref[None], kl_weight=1.0)
        return jnp.sum(jnp.exp(log_old) * loss[0])

    def reverse_kl(x):
        log_p = jax.nn.log_softmax(x)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_ref))

    gradients = [jax.jit(jax.grad(f))(logits) for f in (expected_loss, reverse_kl)]
    np.testing.assert_allclose(*gradients, atol=1e-6)
    assert np.abs(gradients[0]).max() > 0.01


def test_the_pretraining_mix_adds_a_token_mean_however_the_batch_is_split():
    """After division by the policy's weight the pretraining tokens add coefficient x their mean NLL."""
    logp, global_weights = jnp.array([-1.0, -2.0, -6.0]), {"policy_weight": 10.0, "pretraining_weight": 3.0}
    arrays = {name: jnp.float32(x) for name, x in global_weights.items()}
    whole = policy.pretraining_mix(logp, coefficient=27.8, **arrays).sum() / 10.0
    assert float(whole) == pytest.approx(27.8 * 3.0, rel=1e-5)
    split = sum(policy.pretraining_mix(part, coefficient=27.8, **arrays).sum() for part in (logp[:1], logp[1:])) / 10.0
    assert float(split) == pytest.approx(float(whole), rel=1e-6)
    slope = jax.grad(lambda x: policy.pretraining_mix(x, coefficient=3.0, **arrays).sum())(logp)
    np.testing.assert_allclose(slope, [-10.0] * 3, rtol=1e-6)


def test_value_losses_by_hand():
    """Return 1, old value 0, clip 0.2: a value of 0.5 has moved too far to be pulled further, one of -0.5 has not."""
    values, old, target = jnp.array([0.5, -0.5, 0.1]), jnp.zeros(3), jnp.ones(3)
    plain = jax.vjp(lambda v: value.squared_error(v, target), values)
    np.testing.assert_allclose(plain[0], [0.125, 1.125, 0.405], rtol=1e-5)
    np.testing.assert_allclose(plain[1](jnp.ones(3))[0], [-0.5, -1.5, -0.9], rtol=1e-5)
    clipped = jax.vjp(lambda v: value.clipped_squared_error(v, old, target), values)
    np.testing.assert_allclose(clipped[0], [0.32, 1.125, 0.405], rtol=1e-5)
    np.testing.assert_allclose(clipped[1](jnp.ones(3))[0], [0.0, -1.5, -0.9], rtol=1e-5)
    assert not jax.grad(lambda r: value.squared_error(values, r).sum())(target).any()


def enumerate_answers(seed=0):
    """All nine answers of two tokens from three, under a sampler and a policy whose second token depends on the first.

    Log-probs [9, 2] of either, and a reward per answer.
    """
    rng = np.random.default_rng(seed)
    first, second = np.divmod(np.arange(9), 3)

    def logp():
        one, two = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=shape), jnp.float32)) for shape in ((3,), (3, 3)))
        return jnp.stack([one[first], two[first, second]], axis=1)

    return logp(), logp(), jnp.asarray(rng.normal(size=9), jnp.float32)


def test_only_the_weight_of_whole_answers_makes_the_expectation_that_of_the_policy():
    mu, pi, rewards = enumerate_answers()
    packed = {"mask": jnp.ones((9, 2)), "segments": jnp.broadcast_to(jnp.arange(1, 10)[:, None], (9, 2))}
    sampled, truth = jnp.exp(mu.sum(1)), jnp.sum(jnp.exp(pi.sum(1)) * rewards)

    def expectation(weights):
        return float(jnp.sum(sampled * weights[:, 1] * rewards))

    whole = mismatch.truncated_sequence_weight(pi, mu, **packed, cap=jnp.inf)
    assert expectation(whole) == pytest.approx(float(truth), abs=1e-6)
    assert abs(expectation(mismatch.truncated_importance_weight(pi, mu, cap=jnp.inf)) - float(truth)) > 0.01
    cut = mismatch.truncated_sequence_weight(pi, mu, **packed, cap=1.0)
    assert float(cut.max()) == 1.0 and float(cut.min()) < 0.9
    np.testing.assert_allclose(jnp.minimum(whole, 1.0), cut, rtol=1e-6)


def test_sequences_are_masked_by_their_geometric_mean_ratio_whatever_their_length():
    behavior = jnp.zeros((1, 6))
    logp = jnp.log(jnp.array([[4.0, 1.0, 1.5, 1.5, 1.5, 1.5]]))
    segments = jnp.array([[1, 1, 2, 2, 2, 2]])
    mask = mismatch.masked_sequence_weight(logp, behavior, mask=jnp.ones((1, 6)), segments=segments, low=0.5, high=1.9)
    assert mask.tolist() == [[0, 0, 1, 1, 1, 1]]


def test_the_interpolated_policy_is_the_current_one_when_fresh_and_the_samplers_after_one_update():
    logp, mu, age = jnp.full(4, -1.0), jnp.full(4, -3.0), jnp.array([0, 1, 2, 4])
    np.testing.assert_allclose(mismatch.interpolated_old_logp(logp, mu, age), [-1.0, -3.0, -2.0, -1.5], rtol=1e-6)
    assert not jax.grad(lambda x: mismatch.interpolated_old_logp(x, mu, age).sum())(logp).any()
    assert mismatch.staleness_mask(age, limit=2).tolist() == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.8}], ids=str)
def test_log_probs_among_the_kept_tokens_are_those_the_sampler_reports(cut):
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(6, 9)), jnp.float32)
    sampling = processing.Sampling(max_tokens=1, **cut)
    reported = processing.processed(scores, sampling)
    kept = processing.kept(scores, sampling)
    best = jnp.argmax(scores, axis=-1)
    expected = jnp.take_along_axis(reported, best[:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(mismatch.kept_logp(scores, best, kept), expected, atol=1e-6)
    plain = jnp.take_along_axis(jax.nn.log_softmax(scores), best[:, None], axis=-1)[:, 0]
    assert float(jnp.min(expected - plain)) > 0.01
    slope = jax.jit(jax.grad(lambda x: mismatch.kept_logp(x, best, kept).sum()))(scores)
    assert not np.asarray(slope)[~np.asarray(kept)].any() and np.isfinite(slope).all()
