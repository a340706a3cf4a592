"""What PPO minimises, for the policy and for the critic, and the advantages that it makes of a rollout."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..model import transformer
from ..model.config import ModelConfig
from .losses import advantage, masked, mismatch, policy, shaping, value
from .step import Loss

POLICY_FIELDS = ("advantage", "old_logp", "behavior_logp")
CRITIC_FIELDS = ("returns", "old_values")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Constants of PPO. `kl_weight` times log pi_old - log reference is taken off the reward of every token.

    GAE has `discount` and `decay` (lambda); `whiten` scales advantages to mean 0 and deviation 1 over the tokens of the
    rollout. `value_clip` bounds how far a value may move in a step for its loss to fall (None: it may). An answer that
    was cut off earns `unfinished`, if given, in the place of its reward (Tulu 3: -10).
    """

    clip: float = 0.2
    value_clip: float | None = 0.2
    kl_weight: float = 0.02
    discount: float = 1.0
    decay: float = 0.95
    whiten: bool = True
    unfinished: float | None = None


def policy_loss(
    config: ModelConfig, objective: Objective | None = None, *, temperature: float = 1.0, ptx: float = 0.0
) -> Loss:
    """PPO's clipped policy gradient: `loss(params, batch, *weights) -> (sum, weight, metrics)`.

    The batch's fields: advantage, old_logp, behavior_logp (the sampler's, only compared). With a `ptx` coefficient also
    the field ptx, 1 on pretraining tokens (where the mask is 0), and the constants: how many policy and pretraining
    tokens the whole update has.
    """
    o = objective or Objective()

    def compute(params: Any, batch: Any, *weights: jax.Array) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        mask, old, advantages = batch["mask"], batch["old_logp"], batch["advantage"]
        hidden, _ = transformer.apply(
            config, params, batch["tokens"], positions=batch["positions"], segments=batch["segments"]
        )
        logp = transformer.token_logp(config, params, hidden, batch["targets"], temperature=temperature)
        clip = {"clip_low": o.clip, "clip_high": o.clip}
        total = masked.sum(policy.clipped_policy_gradient(logp, old, advantages, **clip), mask)
        metrics = {
            "clipped": masked.sum(policy.is_clipped(logp, old, advantages, **clip), mask),
            "mismatch": masked.sum(jnp.abs(mismatch.log_ratio(old, batch["behavior_logp"])), mask),
            "entropy_estimate": masked.sum(-logp, mask),
        }
        if ptx:
            of = dict(zip(("policy_weight", "pretraining_weight"), weights, strict=True))
            total += masked.sum(policy.pretraining_mix(logp, coefficient=ptx, **of), batch["ptx"])
            metrics["ptx_nll"] = masked.sum(policy.pretraining_mix(logp, coefficient=1.0, **of), batch["ptx"])
        return total, masked.weight(mask), metrics

    return compute


def critic_loss(config: ModelConfig, objective: Objective | None = None) -> Loss:
    """The critic's squared error, per token: `loss(params, batch) -> (sum, weight, metrics)`.

    The batch's fields: returns and, for clipping, old_values.
    """
    o = objective or Objective()

    def compute(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        hidden, _ = transformer.apply(
            config, params, batch["tokens"], positions=batch["positions"], segments=batch["segments"]
        )
        values, returns, mask = transformer.score(config, params, hidden), batch["returns"], batch["mask"]
        if o.value_clip is None:
            errors = value.squared_error(values, returns)
        else:
            errors = value.clipped_squared_error(values, batch["old_values"], returns, clip=o.value_clip)
        return masked.sum(errors, mask), masked.weight(mask), {"value": masked.sum(values, mask)}

    return compute


def estimate(batch: Any, objective: Objective) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Advantage and return of each token of a whole rollout, and statistics.

    The batch's fields, all [B, T]: old_logp, reference_logp (if there is a KL term), old_values, and the answer's
    reward at each of its tokens. Nothing comes after an answer's end, cut off or not: its reward says what it is worth.
    """
    mask, segments = batch["mask"], batch["segments"]
    per_token = shaping.at_last_token(batch["reward"], mask, segments)
    metrics: dict[str, jax.Array] = {}
    if objective.kl_weight:
        per_token += shaping.kl_penalty(batch["old_logp"], batch["reference_logp"], weight=objective.kl_weight)
        gap = batch["old_logp"] - batch["reference_logp"]
        metrics["kl"] = masked.sum(gap, mask) / masked.weight(masked.per_sequence(mask, segments))
    values = batch["old_values"]
    settings = {"segments": segments, "discount": objective.discount, "decay": objective.decay}
    advantages = advantage.gae(per_token, values, mask, **settings)
    returns = advantages + values
    error, spread = masked.mean((returns - values) ** 2, mask), masked.mean(returns**2, mask)
    metrics["explained_variance"] = 1 - error / jnp.maximum(spread - masked.mean(returns, mask) ** 2, 1e-12)
    return {
        "advantage": advantage.whiten(advantages, mask) if objective.whiten else advantages,
        "returns": returns,
    }, metrics
