"""Rewards of sampled answers other than a task's verifier: reward models, one or several combined, or a judge.

A `RewardSource` is settings; opened beside a run's mesh it scores groups of rollouts. RL, PPO and best-of-n take any.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..data import preferences
from ..data.pack import Example, Group
from ..data.preferences import Ranking
from ..data.row import Row
from ..data.tokenizer import Tokenizer
from ..sharding import mesh as meshes
from . import checkpoint, reward
from .checkpoint import Model
from .compute import Compute
from .hosted import Hosted
from .losses import advantage
from .losses import reward as losses
from .rollout import Rollout

Groups = Sequence[Sequence[Rollout]]
Score = Callable[[Model, Groups], np.ndarray]
"""`score(policy, groups) -> rewards [N]` of all answers, group by group; most sources ignore the policy."""


@runtime_checkable
class RewardSource(Protocol):
    """Settings of what scores answers."""

    def open(self, tokenizer: Tokenizer, compute: Compute, mesh: jax.sharding.Mesh) -> Score:
        """Make it ready for answers in this tokenizer's tokens."""
        ...


@runtime_checkable
class Combination(Protocol):
    """How the scores of several reward models become one reward."""

    def __call__(self, scores: Float[Array, "N R"], rollouts: Sequence[Rollout]) -> Float[Array, "N"]:
        """One reward an answer from those of R models."""
        ...


@dataclass(frozen=True, kw_only=True)
class WeightedSum:
    """The sum of the scores, each times its model's weight (1 unless given)."""

    weights: tuple[float, ...] = ()

    def __call__(self, scores: Float[Array, "N R"], rollouts: Sequence[Rollout]) -> Float[Array, "N"]:
        """See `Combination`."""
        return losses.weighted_sum(scores, _weights(self.weights, scores))


@dataclass(frozen=True, kw_only=True)
class NormalizedSum:
    """The weighted sum of scores that are first whitened, each model's over the batch, so that no scale dominates."""

    weights: tuple[float, ...] = ()

    def __call__(self, scores: Float[Array, "N R"], rollouts: Sequence[Rollout]) -> Float[Array, "N"]:
        """See `Combination`."""
        return losses.normalized_sum(scores, jnp.ones(scores.shape[0]), _weights(self.weights, scores))


@dataclass(frozen=True, kw_only=True)
class SafetyOrHelpfulness:
    """Llama 2's rule for a safety model and a helpfulness model, in this order: whichever counts, then whitened.

    The safety score counts where the task's domain is one of `safety_domains`, or where sigma(safety) < `threshold`.
    https://arxiv.org/abs/2307.09288, section 3.2.3.
    """

    safety_domains: tuple[str, ...] = ()
    threshold: float = 0.15

    def __call__(self, scores: Float[Array, "N R"], rollouts: Sequence[Rollout]) -> Float[Array, "N"]:
        """See `Combination`."""
        if scores.shape[1] != 2:
            raise ValueError(f"Llama 2's rule takes a safety and a helpfulness model, not {scores.shape[1]} models")
        marked = jnp.asarray([r.task.domain in self.safety_domains for r in rollouts])
        chosen = losses.safety_or_helpfulness(scores[:, 0], scores[:, 1], marked, threshold=self.threshold)
        return advantage.whiten(chosen, jnp.ones_like(chosen))


def _weights(given: tuple[float, ...], scores: Array) -> Array:
    if given and len(given) != scores.shape[1]:
        raise ValueError(f"there are {len(given)} weights {given} and {scores.shape[1]} reward models: give one each")
    return jnp.asarray(given or (1.0,) * scores.shape[1], jnp.float32)


@dataclass(frozen=True, kw_only=True)
class RewardModels:
    """One or several trained reward models. They lie in host memory and are on the device one at a time, to score.

    They read the very tokens that were sampled, so their tokenizer must be the policy's. An answer that was cut off is
    scored as it stands, at its last token.
    """

    models: tuple[str, ...]
    combine: WeightedSum | NormalizedSum | SafetyOrHelpfulness = field(default_factory=WeightedSum)

    def open(self, tokenizer: Tokenizer, compute: Compute, mesh: jax.sharding.Mesh) -> Score:
        """See `RewardSource`. Raises ValueError for what is no reward model, or has another tokenizer."""
        for path in self.models:
            check_scoring(path, tokenizer)
        hosted = Hosted({path: path for path in self.models}, compute, mesh)

        def score(policy: Model, groups: Groups) -> np.ndarray:
            packed = [_group(group) for group in groups]
            columns = [reward.scores(hosted(path), packed, compute, mesh) for path in self.models]
            hosted.leave()
            flat = [rollout for group in groups for rollout in group]
            return np.asarray(self.combine(jnp.stack([jnp.asarray(c) for c in columns], axis=1), flat))

        return score


@dataclass(frozen=True, kw_only=True)
class ScoreRows:
    """What `Curate` takes as its scorer: the rewards of generated rows by one or several reward models.

    Rows are text, written in the first reward model's own chat format.
    """

    models: tuple[str, ...]
    combine: WeightedSum | NormalizedSum = field(default_factory=WeightedSum)
    compute: Compute = field(default_factory=Compute)

    def open(self, mesh: jax.sharding.Mesh | None, /) -> Callable[[Sequence[Row]], list[float]]:
        """What gives rows their rewards, the higher the better. A `NormalizedSum` is whitened over those of a call."""
        mesh = mesh or meshes.make_mesh()
        tokenizer = checkpoint.open_tokenizer(self.models[0])
        for path in self.models:
            check_scoring(path, tokenizer)
        hosted = Hosted({path: path for path in self.models}, self.compute, mesh)

        def score(rows: Sequence[Row]) -> list[float]:
            groups = [preferences.group(tokenizer, Ranking(row.prompt, (row.response,), (0.0,))) for row in rows]
            with jax.set_mesh(mesh):
                columns = [reward.scores(hosted(path), groups, self.compute, mesh) for path in self.models]
                return np.asarray(self.combine(jnp.stack([jnp.asarray(c) for c in columns], axis=1), ())).tolist()

        return score


def check_scoring(path: str, tokenizer: Tokenizer) -> None:
    """Raise ValueError unless `path` is a reward model (or a critic) that reads this tokenizer's tokens."""
    if checkpoint.open_config(path).output != "score":
        raise ValueError(f"{path} is a language model and no reward model: train one from it with the reward stage")
    check_tokenizer(path, tokenizer)


def check_tokenizer(path: str, tokenizer: Tokenizer) -> None:
    """Raise ValueError unless the model at `path` has this tokenizer."""
    other = checkpoint.open_tokenizer(path).fingerprint
    if other != tokenizer.fingerprint:
        raise ValueError(
            f"{path} has another tokenizer ({other[:12]}) than the policy ({tokenizer.fingerprint[:12]}): "
            "reward models and critics read its tokens, so train one from a model of its family"
        )


def _group(rollouts: Sequence[Rollout]) -> Group:
    answers = [Example(tokens=r.tokens.tolist(), mask=np.ones(len(r.tokens))) for r in rollouts]
    return Group(prompt=rollouts[0].prompt, answers=answers)
