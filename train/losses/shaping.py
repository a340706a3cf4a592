"""What is added to the reward of an answer: KL penalties, penalties for its length or its missing end, language.

Rewards are constants: nothing here carries a gradient.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from . import kl, masked


def kl_penalty(
    old_logp: Float[Array, "*S"], reference_logp: Float[Array, "*S"], *, weight: float
) -> Float[Array, "*S"]:
    """-weight (log pi_old - log reference) for each token of the answer, the last included; a reward.

    As a reward k1 has the gradient of KL(policy || reference), which as a loss term it has not. InstructGPT,
    https://arxiv.org/abs/2203.02155, eq. 2; weight 0.02.
    """
    return -weight * lax.stop_gradient(kl.k1(old_logp, reference_logp))


def at_last_token(
    scores: Float[Array, "B T"], mask: Float[Array, "B T"], segments: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """A score per sequence, held at all of its tokens, kept only at its last counted token; 0 elsewhere.

    Together with `kl_penalty` it is PPO's reward per token. A segment's tokens must be contiguous.
    """
    is_last = (mask != 0) & (masked.num_remaining(mask, segments) == 1)
    return jnp.where(is_last, lax.stop_gradient(scores.astype(jnp.float32)), 0.0)


def soft_overlong_penalty(num_tokens: Int[Array, "*S"], *, limit: int, buffer: int) -> Float[Array, "*S"]:
    """0 up to limit - buffer tokens, then falling in a straight line to -1 at the limit, -1 beyond it; per answer.

    DAPO, https://arxiv.org/abs/2503.14476, eq. 13: limit 20,480 and buffer 4,096. Raises ValueError if `buffer` is not
    in [1, limit].
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"buffer={buffer} must be from 1 to limit={limit} tokens.")
    return jnp.clip((limit - buffer - num_tokens.astype(jnp.float32)) / buffer, -1.0, 0.0)


def penalize_missing_end(
    rewards: Float[Array, "*S"], ended: Bool[Array, "*S"], *, penalty: float = -10.0
) -> Float[Array, "*S"]:
    """The rewards, but `penalty` in their place for answers without an end-of-sequence token.

    Tulu 3, https://arxiv.org/abs/2411.15124, table 21, whose code replaces the reward and does not add to it.
    """
    return jnp.where(ended, lax.stop_gradient(rewards.astype(jnp.float32)), penalty)


def language_consistency(target_words: Int[Array, "*S"], words: Int[Array, "*S"]) -> Float[Array, "*S"]:
    """Share of an answer's words that are in the target language, in [0, 1]; 1 for an answer without words.

    DeepSeek-R1, https://arxiv.org/abs/2501.12948, section 3.2.1, adds it to the reward.
    """
    share = target_words.astype(jnp.float32) / jnp.maximum(words, 1).astype(jnp.float32)
    return jnp.where(words > 0, share, 1.0)
