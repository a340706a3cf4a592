"""Every loss against an independent NumPy version and its finite differences, on a ragged batch.

NumPy computes in float64, sequence by sequence: (sequence, its constants, its partner) -> (sum, weight). What a loss
holds constant is frozen there, so that finite differences see only what should carry a gradient.
"""

import numpy as np
import pytest
from test_losses_properties import LOSSES, SEQUENCES, TEACHER_WEIGHTS, TRAINED, unpacked


def np_softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def counted(s):
    return np.flatnonzero(s["mask"])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def tokens(formula):
    """Sum over counted tokens of formula(s, c, t), c the sequence with what is constant frozen; weight: tokens."""
    return lambda s, c, o: (sum(formula(s, c, t) for t in counted(s)), len(counted(s)))


def answers(formula):
    return lambda s, c, o: (sum(formula(s, c, t) for t in counted(s)) / len(counted(s)), 1)


def pairs(formula):
    return lambda s, c, o: (formula(s, o), 1) if s["chosen"][0] else (0.0, 0)


def np_clip_loss(ratio, a, low=0.2, high=0.28):
    return -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)


def np_clipped(s, c, t):
    return np_clip_loss(np.exp(s["logp"][t] - c["old"][t]), c["advantage"][t])


def np_gae(c):
    where, result, later, after = counted(c), {}, 0.0, 0.0
    for t in where[::-1]:
        r = -0.3 * (c["old"][t] - c["reference"][t]) + (c["advantage"][t] if t == where[-1] else 0.0)
        later = r + 0.9 * after - c["old_values"][t] + 0.9 * 0.8 * later
        after, result[t] = c["old_values"][t], later
    return result


def np_gspo(s, c, o):
    mean = np.mean([s["logp"][t] - c["old"][t] for t in counted(s)])
    return np_clip_loss(np.exp(mean), c["advantage"][0], 0.1, 0.1), 1


def np_k3(s, c, t):
    log_ratio = c["reference"][t] - s["logp"][t]
    return np.exp(log_ratio) - log_ratio - 1


def np_v32(s, c, o):
    drift = np.mean([c["behavior"][t] - c["logp"][t] for t in counted(s)])
    keep = 0.0 if c["advantage"][0] < 0 and drift > 0.05 else 1.0
    per_token = []
    for t in counted(s):
        rho = np.exp(s["logp"][t] - c["old"][t])
        per_token.append(keep * np_clip_loss(rho, c["advantage"][t], 0.2, 0.2) + 0.2 * rho * np_k3(s, c, t))
    return np.mean(per_token), 1


def np_cispo(s, c, t):
    return -min(np.exp(c["logp"][t] - c["old"][t]), 1.1) * c["advantage"][t] * s["logp"][t]


def np_dual(s, c, t):
    a, rho = c["advantage"][t], np.exp(s["logp"][t] - c["old"][t])
    objective = -np_clip_loss(rho, a, 0.2, 0.2)
    return -(max(objective, 1.1 * a) if a < 0 else objective)


def old_over_behavior(c, t):
    return np.exp(c["old"][t] - c["behavior"][t])


def np_sequence_tis(s, c, o):
    weight = min(np.prod([old_over_behavior(c, t) for t in counted(s)]), 1.1)
    return weight * sum(np_clipped(s, c, t) for t in counted(s)), len(counted(s))


def np_sequence_mask(s, c, o):
    ratio = np.prod([old_over_behavior(c, t) for t in counted(s)]) ** (1 / len(counted(s)))
    return (0.9 <= ratio <= 1.2) * sum(np_clipped(s, c, t) for t in counted(s)), len(counted(s))


def np_staleness(s, c, t):
    age = c["age"][t]
    old = c["logp"][t] if age == 0 else c["behavior"][t] / age + (1 - 1 / age) * c["logp"][t]
    return np_clip_loss(np.exp(s["logp"][t] - old), c["advantage"][t]) if age <= 2 else 0.0


def np_kept(s, c, t):
    x = s["logits"][t]
    return -c["advantage"][t] * (x[c["targets"][t]] - np.log(np.exp(x[c["kept"][t]]).sum()))


def np_mopd(s, c, o):
    loss = 0.0
    for t in counted(s):
        w = np.exp(c["logp"][t] - c["behavior"][t])
        a = min(max(c["teacher"][t] - c["logp"][t], -0.5), 0.5) + 0.3 * c["advantage"][t]
        loss -= (w if 0.7 <= w <= 1.4 else 0.0) * a * s["logp"][t]
    weight = TEACHER_WEIGHTS[c["domain"][0]]
    return weight * loss / len(counted(s)), weight


def np_minillm(s, c, o):
    where, loss = counted(s), 0.0
    for i, t in enumerate(where):
        powers = [0.8**k for k in range(len(where) - i)]
        gaps = [c["teacher"][u] - c["logp"][u] for u in where[i:]]
        loss -= np.dot(powers, gaps) / sum(powers) * s["logp"][t]
    return loss, len(where)


def np_long_horizon(s, c, o):
    where, loss = counted(s), 0.0
    for i, t in enumerate(where):
        loss -= sum(0.8**k * (c["teacher"][u] - c["logp"][u]) for k, u in enumerate(where[i:])) * s["logp"][t]
    return loss, len(where)


def np_kl(p, q):
    return np.sum(p * np.log(p / q))


def np_divergence(formula):
    return tokens(lambda s, c, t: formula(np_softmax(s["logits"][t]), np_softmax(c["teacher_logits"][t])))


def np_jsd(p, q):
    m = 0.3 * q + 0.7 * p
    return 0.3 * np_kl(q, m) + 0.7 * np_kl(p, m)


def tail(p):
    return np.append(p[:3], p[3:].sum())


def np_ghost(s, c, o):
    where = counted(s)
    start = where[-1]
    while start - 1 in where:
        start -= 1
    return -sum(s["logp"][start : where[-1] + 1]), where[-1] + 1 - start


def np_sum(s, field=None):
    return sum(s["logp"][t] - (s[field][t] if field else 0.0) for t in counted(s))


def np_mean(s, field=None):
    return np_sum(s, field) / len(counted(s))


def h(s):
    return np_sum(s, "reference")


def np_orpo(s, o):
    likelihoods = [np.exp(np_mean(x)) for x in (s, o)]
    odds = [p / (1 - p) for p in likelihoods]
    return -np.log(likelihoods[0]) - 0.5 * np.log(sigmoid(np.log(odds[0] / odds[1])))


def np_kto(s, c, o):
    gain = 0.7 * (h(s) - 0.1)
    return (1 - sigmoid(gain) if s["chosen"][0] else 1.5 * (1 - sigmoid(-gain))), 1


def last_value(s):
    return s["values"][counted(s)[-1]]


def np_z(s, c, t):
    log_z = np.log(np.exp(s["logits"][t]).sum())
    return log_z - s["logits"][t][c["targets"][t]] + 0.1 * log_z**2


def np_value(s, c, t):
    return 0.5 * (s["values"][t] - np_gae(c)[t] - c["old_values"][t]) ** 2


def np_clipped_value(s, c, t):
    old, target = c["old_values"][t], np_gae(c)[t] + c["old_values"][t]
    near = old + min(max(s["values"][t] - old, -0.2), 0.2)
    return 0.5 * max((s["values"][t] - target) ** 2, (near - target) ** 2)


def np_ppo(s, c, t):
    return np_clip_loss(np.exp(s["logp"][t] - c["old"][t]), np_gae(c)[t])


NUMPY = {
    "nll": tokens(lambda s, c, t: -s["logp"][t]),
    "cross_entropy_z": tokens(np_z),
    "ghost": np_ghost,
    "reinforce": tokens(lambda s, c, t: -c["advantage"][t] * s["logp"][t]),
    "ppo": tokens(np_ppo),
    "value": tokens(np_value),
    "clipped_value": tokens(np_clipped_value),
    "grpo": answers(lambda s, c, t: np_clipped(s, c, t) + 0.1 * np_k3(s, c, t)),
    "dapo": tokens(np_clipped),
    "dr_grpo": lambda s, c, o: (tokens(np_clipped)(s, c, o)[0], 7),
    "dual_clip": tokens(np_dual),
    "gspo": np_gspo,
    "cispo": tokens(np_cispo),
    "deepseek_v32": np_v32,
    "k2": tokens(lambda s, c, t: (c["reference"][t] - s["logp"][t]) ** 2 / 2),
    "tis": tokens(lambda s, c, t: min(old_over_behavior(c, t), 1.1) * np_clipped(s, c, t)),
    "icepop": tokens(
        lambda s, c, t: (0.8 <= old_over_behavior(c, t) <= 1.2) * old_over_behavior(c, t) * np_clipped(s, c, t)
    ),
    "sequence_tis": np_sequence_tis,
    "sequence_mask": np_sequence_mask,
    "staleness": tokens(np_staleness),
    "keep_sampling_mask": tokens(np_kept),
    "mopd": np_mopd,
    "minillm": np_minillm,
    "long_horizon": np_long_horizon,
    "pretraining_mix": tokens(lambda s, c, t: -3.0 * 2 / 5 * s["logp"][t]),
    "reverse_kl": np_divergence(np_kl),
    "forward_kl": np_divergence(lambda p, q: np_kl(q, p)),
    "jsd": np_divergence(np_jsd),
    "top_k_reverse": np_divergence(lambda p, q: np_kl(tail(p), tail(q))),
    "top_k_forward": np_divergence(lambda p, q: np_kl(tail(q), tail(p))),
    "top_k_generalized": np_divergence(lambda p, q: np.sum(p[:3] * np.log(p[:3] / q[:3]) - p[:3] + q[:3])),
    "dpo": pairs(lambda s, o: -np.log(sigmoid(0.4 * (h(s) - h(o))))),
    "length_normalized_dpo": pairs(
        lambda s, o: -np.log(sigmoid(2.0 * (np_mean(s, "reference") - np_mean(o, "reference"))))
    ),
    "dpo_with_nll": pairs(lambda s, o: -np.log(sigmoid(0.4 * (h(s) - h(o)))) - 0.2 * np_mean(s)),
    "ipo": pairs(lambda s, o: (h(s) - h(o) - 1.0) ** 2),
    "simpo": pairs(lambda s, o: -np.log(sigmoid(2.0 * (np_mean(s) - np_mean(o)) - 0.3))),
    "orpo": pairs(np_orpo),
    "kto": np_kto,
    "bradley_terry": pairs(lambda s, o: -np.log(sigmoid(last_value(s) - last_value(o) - 1 / 3))),
    "safety_auxiliary": pairs(
        lambda s, o: -0.5 * np.log(sigmoid(last_value(s) * (-1) ** s["domain"][0]) * sigmoid(-last_value(o)))
    ),
    "pointwise": lambda s, c, o: (-np.log(sigmoid(last_value(s) * (1 if s["chosen"][0] else -1))), 1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_numpy_and_its_finite_differences(name):
    at, formula, epsilon = list(LOSSES).index(name), NUMPY[name], 1e-5
    total, weight, gradients = unpacked()

    def of_pair(index, live):
        """Sums of both sequences of a pair when the first is `live`: only these depend on it."""
        other = SEQUENCES[index ^ 1]
        return formula(live, SEQUENCES[index], other)[0] + formula(other, other, live)[0]

    numbers = [formula(s, s, SEQUENCES[i ^ 1]) for i, s in enumerate(SEQUENCES)]
    assert total[at] == pytest.approx(sum(x for x, _ in numbers), rel=1e-4, abs=1e-5)
    assert weight[at] == pytest.approx(sum(w for _, w in numbers), rel=1e-5)
    moved = False
    for index, s in enumerate(SEQUENCES):
        for field in TRAINED:
            expected = np.zeros_like(s[field])
            for place in np.ndindex(s[field].shape):
                up, down = ({**s, field: s[field].copy()} for _ in range(2))
                up[field][place] += epsilon
                down[field][place] -= epsilon
                expected[place] = (of_pair(index, up) - of_pair(index, down)) / (2 * epsilon)
            np.testing.assert_allclose(gradients[index][field][at], expected, rtol=1e-3, atol=1e-4)
            moved |= bool(np.abs(expected).max() > 1e-2)
    assert moved
