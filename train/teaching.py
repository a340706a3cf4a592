"""Distillation objectives: what a student minimises, and what it needs of a teacher for that.

    FullVocabulary  a divergence over the whole vocabulary at every position: reverse KL, forward KL, GKD's JSD
    TopK            the same over the teacher's k likeliest tokens and one bucket for the rest
    SampledToken    a policy gradient towards the teacher on the sampled tokens: on-policy distillation, MOPD
    MiniLLM         the same with a long horizon, beside the single-step reverse KL
    SequenceLevel   the likelihood of the teacher's answers; the only one for teachers with another tokenizer

Teacher and student are both taken at the sampling temperature. Where `outcome` is above 0, a policy gradient of the
answers' rewards (minus their group's mean) is added with that weight; it needs more than one answer to a prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..model import transformer
from ..model.config import ModelConfig
from ..sharding import mesh as meshes
from . import correction, score
from .losses import chunked, chunked_logp, distill, gkd, masked, normaliser, on_policy, policy, supervised
from .losses import top_k as top_k_losses
from .losses.normaliser import Normaliser
from .step import Loss, Mean

Totals = tuple[jax.Array, jax.Array, dict[str, Any]]


@runtime_checkable
class Objective(Protocol):
    """What the student minimises, and what it needs of the teacher."""

    @property
    def outcome(self) -> float:
        """Weight of the answers' rewards."""
        ...

    def loss(self, config: ModelConfig, *, temperature: float = 1.0) -> Loss:
        """`loss(params, batch, *constants) -> (sum, divisor, metrics)`."""
        ...

    def teach(self, config: ModelConfig, params: Any, batch: Any, *, temperature: float = 1.0) -> dict[str, jax.Array]:
        """The teacher's per-token fields for a batch."""
        ...

    def fields(self, teacher: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Names of those fields, with what follows [B, T] of their shape."""
        ...

    def constants(self, params: Any) -> tuple[Any, ...]:
        """What else the loss takes after the batch, from the teacher's parameters."""
        ...


@dataclass(frozen=True, kw_only=True)
class FullVocabulary:
    """A divergence over the whole vocabulary at every position of an answer, in vocabulary chunks.

    `beta` 1 is KL(student || teacher), 0 is KL(teacher || student), between them lies GKD's generalised Jensen-Shannon
    divergence (https://arxiv.org/abs/2306.13649, eq. 1). The teacher's last hidden states stand for its logits, which
    its head makes at training time: DeepSeek-V4, https://arxiv.org/abs/2606.19348, section 5.2.2.
    """

    beta: float = 1.0
    chunk: int = 8192
    outcome: float = 0.0
    normaliser: Normaliser = normaliser.per_sequence

    def __post_init__(self) -> None:
        gkd.check_beta(self.beta)

    def loss(self, config: ModelConfig, *, temperature: float = 1.0) -> Loss:
        """See `Objective`; the constant is the teacher's head, [E, V]."""

        def compute(params: Any, batch: Any, teacher_head: Any) -> Totals:
            hidden = _student(config, params, batch)
            ours = hidden / temperature, transformer.head(config, params)
            theirs = batch["teacher_hidden"] / temperature, teacher_head
            gap = self._divergence(*ours, *theirs)
            per_token = gap
            if self.outcome:
                logp = transformer.token_logp(config, params, hidden, batch["targets"], temperature=temperature)
                per_token = gap + self.outcome * policy.policy_gradient(logp, batch["advantage"])
            return _total(self.normaliser, batch, per_token, gap, {})

        return compute

    def _divergence(self, *arrays: Array) -> Float[Array, "B T"]:
        how = {"chunk": self.chunk, "vocab_shards": meshes.current_parts("vocab", arrays[1].shape[1])}
        if self.beta == 1.0:
            return distill.chunked_reverse_kl(*arrays, **how)
        return chunked.jsd(*arrays, **how, beta=self.beta)

    def teach(self, config: ModelConfig, params: Any, batch: Any, *, temperature: float = 1.0) -> dict[str, jax.Array]:
        """The teacher's last hidden states, from which its logits are made where they are needed."""
        return {"teacher_hidden": score.last_hidden(config, params, batch)}

    def fields(self, teacher: ModelConfig) -> dict[str, tuple[int, ...]]:
        """See `Objective`."""
        return {"teacher_hidden": (teacher.embed_dim,)}

    def constants(self, params: Any) -> tuple[Any, ...]:
        """The teacher's head, [E, V]."""
        return (_head(params),)


@dataclass(frozen=True, kw_only=True)
class TopK:
    """A divergence over the teacher's `k` likeliest tokens: little to store, and no teacher's head at training time.

    `divergence` is `losses.top_k.reverse_kl` or `forward_kl`, with one bucket for all other tokens, or
    `generalized_reverse_kl` of the MOPD paper (https://arxiv.org/abs/2606.30406, k = 64) without.
    """

    k: int = 64
    divergence: Callable[[Float[Array, "B T K"], Float[Array, "B T K"]], Float[Array, "B T"]] = top_k_losses.reverse_kl
    chunk: int = 8192
    outcome: float = 0.0
    normaliser: Normaliser = normaliser.per_sequence

    def loss(self, config: ModelConfig, *, temperature: float = 1.0) -> Loss:
        """See `Objective`."""

        def compute(params: Any, batch: Any) -> Totals:
            hidden, head = _student(config, params, batch), transformer.head(config, params)
            how = {"chunk": self.chunk, "vocab_shards": meshes.current_parts("vocab", head.shape[1])}
            chosen = chunked_logp.logp(hidden / temperature, head, batch["teacher_tokens"], **how)
            gap = self.divergence(chosen, batch["teacher_top"])
            per_token = gap
            if self.outcome:
                logp = transformer.token_logp(config, params, hidden, batch["targets"], temperature=temperature)
                per_token = gap + self.outcome * policy.policy_gradient(logp, batch["advantage"])
            return _total(self.normaliser, batch, per_token, gap, {})

        return compute

    def teach(self, config: ModelConfig, params: Any, batch: Any, *, temperature: float = 1.0) -> dict[str, jax.Array]:
        """The likeliest tokens and their log-probabilities under the full softmax."""
        hidden = score.last_hidden(config, params, batch) / temperature
        logp, tokens = chunked_logp.top_k(hidden, _head(params), self.k, chunk=self.chunk)
        return {"teacher_tokens": tokens, "teacher_top": logp}

    def fields(self, teacher: ModelConfig) -> dict[str, tuple[int, ...]]:
        """See `Objective`."""
        return {"teacher_tokens": (self.k,), "teacher_top": (self.k,)}

    def constants(self, params: Any) -> tuple[Any, ...]:
        """See `Objective`."""
        return ()


@dataclass(frozen=True, kw_only=True)
class SampledToken:
    """MOPD on the sampled tokens: advantage log(teacher / student), weight pi / mu where in [low, high], else 0.

    MiMo-V2-Flash, https://arxiv.org/abs/2601.02780, eq. 7-9. `limit` bounds the teacher's advantage (the log has the
    share that it bounded); `outcome` is alpha. With `normaliser.per_token` it is on-policy distillation as Thinking
    Machines published it, https://thinkingmachines.ai/blog/on-policy-distillation. All it needs of a teacher are
    log-probabilities of given tokens, so the teacher may be an `Endpoint`.
    """

    low: float = 0.5
    high: float = 2.0
    limit: float = 20.0
    outcome: float = 0.0
    normaliser: Normaliser = normaliser.per_sequence

    def loss(self, config: ModelConfig, *, temperature: float = 1.0) -> Loss:
        """See `Objective`."""

        def compute(params: Any, batch: Any) -> Totals:
            hidden = _student(config, params, batch)
            logp = transformer.token_logp(config, params, hidden, batch["targets"], temperature=temperature)
            gap = distill.sampled_token_advantage(batch["teacher_logp"], logp)
            total = distill.clip_advantage(gap, limit=self.limit) + self.outcome * batch["advantage"]
            per_token = distill.mopd(logp, batch["behavior_logp"], total, low=self.low, high=self.high)
            clipped = (jnp.abs(gap) > self.limit).astype(jnp.float32)
            metrics = {"clipped": Mean(masked.sum(clipped, batch["mask"]), masked.weight(batch["mask"]))}
            metrics |= _measured(logp, batch, self.low, self.high)
            return _total(self.normaliser, batch, per_token, -gap, metrics)

        return compute

    def teach(self, config: ModelConfig, params: Any, batch: Any, *, temperature: float = 1.0) -> dict[str, jax.Array]:
        """The teacher's log-probabilities of the sampled tokens."""
        return {"teacher_logp": score.token_logp(config, params, batch, temperature=temperature)}

    def fields(self, teacher: ModelConfig) -> dict[str, tuple[int, ...]]:
        """See `Objective`."""
        return {"teacher_logp": ()}

    def constants(self, params: Any) -> tuple[Any, ...]:
        """See `Objective`."""
        return ()


@dataclass(frozen=True, kw_only=True)
class MiniLLM:
    """`long` x a policy gradient of the discounted mean gap from each token on + `single` x the reverse KL at it.

    The first charges a token for where it leads, the second has no sampling noise; `discount` 0 with `single` 0 is
    `SampledToken`. The policy gradient is weighted by pi / mu where that lies in [low, high], else 0: for the paper's
    samples, which are partly the teacher's (`Distill` has `teacher_share`), it is small where the student would hardly
    say so, and no such token is dropped. MiniLLM, https://arxiv.org/abs/2306.08543, section 2.2.
    """

    long: float = 1.0
    single: float = 1.0
    discount: float = 1.0
    low: float = 0.0
    high: float = 2.0
    chunk: int = 8192
    outcome: float = 0.0
    normaliser: Normaliser = normaliser.per_sequence

    def loss(self, config: ModelConfig, *, temperature: float = 1.0) -> Loss:
        """See `Objective`; the constant is the teacher's head, [E, V]."""

        def compute(params: Any, batch: Any, teacher_head: Any) -> Totals:
            hidden, head = _student(config, params, batch), transformer.head(config, params)
            logp = transformer.token_logp(config, params, hidden, batch["targets"], temperature=temperature)
            how = {"segments": batch["segments"], "discount": self.discount}
            ahead = on_policy.minillm_advantage(batch["teacher_logp"], logp, batch["mask"], **how)
            total = self.long * ahead + self.outcome * batch["advantage"]
            split = {"chunk": self.chunk, "vocab_shards": meshes.current_parts("vocab", head.shape[1])}
            theirs = batch["teacher_hidden"] / temperature, teacher_head
            gap = distill.chunked_reverse_kl(hidden / temperature, head, *theirs, **split)
            per_token = distill.mopd(logp, batch["behavior_logp"], total, low=self.low, high=self.high)
            metrics = _measured(logp, batch, self.low, self.high)
            return _total(self.normaliser, batch, per_token + self.single * gap, gap, metrics)

        return compute

    def teach(self, config: ModelConfig, params: Any, batch: Any, *, temperature: float = 1.0) -> dict[str, jax.Array]:
        """The teacher's log-probabilities of the sampled tokens, and its last hidden states."""
        logp = score.token_logp(config, params, batch, temperature=temperature)
        return {"teacher_logp": logp, "teacher_hidden": score.last_hidden(config, params, batch)}

    def fields(self, teacher: ModelConfig) -> dict[str, tuple[int, ...]]:
        """See `Objective`."""
        return {"teacher_logp": (), "teacher_hidden": (teacher.embed_dim,)}

    def constants(self, params: Any) -> tuple[Any, ...]:
        """The teacher's head, [E, V]."""
        return (_head(params),)


@dataclass(frozen=True, kw_only=True)
class SequenceLevel:
    """The negative log-likelihood of the teacher's answers, which it samples: nothing but text passes between the two.

    https://arxiv.org/abs/1606.07947, section 3.2. Every token counts the same unless told, as in SFT.
    """

    outcome: float = 0.0
    normaliser: Normaliser = normaliser.per_token

    def __post_init__(self) -> None:
        if self.outcome:
            raise ValueError(f"an outcome weight of {self.outcome} rewards a teacher's answers, which are not learned")

    def loss(self, config: ModelConfig, *, temperature: float = 1.0) -> Loss:
        """See `Objective`. The temperature is the teacher's: the student is trained at 1."""

        def compute(params: Any, batch: Any) -> Totals:
            logp = transformer.token_logp(config, params, _student(config, params, batch), batch["targets"])
            weights, divisor = self.normaliser(batch["mask"], batch["segments"])
            weighted = weights * batch.get("teacher_weight", jnp.ones_like(weights))
            return masked.sum(supervised.nll(logp), weighted), divisor, {}

        return compute

    def teach(self, config: ModelConfig, params: Any, batch: Any, *, temperature: float = 1.0) -> dict[str, jax.Array]:
        """Nothing beyond its answers."""
        return {}

    def fields(self, teacher: ModelConfig) -> dict[str, tuple[int, ...]]:
        """See `Objective`."""
        return {}

    def constants(self, params: Any) -> tuple[Any, ...]:
        """See `Objective`."""
        return ()


def _head(params: Any) -> Float[Array, "D V"]:
    return params["head"] if "head" in params else params["embedding"].T


def _student(config: ModelConfig, params: Any, batch: Any) -> Float[Array, "B T D"]:
    return transformer.apply(config, params, batch["tokens"], positions=batch["positions"], segments=batch["segments"])[
        0
    ]


def _total(
    how: Normaliser, batch: Any, per_token: Float[Array, "B T"], gap: Float[Array, "B T"], metrics: dict[str, Any]
) -> Totals:
    """The sum, where a teacher's weight counts, and the divisor, where it does not: DeepSeek-V4's eq. 29."""
    weights, divisor = how(batch["mask"], batch["segments"])
    weighted = weights * batch["teacher_weight"] if "teacher_weight" in batch else weights
    return masked.sum(per_token, weighted), divisor, {"kl": masked.sum(gap, weights), **metrics}


def _measured(logp: Float[Array, "B T"], batch: Any, low: float, high: float) -> dict[str, Any]:
    return correction.measured(logp, batch["behavior_logp"], batch["mask"], low=low, high=high)
