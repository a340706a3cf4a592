"""Losses of supervised learning, per token, and which tokens of a conversation they count.

Sum them with `masked.sum` and divide by the `masked.weight` of the whole global batch (the token mean), or by nothing
(the sum): a mean per micro-batch would give short sequences more weight. Tulu 3, https://arxiv.org/abs/2411.15124,
section 4.3.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from . import masked


def nll(logp: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Negative log-likelihood of the target tokens, given their log-probs."""
    return -logp.astype(jnp.float32)


def z_loss(log_z: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Square of the log-normaliser (logsumexp of the logits), which keeps logits from drifting; add it times ~1e-4.

    PaLM, https://arxiv.org/abs/2204.02311, section 5.
    """
    return jnp.square(log_z.astype(jnp.float32))


def cross_entropy(logits: Float[Array, "*S V"], targets: Int[Array, "*S"]) -> Float[Array, "*S"]:
    """Negative log-likelihood of the target tokens, given logits; equals `nll` of their log-probs."""
    logits = logits.astype(jnp.float32)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - at_target


def cross_entropy_with_z_loss(
    logits: Float[Array, "*S V"], targets: Int[Array, "*S"], *, z_weight: float = 1e-4
) -> Float[Array, "*S"]:
    """Cross-entropy + z_weight (log Z)^2. The second term's gradient is 2 z_weight log Z p, with p the softmax.

    PaLM, https://arxiv.org/abs/2204.02311, section 5.
    """
    log_z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    return cross_entropy(logits, targets) + z_weight * z_loss(log_z)


def last_turn(mask: Float[Array, "B T"], segments: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The mask of the last assistant turn alone: the last run of counted tokens of each segment, 0 elsewhere.

    Ghost Attention trains on it, so that earlier turns, written under an instruction that is no longer in the prompt,
    have no loss. Llama 2, https://arxiv.org/abs/2307.09288, section 3.3. A segment's tokens must be contiguous.
    """
    counted = mask != 0
    changed = segments[:, :-1] != segments[:, 1:]
    next_counts = jnp.concatenate([counted[:, 1:] & ~changed, jnp.zeros((mask.shape[0], 1), bool)], axis=1)
    turn_ends = (counted & ~next_counts).astype(jnp.float32)
    return jnp.where(counted & (masked.num_remaining(turn_ends, segments) == 1), mask, 0.0)
