"""Advantages: how much better an answer was than the others to the same prompt.

Rewards are [P, G]: P prompts with G answers each. A group whose rewards are all equal has advantages of exactly 0,
decided by max == min and not by a small standard deviation, which rounding would make a number other than 0.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def is_uniform(rewards: Float[Array, "P G"]) -> Bool[Array, "P 1"]:
    """Whether all answers to a prompt earned the same, so that the group teaches nothing."""
    return jnp.max(rewards, axis=-1, keepdims=True) == jnp.min(rewards, axis=-1, keepdims=True)


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
