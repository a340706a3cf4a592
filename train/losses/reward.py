"""Reward models: the losses that train them, from scalar scores, and the rules that combine several.

A score is the reward head's output before any sigmoid. Losses are one value per pair, per answer or per prompt.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from . import advantage


class Margins(NamedTuple):
    """How far apart the scores of a pair must be, by how much better the annotator found the chosen answer."""

    significantly_better: float
    better: float
    slightly_better: float
    negligibly_better: float


SMALL_MARGINS = Margins(1.0, 2 / 3, 1 / 3, 0.0)
"""Llama 2, https://arxiv.org/abs/2307.09288, table 27."""
LARGE_MARGINS = Margins(3.0, 2.0, 1.0, 0.0)
"""Llama 2, https://arxiv.org/abs/2307.09288, table 27."""


def bradley_terry(
    chosen: Float[Array, "*S"], rejected: Float[Array, "*S"], margin: Float[Array, "*S"] | float = 0.0
) -> Float[Array, "*S"]:
    """-log sigma(score chosen - score rejected - margin), per pair.

    InstructGPT, https://arxiv.org/abs/2203.02155, eq. 1, has no margin; Llama 2, https://arxiv.org/abs/2307.09288,
    eq. 2, takes it from `SMALL_MARGINS` or `LARGE_MARGINS`.
    """
    return -jax.nn.log_sigmoid(chosen.astype(jnp.float32) - rejected.astype(jnp.float32) - margin)


def ranked_pairs(ranks: Float[Array, "P K"], mask: Float[Array, "P K"]) -> Float[Array, "P K K"]:
    """1 at [p, i, j] where answer i to prompt p was ranked above answer j (higher is better); ties are dropped.

    `mask` is 0 for answers that are not there, for prompts with fewer than K.
    """
    there = (mask != 0)[:, :, None] & (mask != 0)[:, None, :]
    return (there & (ranks[:, :, None] > ranks[:, None, :])).astype(jnp.float32)


def k_wise(scores: Float[Array, "P K"], pairs: Float[Array, "P K K"]) -> Float[Array, "P"]:
    """Bradley-Terry over all ranked pairs of a prompt's answers, averaged over its pairs: one value per prompt.

    All pairs of a prompt are one batch element, one forward pass per answer: as separate examples they over-fit. A
    prompt without a pair has value 0 and should have weight 0: weigh by `pairs.any((1, 2))`. InstructGPT,
    https://arxiv.org/abs/2203.02155, eq. 1.
    """
    scores = scores.astype(jnp.float32)
    gaps = jnp.where(pairs != 0, scores[:, :, None] - scores[:, None, :], 0.0)
    return jnp.sum(-jax.nn.log_sigmoid(gaps) * pairs, axis=(1, 2)) / jnp.maximum(jnp.sum(pairs, axis=(1, 2)), 1.0)


def pointwise(scores: Float[Array, "*S"], labels: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Binary cross-entropy of sigma(score) with a label in [0, 1], per answer: safe or unsafe, right or wrong.

    The safety reward model of DeepSeek-R1, https://arxiv.org/abs/2501.12948, section 3.1.
    """
    scores, labels = scores.astype(jnp.float32), labels.astype(jnp.float32)
    return -labels * jax.nn.log_sigmoid(scores) - (1.0 - labels) * jax.nn.log_sigmoid(-scores)


def safety_auxiliary(
    chosen: Float[Array, "*S"],
    rejected: Float[Array, "*S"],
    *,
    chosen_is_safe: Float[Array, "*S"],
    rejected_is_safe: Float[Array, "*S"],
) -> Float[Array, "*S"]:
    """Binary cross-entropy of both answers of a pair with their safety labels, averaged; add it to `bradley_terry`.

    It pins sigma(score) to the probability of being safe, which a threshold needs and a ranking alone does not give.
    Llama 2, https://arxiv.org/abs/2307.09288, appendix A.3.3, names the loss without a formula: this is our reading.
    """
    return 0.5 * (pointwise(chosen, chosen_is_safe) + pointwise(rejected, rejected_is_safe))


def centered_on_demonstrations(
    scores: Float[Array, "*S"], demonstration_scores: Float[Array, "N"]
) -> Float[Array, "*S"]:
    """Scores shifted so that the demonstrations' mean is 0; the ranking loss leaves the constant free.

    InstructGPT, https://arxiv.org/abs/2203.02155, section 3.5.
    """
    return scores.astype(jnp.float32) - jnp.mean(demonstration_scores.astype(jnp.float32))


def safety_or_helpfulness(
    safety: Float[Array, "*S"],
    helpfulness: Float[Array, "*S"],
    is_safety_prompt: Bool[Array, "*S"],
    *,
    threshold: float = 0.15,
) -> Float[Array, "*S"]:
    """Llama 2's rule: the safety score if the prompt is marked or sigma(safety) < threshold, else helpfulness.

    The paper applies logit() to the chosen probability and then whitens; scores here are logits already, so whiten the
    result over the batch with `advantage.whiten`. https://arxiv.org/abs/2307.09288, section 3.2.3.
    """
    safety, helpfulness = safety.astype(jnp.float32), helpfulness.astype(jnp.float32)
    return jnp.where(is_safety_prompt | (jax.nn.sigmoid(safety) < threshold), safety, helpfulness)


def weighted_sum(scores: Float[Array, "*S R"], weights: Float[Array, "R"]) -> Float[Array, "*S"]:
    """Sum of R reward models' scores, each times its weight."""
    return jnp.einsum("...r,r->...", scores.astype(jnp.float32), weights.astype(jnp.float32))


def normalized_sum(
    scores: Float[Array, "N R"], mask: Float[Array, "N"], weights: Float[Array, "R"]
) -> Float[Array, "N"]:
    """Weighted sum of scores that were first whitened per reward model over the batch, so that no scale dominates.

    A reward model that gave all answers the same score adds 0.
    """
    whitened = jax.vmap(lambda column: advantage.whiten(column, mask), in_axes=1, out_axes=1)(scores)
    return weighted_sum(whitened, weights)
