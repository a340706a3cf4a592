"""Losses on preferences, one value per pair (per answer for KTO): the chosen answer should beat the rejected one.

Their inputs are numbers per answer, made from log-probs per token by `masked`:

    log ratio       h = sum_t of log policy - log reference: `masked.sequence_sum` with one answer a row
    mean log-prob   (1 / |y|) sum_t of log policy: `masked.sequence_mean`
    packed rows     `masked.segment_sum` for a token's own answer, `masked.sum_of_segment` for the other of its pair;
                    weigh the result by `masked.per_sequence` of the chosen answers' mask, so that a pair counts once

Every loss on h is log 2 where policy and reference agree (IPO: 1 / (4 tau^2); KTO: half its weight), and its gradient
raises the chosen answer's log-prob and lowers the rejected one's by the same amount: both may fall together.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def _float32(*arrays: Array) -> tuple[Array, ...]:
    return tuple(x.astype(jnp.float32) for x in arrays)


def log_ratio(logp: Float[Array, "*S"], reference_logp: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """log policy - log reference, per token; the reference is a constant."""
    return logp.astype(jnp.float32) - lax.stop_gradient(reference_logp.astype(jnp.float32))


def dpo(chosen: Float[Array, "*S"], rejected: Float[Array, "*S"], *, beta: float = 0.1) -> Float[Array, "*S"]:
    """-log sigma(beta (h_c - h_r)) of the answers' log ratios. DPO, https://arxiv.org/abs/2305.18290, eq. 7."""
    chosen, rejected = _float32(chosen, rejected)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected))


def length_normalized_dpo(
    chosen_mean: Float[Array, "*S"], rejected_mean: Float[Array, "*S"], *, beta: float = 5.0
) -> Float[Array, "*S"]:
    """DPO on log ratios per token, h / |y| (`masked.sequence_mean`), so that length earns nothing.

    Tulu 3, https://arxiv.org/abs/2411.15124, eq. 6; Olmo 3.
    """
    return dpo(chosen_mean, rejected_mean, beta=beta)


def dpo_with_nll(
    chosen: Float[Array, "*S"],
    rejected: Float[Array, "*S"],
    chosen_mean_logp: Float[Array, "*S"],
    *,
    beta: float = 0.1,
    nll_weight: float = 0.2,
) -> Float[Array, "*S"]:
    """DPO + nll_weight times the chosen answer's NLL per token, which keeps its log-prob from falling.

    Llama 3, https://arxiv.org/abs/2407.21783, section 4.1.4; that it is per token follows
    https://arxiv.org/abs/2404.19733, eq. 1.
    """
    return dpo(chosen, rejected, beta=beta) - nll_weight * chosen_mean_logp.astype(jnp.float32)


def ipo(chosen: Float[Array, "*S"], rejected: Float[Array, "*S"], *, tau: float = 0.1) -> Float[Array, "*S"]:
    """(h_c - h_r - 1 / (2 tau))^2: the gap of log ratios has a target, and past it the gradient turns round.

    IPO, https://arxiv.org/abs/2310.12036, eq. 17; h are sums over the answer.
    """
    chosen, rejected = _float32(chosen, rejected)
    return jnp.square(chosen - rejected - 1.0 / (2.0 * tau))


def simpo(
    chosen_mean_logp: Float[Array, "*S"], rejected_mean_logp: Float[Array, "*S"], *, beta: float = 2.0, gamma: float = 1
) -> Float[Array, "*S"]:
    """-log sigma(beta (mean log-prob chosen - rejected) - gamma), without a reference.

    SimPO, https://arxiv.org/abs/2405.14734, eq. 6.
    """
    chosen, rejected = _float32(chosen_mean_logp, rejected_mean_logp)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


def _log_one_minus_exp(x: Array) -> Array:
    """log(1 - exp(x)) for x <= 0 without cancellation at either end."""
    near = x > -0.6931472
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def orpo(
    chosen_mean_logp: Float[Array, "*S"], rejected_mean_logp: Float[Array, "*S"], *, weight: float = 0.1
) -> Float[Array, "*S"]:
    """-log P(y_c) - weight log sigma(log odds(y_c) - log odds(y_r)), odds = P / (1 - P), without a reference.

    P is the length-normalised likelihood exp(mean log-prob). ORPO, https://arxiv.org/abs/2403.07691, eq. 6 and 7.
    """
    chosen, rejected = _float32(chosen_mean_logp, rejected_mean_logp)
    log_odds = chosen - _log_one_minus_exp(chosen) - rejected + _log_one_minus_exp(rejected)
    return -chosen - weight * jax.nn.log_sigmoid(log_odds)


def kto_reference_point(mismatched: Float[Array, "N"], weight: Float[Array, "N"]) -> Float[Array, ""]:
    """KTO's z0 = max(0, mean h) over answers paired with *other* prompts, an estimate of KL(policy || reference).

    Shift the answers of the global batch by one prompt and score those; a constant. KTO,
    https://arxiv.org/abs/2402.01306, section 4.1.
    """
    total = jnp.sum(jnp.where(weight != 0, mismatched.astype(jnp.float32), 0.0) * weight)
    mean = total / jnp.maximum(jnp.sum(weight), jnp.finfo(jnp.float32).tiny)
    return lax.stop_gradient(jnp.maximum(mean, 0.0))


def kto(
    answer: Float[Array, "*S"],
    desirable: Bool[Array, "*S"],
    reference_point: Float[Array, ""],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "*S"]:
    """weight - value, from answers that are good or bad without a counterpart; one value per answer.

    value = desirable_weight sigma(beta (h - z0)) or undesirable_weight sigma(beta (z0 - h)), z0 the
    `kto_reference_point`. KTO, https://arxiv.org/abs/2402.01306, eq. 8.
    """
    gain = beta * (answer.astype(jnp.float32) - lax.stop_gradient(reference_point))
    return jnp.where(
        desirable, desirable_weight * jax.nn.sigmoid(-gain), undesirable_weight * jax.nn.sigmoid(gain)
    )  # 1 - sigma(x) = sigma(-x)
