"""Objectives of RL as wholes: each published one against loops over answers, KL in the reward, whitening, selection."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_rl import judged

from posttrain.train import correction, objective, selection
from posttrain.train.losses import advantage, kl, normaliser
from posttrain.train.objective import KLLoss, KLReward, Objective, Overlong
from posttrain.train.step import Max, Mean, State, make_train_step
from posttrain.train.surrogate import DropDrifted, SequenceClip, Tokens

SIZES = ((3, 4, 2), (1, 6))
"""Lengths of the answers in each row; a prompt token stands before each row, padding behind."""
OBJECTIVES = {
    "olmo": objective.olmo(),
    "grpo": objective.grpo(),
    "dr_grpo": objective.dr_grpo(budget=16),
    "dapo": objective.dapo(limit=16, buffer=4),
    "gspo": objective.gspo(),
    "cispo": objective.cispo(upper=1.3),
    "dual_clip": objective.dual_clip(bound=1.2, kl_weight=0.0),
    "rloo": objective.rloo(),
    "reinforce_plus_plus": objective.reinforce_plus_plus(),
    "deepseek_v32": objective.deepseek_v32(delta=0.05, kl_weight=0.1),
}


@pytest.fixture(scope="module")
def arrays():
    """Packed answers with log-probs around each other, and where each answer lies."""
    rng, shape = np.random.default_rng(0), (2, 12)
    logp = -rng.exponential(size=shape).astype(np.float32)
    near = [logp + rng.normal(scale=0.3, size=shape).astype(np.float32) for _ in range(3)]
    mask, segments = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    advantages, spans = np.zeros(shape, np.float32), []
    for row, sizes in enumerate(SIZES):
        begin = 1
        for branch, size in enumerate(sizes, start=1):
            at = (row, slice(begin, begin + size))
            mask[at], segments[at], advantages[at] = 1.0, 1024 + branch, rng.normal()
            spans.append(at)
            begin += size
    old, behavior, reference = near
    given = logp, old, behavior, advantages, mask, segments, np.zeros(shape, np.int32)
    return Tokens(*map(jnp.asarray, given)), jnp.asarray(reference), spans


def by_loops(name, tokens, reference, spans):
    """The published formula, answer by answer in float64: the loss after division."""
    logp, old, mu, a = (np.asarray(x, np.float64) for x in tokens[:4])
    total, lengths = 0.0, [at[1].stop - at[1].start for at in spans]
    for at, size in zip(spans, lengths, strict=True):
        rho, adv = np.exp(logp[at] - old[at]), a[at]
        low, high = {"olmo": (0.2, 0.272), "dapo": (0.2, 0.28)}.get(name, (0.2, 0.2))
        each = np.minimum(rho * adv, np.clip(rho, 1 - low, 1 + high) * adv)
        if name == "olmo":
            each = each * np.minimum(np.exp(old[at] - mu[at]), 2.0)
        if name == "grpo":
            away = np.exp(np.asarray(reference)[at] - logp[at])
            each = each - 0.04 * (away - np.log(away) - 1)
        if name == "gspo":
            s = np.exp(np.mean(logp[at] - old[at]))
            each = np.full(size, min(s * adv[0], np.clip(s, 1 - 3e-4, 1 + 4e-4) * adv[0]))
        if name == "cispo":
            each = np.clip(rho, 0, 1.3) * adv * logp[at]
        if name == "dual_clip":
            each = np.where(adv < 0, np.maximum(each, 1.2 * adv), each)
        if name == "rloo":
            each = adv * logp[at]
        if name == "deepseek_v32":
            keep = not (adv[0] < 0 and np.mean(mu[at] - logp[at]) > 0.05)
            away = np.exp(np.asarray(reference)[at] - logp[at])
            each = each * keep - 0.1 * rho * (away - np.log(away) - 1)
        per_answer = {"grpo": size, "gspo": size, "dual_clip": size, "deepseek_v32": size, "dr_grpo": 16, "rloo": 1}
        total -= np.sum(each) / per_answer.get(name, 1)
    per_token = name in ("olmo", "dapo", "cispo", "reinforce_plus_plus")
    return total / (sum(lengths) if per_token else len(lengths))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_published_objective_is_its_formula_answer_by_answer(name, arrays):
    tokens, reference, spans = arrays

    def value(logp):
        total, divisor, metrics = OBJECTIVES[name].loss(tokens._replace(logp=logp), reference)
        return total / divisor, metrics

    (found, metrics), slope = jax.jit(jax.value_and_grad(value, has_aux=True))(tokens.logp)
    np.testing.assert_allclose(found, by_loops(name, tokens, reference, spans), rtol=1e-4)
    assert np.all(np.asarray(slope)[np.asarray(tokens.mask) == 0] == 0) and np.any(slope != 0)
    if name == "cispo":  # its value is not what it descends: the ratio is a constant
        ratio = np.clip(np.exp(tokens.logp - tokens.old_logp), 0, 1.3)
        np.testing.assert_allclose(slope, -ratio * tokens.advantage * tokens.mask / 16, rtol=1e-4)
    if name == "deepseek_v32":
        assert 0 < metrics["dropped"].total < 16 and metrics["drift_max"].value > 0


def test_the_mask_of_drifted_answers_goes_over_any_surrogate(arrays):
    tokens, _, _ = arrays
    inner = SequenceClip(low=0.2, high=0.2)
    per_token = np.asarray(DropDrifted(delta=0.05, surrogate=inner)(tokens))
    plain = np.asarray(inner(tokens))
    assert np.all((per_token == plain) | (per_token == 0)) and np.any(per_token != plain)


CORRECTIONS = {
    "none": correction.Uncorrected(),
    "truncated": correction.Truncated(high=1.2),
    "masked": correction.Masked(low=0.8, high=1.2),
    "sequence": correction.TruncatedSequence(high=1.2),
    "masked sequence": correction.MaskedSequence(low=0.9, high=1.1),
    "fresh": correction.Fresh(limit=0),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_every_correction_leaves_a_sampler_that_is_the_trainer_alone_and_changes_another(name, arrays):
    tokens, _, _ = arrays
    which = CORRECTIONS[name]
    here = np.asarray(tokens.mask) != 0
    same = tokens._replace(behavior_logp=tokens.old_logp)
    np.testing.assert_allclose(np.asarray(which(same))[here], 1.0, rtol=1e-6)
    other = tokens._replace(age=jnp.ones_like(tokens.age))
    assert np.any(np.abs(np.asarray(which(other))[here] - 1) > 0.01) == (name != "none")
    given = tokens.old_logp, tokens.behavior_logp, tokens.mask
    measured = correction.measured(*given, low=which.low, high=which.high)
    gap = np.abs(np.asarray(tokens.old_logp - tokens.behavior_logp))[here]
    np.testing.assert_allclose(measured["mismatch"].total / measured["mismatch"].weight, np.mean(gap), rtol=1e-5)
    np.testing.assert_allclose(measured["mismatch_max"].value, np.max(gap), rtol=1e-6)
    ratio = np.exp(np.asarray(tokens.old_logp - tokens.behavior_logp))[here]
    outside = np.sum((ratio < which.low) | (ratio > which.high))
    assert measured["mismatch_outside"] == (outside, 16)


def test_the_kl_reward_and_whitening_are_those_of_one_batch_however_it_is_split(arrays):
    tokens, reference, _ = arrays
    plan = objective.reinforce_plus_plus(kl_weight=0.3)
    whole = {
        "advantage": tokens.advantage,
        "old_logp": tokens.old_logp,
        "reference_logp": reference,
        "mask": tokens.mask,
        "segments": tokens.segments,
    }
    micros = [{name: value[row : row + 1] for name, value in whole.items()} for row in range(2)]
    plan.finish(micros)
    expected = advantage.reinforce_plus_plus(
        tokens.advantage, kl.k1(tokens.old_logp, reference), tokens.mask, segments=tokens.segments, kl_weight=0.3
    )
    found = np.concatenate([micro["advantage"] for micro in micros])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    here = found[np.asarray(tokens.mask) != 0]
    np.testing.assert_allclose([np.mean(here), np.std(here)], [0, 1], atol=1e-5)
    equal = [{"advantage": jnp.full((1, 3), 0.1), "mask": jnp.ones((1, 3))} for _ in range(2)]
    Objective(whiten=True).finish(equal)
    assert all(np.all(np.asarray(one["advantage"]) == 0) for one in equal)


def test_which_fields_an_objective_reads_follows_from_its_parts():
    assert Objective().fields(1) == ("advantage", "behavior_logp")
    assert Objective().fields(2) == ("advantage", "behavior_logp", "old_logp")
    assert Objective(kl=KLReward(weight=0.1)).fields(1) == ("advantage", "behavior_logp", "old_logp", "reference_logp")
    assert Objective(kl=KLLoss(weight=0.1)).fields(1) == ("advantage", "behavior_logp", "reference_logp")
    assert Objective(old_policy=correction.interpolated).fields(4) == ("advantage", "behavior_logp", "age")
    assert Objective(old_policy=correction.sampler).fields(4) == ("advantage", "behavior_logp")


def test_the_overlong_penalty_comes_before_the_comparison_and_counts_tokens():
    plan = Objective(overlong=Overlong(limit=10, buffer=4))
    rewards, lengths = jnp.asarray([[1.0, 1.0, 1.0]]), jnp.asarray([[6, 8, 12]])
    np.testing.assert_allclose(plan.advantages(rewards, lengths), [[0.5, 0.0, -0.5]], atol=1e-6)
    with pytest.raises(ValueError, match="buffer of 11 tokens must be from 1 to the limit of 10"):
        Overlong(limit=10, buffer=11)


def test_impossible_parts_are_refused():
    with pytest.raises(ValueError, match="budget of 0 tokens"):
        objective.dr_grpo(budget=0)
    with pytest.raises(ValueError, match="dual clip at 1.0 would silence"):
        objective.dual_clip(bound=1.0)


@pytest.mark.parametrize("varied", [0, 1, 3])
def test_dynamic_sampling_always_fills_the_batch_and_never_waits_for_ever(varied):
    """Of every three prompts `varied` have answers that differ."""
    asked = []

    def ask(count, index):
        asked.append(count)
        start = sum(asked[:-1])
        return [judged(1.0, float((start + i) % 3 >= varied)) for i in range(count)]

    chosen, everything = selection.collect(selection.Dynamic(rounds=4), 3, ask)
    assert len(chosen) == 3 and len(asked) <= 4 and len(everything) == sum(asked)
    useful = sum(map(selection.has_variance, everything))
    assert sum(map(selection.has_variance, chosen)) == min(useful, 3)
    assert asked == {0: [3, 3, 3, 3], 1: [3, 2, 1, 1], 3: [3]}[varied]


def test_an_empty_choice_and_all_groups_are_choices_too():
    same, different = judged(1.0, 1.0), judged(0.0, 1.0)
    assert selection.collect(selection.Everything(), 2, lambda count, _: [same, different])[0] == [same, different]
    assert selection.collect(selection.Informative(rounds=2), 1, lambda count, _: [same])[0] == []


def test_normalisers_differ_in_what_an_answer_weighs(arrays):
    tokens, _, _ = arrays
    ways = (normaliser.per_token, normaliser.per_sequence, normaliser.PerBudget(tokens=8))
    weights, divisors = zip(*(way(tokens.mask, tokens.segments) for way in ways), strict=True)
    assert list(map(float, divisors)) == pytest.approx([16, 5, 40])
    assert [float(weight[1, 1]) for weight in weights] == [1, 1, 1]  # an answer of one token
    np.testing.assert_allclose([float(weight[0, 1]) for weight in weights], [1, 1 / 3, 1], rtol=1e-6)


def test_metrics_of_micro_batches_are_those_of_one_batch():
    """A mean over a weight of its own, the largest value, and a sum that the loss's divisor divides."""

    def loss(params, batch):
        x = batch["x"]
        metrics = {"mean": Mean(jnp.sum(x), jnp.float32(x.size)), "max": Max(jnp.max(jnp.abs(x))), "sum": jnp.sum(x)}
        return params["w"] * jnp.sum(x), jnp.float32(2.0) * x.size, metrics

    params = {"w": jnp.float32(1.0)}
    batch = {"x": jnp.asarray([[1.0, -7.0], [2.0, 5.0], [3.0, 4.0], [0.5, 0.5]])}
    for accumulate in (1, 2, 4):
        step = make_train_step(loss, optax.sgd(0.0), accumulate=accumulate)
        _, metrics = step(State(params, optax.sgd(0.0).init(params), jnp.int32(0)), batch)
        found = [float(metrics[name]) for name in ("mean", "max", "sum", "weight")]
        np.testing.assert_allclose(found, [9 / 8, 7, 9 / 16, 16])
