"""No loss depends on how its batch is laid out: packed, padded, split into micro-batches or over devices.

Eight ragged sequences in four pairs, with prompts and tool output inside. One program computes all losses and their
gradients; `test_losses_numpy` holds the same losses against NumPy.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from posttrain.train.losses import (
    advantage,
    distill,
    gkd,
    kl,
    masked,
    mismatch,
    normaliser,
    on_policy,
    policy,
    preference,
    reward,
    shaping,
    supervised,
    top_k,
    value,
)

V, ROWS, LENGTH = 5, 8, 24
TRAINED = "logp", "logits", "values"  # what carries gradients
MASKS = "011", "0110111", "01", "00111", "011011", "1111", "0101", "0011110111"
TEACHER_WEIGHTS = np.array([0.5, 2.0])


def random_sequence(rng, index, mask):
    n = len(mask)
    old = -rng.exponential(size=n) - 0.1
    near = {name: old + rng.normal(scale=0.4, size=n) for name in ("logp", "behavior", "reference", "teacher")}
    old_values = rng.normal(size=n)
    kept = rng.random((n, V)) < 0.6
    targets = rng.integers(0, V, n)
    kept[np.arange(n), targets] = True
    return near | {
        "old": old,
        "logits": rng.normal(size=(n, V)),
        "teacher_logits": rng.normal(size=(n, V)),
        "values": old_values + rng.normal(scale=0.3, size=n),
        "old_values": old_values,
        "mask": np.array([float(c) for c in mask]),
        "advantage": np.full(n, (-1.3, 0.7, 1.1, -0.4)[index % 4]),
        "targets": targets,
        "kept": kept,
        "age": rng.integers(0, 4, n),
        "domain": np.full(n, index // 2 % 2),
        "chosen": np.full(n, index % 2 == 0),
    }


SEQUENCES = [random_sequence(np.random.default_rng(i), i, mask) for i, mask in enumerate(MASKS)]

# ---- the losses under test: batch -> (value per token, weight per token[, divisor unless it is the weights' sum])


def own_and_other(b, values, mask=None):
    mask = b["mask"] if mask is None else mask
    own = masked.segment_sum(values, mask, b["segments"])
    return own, masked.sum_of_segment(values, mask, b["segments"], wanted=b["partner"])


def per_pair(b):
    return masked.per_sequence(b["mask"] * b["chosen"], b["segments"])


def means(b, values):
    lengths = own_and_other(b, jnp.ones_like(values))
    return tuple(total / jnp.maximum(n, 1) for total, n in zip(own_and_other(b, values), lengths, strict=True))


def scores(b):
    last = shaping.at_last_token(jnp.ones_like(b["mask"]), b["mask"], b["segments"])
    return own_and_other(b, b["values"], last)


def old_advantage(b):
    rewards = shaping.kl_penalty(b["old"], b["reference"], weight=0.3)
    rewards += shaping.at_last_token(b["advantage"], b["mask"], b["segments"])
    return advantage.gae(rewards, b["old_values"], b["mask"], segments=b["segments"], discount=0.9, decay=0.8)


def clipped(b, advantages=None, old=None):
    advantages = b["advantage"] if advantages is None else advantages
    old = b["old"] if old is None else old
    return policy.clipped_policy_gradient(b["logp"], old, advantages, clip_low=0.2, clip_high=0.28)


def teacher_advantage(b):
    gap = distill.clip_advantage(distill.sampled_token_advantage(b["teacher"], b["logp"]), limit=0.5)
    return on_policy.with_outcome(gap, b["advantage"], alpha=0.3)


def at_k(logits):
    return jax.nn.log_softmax(logits)[..., :3]


def sequence(b):
    return {"mask": b["mask"], "segments": b["segments"]}


def of_rest(loss):
    return lambda b: (loss(b), b["mask"])


def of_answers(loss):
    return lambda b: (loss(b), masked.per_sequence(b["mask"], b["segments"]))


def of_pairs(loss):
    return lambda b: (loss(b), per_pair(b))


def log_ratios(b):
    return preference.log_ratio(b["logp"], b["reference"])


LOSSES = {
    "nll": of_rest(lambda b: supervised.nll(b["logp"])),
    "cross_entropy_z": of_rest(lambda b: supervised.cross_entropy_with_z_loss(b["logits"], b["targets"], z_weight=0.1)),
    "ghost": lambda b: (supervised.nll(b["logp"]), supervised.last_turn(b["mask"], b["segments"])),
    "reinforce": of_rest(lambda b: policy.policy_gradient(b["logp"], b["advantage"])),
    "ppo": of_rest(lambda b: clipped(b, old_advantage(b))),
    "value": of_rest(lambda b: value.squared_error(b["values"], old_advantage(b) + b["old_values"])),
    "clipped_value": of_rest(
        lambda b: value.clipped_squared_error(b["values"], b["old_values"], old_advantage(b) + b["old_values"])
    ),
    "grpo": of_answers(lambda b: clipped(b) + 0.1 * kl.k3(b["logp"], b["reference"])),
    "dapo": of_rest(clipped),
    "dr_grpo": lambda b: (clipped(b), *normaliser.PerBudget(tokens=7)(b["mask"], b["segments"])),
    "dual_clip": of_rest(
        lambda b: policy.dual_clipped_policy_gradient(b["logp"], b["old"], b["advantage"], dual_clip=1.1)
    ),
    "gspo": of_answers(
        lambda b: policy.gspo(b["logp"], b["old"], b["advantage"], **sequence(b), clip_low=0.1, clip_high=0.1)
    ),
    "cispo": of_rest(lambda b: policy.cispo(b["logp"], b["old"], b["advantage"], upper=1.1)),
    "deepseek_v32": of_answers(
        lambda b: policy.deepseek_v32(
            b["logp"],
            b["old"],
            b["advantage"],
            behavior_logp=b["behavior"],
            reference_logp=b["reference"],
            **sequence(b),
            delta=0.05,
            kl_weight=0.2,
        )
    ),
    "k2": of_rest(lambda b: kl.k2(b["logp"], b["reference"])),
    "tis": of_rest(lambda b: clipped(b) * mismatch.truncated_importance_weight(b["old"], b["behavior"], cap=1.1)),
    "icepop": of_rest(
        lambda b: clipped(b) * mismatch.masked_importance_weight(b["old"], b["behavior"], low=0.8, high=1.2)
    ),
    "sequence_tis": of_rest(
        lambda b: clipped(b) * mismatch.truncated_sequence_weight(b["old"], b["behavior"], **sequence(b), cap=1.1)
    ),
    "sequence_mask": of_rest(
        lambda b: (
            clipped(b) * mismatch.masked_sequence_weight(b["old"], b["behavior"], **sequence(b), low=0.9, high=1.2)
        )
    ),
    "staleness": of_rest(
        lambda b: (
            clipped(b, old=mismatch.interpolated_old_logp(b["logp"], b["behavior"], b["age"]))
            * mismatch.staleness_mask(b["age"], limit=2)
        )
    ),
    "keep_sampling_mask": of_rest(
        lambda b: policy.policy_gradient(mismatch.kept_logp(b["logits"], b["targets"], b["kept"]), b["advantage"])
    ),
    "mopd": lambda b: (
        distill.mopd(b["logp"], b["behavior"], teacher_advantage(b), low=0.7, high=1.4),
        on_policy.teacher_weights(
            masked.per_sequence(b["mask"], b["segments"]), b["domain"], jnp.asarray(TEACHER_WEIGHTS, jnp.float32)
        ),
    ),
    "minillm": of_rest(
        lambda b: policy.policy_gradient(
            b["logp"],
            on_policy.minillm_advantage(b["teacher"], b["logp"], b["mask"], segments=b["segments"], discount=0.8),
        )
    ),
    "long_horizon": of_rest(
        lambda b: policy.policy_gradient(
            b["logp"],
            on_policy.long_horizon_advantage(b["teacher"], b["logp"], b["mask"], segments=b["segments"], discount=0.8),
        )
    ),
    "pretraining_mix": of_rest(
        lambda b: policy.pretraining_mix(
            b["logp"], coefficient=3.0, policy_weight=jnp.float32(2.0), pretraining_weight=jnp.float32(5.0)
        )
    ),
    "reverse_kl": of_rest(lambda b: distill.reverse_kl(b["logits"], b["teacher_logits"])),
    "forward_kl": of_rest(lambda b: distill.forward_kl(b["logits"], b["teacher_logits"])),
    "jsd": of_rest(lambda b: gkd.jsd(b["logits"], b["teacher_logits"], beta=0.3)),
    "top_k_reverse": of_rest(lambda b: top_k.reverse_kl(at_k(b["logits"]), at_k(b["teacher_logits"]))),
    "top_k_forward": of_rest(lambda b: top_k.forward_kl(at_k(b["logits"]), at_k(b["teacher_logits"]))),
    "top_k_generalized": of_rest(lambda b: top_k.generalized_reverse_kl(at_k(b["logits"]), at_k(b["teacher_logits"]))),
    "dpo": of_pairs(lambda b: preference.dpo(*own_and_other(b, log_ratios(b)), beta=0.4)),
    "length_normalized_dpo": of_pairs(lambda b: preference.length_normalized_dpo(*means(b, log_ratios(b)), beta=2.0)),
    "dpo_with_nll": of_pairs(
        lambda b: preference.dpo_with_nll(*own_and_other(b, log_ratios(b)), means(b, b["logp"])[0], beta=0.4)
    ),
    "ipo": of_pairs(lambda b: preference.ipo(*own_and_other(b, log_ratios(b)), tau=0.5)),
    "simpo": of_pairs(lambda b: preference.simpo(*means(b, b["logp"]), beta=2.0, gamma=0.3)),
    "orpo": of_pairs(lambda b: preference.orpo(*means(b, b["logp"]), weight=0.5)),
    "kto": of_answers(
        lambda b: preference.kto(
            own_and_other(b, log_ratios(b))[0], b["chosen"], jnp.float32(0.1), beta=0.7, undesirable_weight=1.5
        )
    ),
    "bradley_terry": of_pairs(lambda b: reward.bradley_terry(*scores(b), 1 / 3)),
    "safety_auxiliary": of_pairs(
        lambda b: reward.safety_auxiliary(
            *scores(b),
            chosen_is_safe=(b["domain"] == 0).astype(jnp.float32),
            rejected_is_safe=jnp.zeros_like(b["mask"]),
        )
    ),
    "pointwise": of_answers(lambda b: reward.pointwise(scores(b)[0], b["chosen"].astype(jnp.float32))),
}


@partial(jax.jit, static_argnames="names")
def totals_and_gradients(trained, fixed, names=tuple(LOSSES)):
    """Per loss its sum, its weight, and the sum's gradient with respect to each trained array."""

    def totals(trained):
        found = [LOSSES[name](trained | fixed) for name in names]
        divisors = [masked.weight(weights) if not divisor else divisor[0] for _, weights, *divisor in found]
        return jnp.stack([masked.sum(*one[:2]) for one in found]), jnp.stack(divisors)

    return *totals(trained), jax.jacrev(lambda x: totals(x)[0])(trained)


def lay_out(rows, *, first=0, gap=0, first_segment=1):
    """The sequences named in `rows` as a [ROWS, LENGTH] batch, garbage elsewhere; and where each sequence begins."""
    rng = np.random.default_rng(99)
    batch = {}
    for name, example in SEQUENCES[0].items():
        garbage = rng.normal(scale=3.0, size=(ROWS, LENGTH, *example.shape[1:]))
        batch[name] = np.abs(garbage).astype(example.dtype) if example.dtype.kind == "i" else garbage
        batch[name] = batch[name].astype(np.float32 if example.dtype.kind == "f" else example.dtype)
    batch["targets"] %= V
    batch["domain"] %= 2
    batch["mask"] = np.zeros((ROWS, LENGTH), np.float32)
    batch["segments"] = np.zeros((ROWS, LENGTH), np.int32)
    batch["partner"] = np.zeros((ROWS, LENGTH), np.int32)
    begins = {}
    for row, members in enumerate(rows):
        at = first
        for index in members:
            where = slice(at, at + len(MASKS[index]))
            assert where.stop <= LENGTH
            for name, values in SEQUENCES[index].items():
                batch[name][row, where] = values
            batch["segments"][row, where] = first_segment + index
            batch["partner"][row, where] = first_segment + (index ^ 1)
            begins[index] = row, at
            at = where.stop + gap
    return batch, begins


def results(*layouts, place=lambda x: x):
    """Sums, weights and per-sequence gradients over the micro-batches `layouts` of one global batch."""
    total, weight, gradients = np.zeros(len(LOSSES)), np.zeros(len(LOSSES)), {}
    for batch, begins in layouts:
        arrays = {name: place(jnp.asarray(values)) for name, values in batch.items()}
        trained = {name: arrays.pop(name) for name in TRAINED}
        sums, weights, jacobian = totals_and_gradients(trained, arrays)
        total, weight = total + np.asarray(sums), weight + np.asarray(weights)
        jacobian = {name: np.array(x) for name, x in jacobian.items()}
        for index, (row, at) in begins.items():
            where = (slice(None), row, slice(at, at + len(MASKS[index])))
            gradients[index] = {name: jacobian[name][where].copy() for name in TRAINED}
            for name in TRAINED:
                jacobian[name][where] = 0.0
        assert not any(x.any() for x in jacobian.values()), "padding has a gradient"
    return total, weight, [gradients[i] for i in range(len(MASKS))]


ONE_PAIR_A_ROW = [0, 1], [2, 3], [4, 5], [6, 7]


@cache
def unpacked():
    return results(lay_out(ONE_PAIR_A_ROW))


def assert_same(actual):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(unpacked()), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)


def test_no_loss_changes_with_packing_micro_batches_padding_or_devices():
    assert all(
        any(np.abs(g[name][i]).max() > 1e-3 for g in unpacked()[2] for name in TRAINED) for i in range(len(LOSSES))
    )
    assert_same(
        results(lay_out([[], [4, 5, 2, 3], [7, 6, 1, 0]], first_segment=1024))
    )  # packed, pairs either way round
    assert_same(results(lay_out(ONE_PAIR_A_ROW, first=3, gap=4)))  # padding before, between and after
    assert_same(results(*(lay_out([row]) for row in ONE_PAIR_A_ROW)))  # micro-batches
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("rows"))
    assert_same(results(lay_out(ONE_PAIR_A_ROW), place=lambda x: jax.device_put(x, sharding)))
