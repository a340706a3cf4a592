"""Advantages: how much better an answer was than the others to the same prompt, or a token than the critic expected.

Group rewards are [P, G]: P prompts with G answers each. All results are constants for gradients. A group whose rewards
are all equal has advantages of exactly 0, decided by max == min and not by a small standard deviation, which rounding
would make a number other than 0.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from . import masked


def is_uniform(rewards: Float[Array, "P G"]) -> Bool[Array, "P 1"]:
    """Whether all answers to a prompt earned the same, so that the group teaches nothing."""
    return jnp.max(rewards, axis=-1, keepdims=True) == jnp.min(rewards, axis=-1, keepdims=True)


def raw(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """The rewards themselves, without a baseline: REINFORCE, and REINFORCE++, which whitens over the batch instead."""
    return lax.stop_gradient(rewards.astype(jnp.float32))


def group_centered(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """Reward minus the group's mean. Dr. GRPO, https://arxiv.org/abs/2503.20783; Olmo 3; DeepSeek-V3.2."""
    rewards = lax.stop_gradient(rewards.astype(jnp.float32))
    centered = rewards - jnp.mean(rewards, axis=-1, keepdims=True)
    return jnp.where(is_uniform(rewards), 0.0, centered)


def group_normalized(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """Reward minus the group's mean, over the group's population standard deviation (ddof 0, no epsilon).

    GRPO: DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1.2.
    """
    rewards = lax.stop_gradient(rewards.astype(jnp.float32))
    uniform = is_uniform(rewards)
    lowest = jnp.min(rewards, axis=-1, keepdims=True)
    spread = jnp.where(uniform, 1.0, jnp.max(rewards, axis=-1, keepdims=True) - lowest)
    # The quotient does not change under shift and scale; on [0, 1] no square can underflow.
    unit = (rewards - lowest) / spread
    centered = unit - jnp.mean(unit, axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True))
    return jnp.where(uniform, 0.0, centered / jnp.where(uniform, 1.0, deviation))


def leave_one_out(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """RLOO: reward minus the mean of the other answers to the same prompt. https://arxiv.org/abs/2402.14740.

    Raises ValueError if there are fewer than two answers to a prompt.
    """
    num_answers = rewards.shape[-1]
    if num_answers < 2:
        raise ValueError(f"leave_one_out needs at least 2 answers to a prompt, got {num_answers}; sample more of them.")
    return group_centered(rewards) * (num_answers / (num_answers - 1))


def has_pass_rate_within(rewards: Float[Array, "P G"], *, low: float, high: float) -> Bool[Array, "P 1"]:
    """Whether the share of answers with a positive reward lies in [low, high]: a filter of whole groups.

    DAPO's dynamic sampling keeps groups that are not `is_uniform`, https://arxiv.org/abs/2503.14476, eq. 11; Olmo 3
    drops prompts with more than 62.5% right before training, https://arxiv.org/abs/2512.13961, section 4.4.
    """
    rate = jnp.mean((rewards > 0).astype(jnp.float32), axis=-1, keepdims=True)
    return (rate >= low) & (rate <= high)


def whiten(values: Float[Array, "*S"], mask: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Values shifted and scaled to mean 0 and population standard deviation 1 over the tokens that count; 0 elsewhere.

    Do it on the whole global batch, before it is split: micro-batches have other means. If all counted values are
    equal the result is 0.
    """
    values = jnp.where(mask != 0, lax.stop_gradient(values.astype(jnp.float32)), 0.0)
    lowest = jnp.min(jnp.where(mask != 0, values, jnp.inf), initial=jnp.inf)
    highest = jnp.max(jnp.where(mask != 0, values, -jnp.inf), initial=-jnp.inf)
    centered = values - masked.mean(values, mask)
    deviation = jnp.sqrt(masked.mean(jnp.square(centered), mask))
    uniform = (lowest >= highest) | (deviation == 0)
    return jnp.where((mask != 0) & ~uniform, centered / jnp.where(uniform, 1.0, deviation), 0.0)


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    segments: Int[Array, "B T"],
    bootstrap: Float[Array, "B T"] | None = None,
    discount: float = 1.0,
    decay: float = 0.95,
) -> Float[Array, "B T"]:
    """Generalised advantage estimation: sum_l (discount decay)^l delta_{t+l}, 0 where the mask is 0.

    delta_t = r_t + discount V_next - V_t, where next is the next token of the sequence that counts: tool output and
    padding are skipped and cost no discount. After the last one V is 0, or `bootstrap`, held at that token, for an
    episode that was cut off rather than finished. The return is the result + values. A segment's tokens must be
    contiguous. https://arxiv.org/abs/1506.02438, eq. 16.
    """
    bootstrap = jnp.zeros_like(rewards) if bootstrap is None else bootstrap
    fields = (x.astype(jnp.float32).T for x in (rewards, values, bootstrap))
    inputs = (*fields, (mask != 0).T, segments.T)

    def step(carry, now):
        next_value, next_advantage, next_segment, is_last = carry
        reward, value, after_end, counted, segment = now
        is_last = is_last | (segment != next_segment)
        following = jnp.where(is_last, after_end, next_value)
        later = jnp.where(is_last, 0.0, next_advantage)
        result = reward + discount * following - value + discount * decay * later
        carry = jnp.where(counted, value, next_value), jnp.where(counted, result, next_advantage)
        return (*carry, segment, is_last & ~counted), jnp.where(counted, result, 0.0)

    zeros = jnp.zeros(rewards.shape[0], jnp.float32)
    first = zeros, zeros, segments[:, -1], jnp.ones(rewards.shape[0], bool)
    return lax.stop_gradient(jax.lax.scan(step, first, inputs, reverse=True)[1].T)


def rewards_to_go(
    rewards: Float[Array, "B T"], mask: Float[Array, "B T"], *, segments: Int[Array, "B T"], discount: float = 1.0
) -> Float[Array, "B T"]:
    """Discounted sum of the rewards from each token to the end of its sequence; 0 where the mask is 0."""
    return gae(rewards, jnp.zeros_like(rewards), mask, segments=segments, discount=discount, decay=1.0)


def reinforce_plus_plus(
    rewards: Float[Array, "B T"],
    token_kl: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    segments: Int[Array, "B T"],
    kl_weight: float = 0.0,
) -> Float[Array, "B T"]:
    """REINFORCE++: reward - kl_weight sum_{u >= t} KL_u, whitened over all tokens that count in the global batch.

    `rewards` is the sequence's reward at each of its tokens; in the baseline variant it is `group_centered` first.
    `token_kl` is log pi_old - log reference. https://arxiv.org/abs/2501.03262, eq. 4 to 6.
    """
    penalty = rewards_to_go(token_kl, mask, segments=segments)
    return whiten(rewards.astype(jnp.float32) - kl_weight * penalty, mask)
