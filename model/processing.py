"""From logits to a token: temperature, top-k, top-p, min-p, and the log-probability of what was drawn."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 cut nothing."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()

    @property
    def compiled(self) -> "Sampling":
        """The part that programs are compiled for; temperature and length limit are inputs to them."""
        return dataclasses.replace(self, max_tokens=1, temperature=1.0)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: ask for at least one token")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}: it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1 or self.top_k < 0:
            raise ValueError(
                f"top_p {self.top_p} must lie in (0, 1], min_p {self.min_p} in [0, 1) and top_k {self.top_k} be 0 or "
                "more"
            )


def kept(scores: Float[Array, "B V"], sampling: Sampling) -> Bool[Array, "B V"]:
    """Which tokens survive top-k, then top-p, then min-p (at the sampling temperature). At least the best one does.

    Top-p (https://arxiv.org/abs/1904.09751) keeps the smallest set of best tokens whose probability reaches p; min-p
    (https://arxiv.org/abs/2407.01082) those at least min_p times as probable as the best. Ties with the last kept
    token are kept.
    """
    return _kept(tempered(scores, sampling.temperature), sampling)


def _kept(scores: Float[Array, "B V"], sampling: Sampling) -> Bool[Array, "B V"]:
    keep = jnp.ones(scores.shape, bool)
    if sampling.top_k and sampling.top_k < scores.shape[-1]:
        floor = jax.lax.top_k(scores, sampling.top_k)[0][:, -1:]
        keep &= scores >= floor
    if sampling.top_p < 1:
        ordered = jnp.sort(jnp.where(keep, scores, -jnp.inf), axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        floor = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        keep &= scores >= floor
    if sampling.min_p > 0:
        keep &= scores >= jnp.max(scores, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
    return keep


def tempered(scores: Float[Array, "B V"], temperature: Float[Array, "#B 1"] | float) -> Float[Array, "B V"]:
    """Logits at a temperature; greedy (0) leaves them alone."""
    return scores / jnp.where(temperature == 0, 1.0, temperature)


def processed(scores: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Log-probabilities of the distribution that tokens are drawn from; -inf where a token was cut."""
    return _processed(tempered(scores, sampling.temperature), sampling)


def _processed(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0:
        logits = jnp.where(_kept(logits, sampling), logits, -jnp.inf)
    return jax.nn.log_softmax(logits, axis=-1)


def support(
    scores: Float[Array, "B V"], sampling: Sampling, *, temperature: Float[Array, " B"] | None = None
) -> UInt8[Array, "B W"]:
    """Which tokens can be drawn, eight to a byte (W = ceil(V / 8)), as `np.packbits` packs them."""
    return jnp.packbits(_kept(tempered(scores, _column(temperature, sampling)), sampling), axis=-1)


def draw(
    scores: Float[Array, "B V"], keys: Array, sampling: Sampling, *, temperature: Float[Array, " B"] | None = None
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token per row and its log-probability under the processed distribution.

    Greedy tokens report the log-probability of the untempered distribution.

    Args:
        scores: float32 logits.
        keys: one PRNG key per row.
        sampling: how to draw.
        temperature: one per row instead of the settings'; as an array, another one compiles nothing new.
    """
    warmth = _column(temperature, sampling)
    logp = _processed(tempered(scores, warmth), sampling)
    drawn = _categorical(logp, jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys))
    token = jnp.where(warmth[:, 0] == 0, jnp.argmax(scores, axis=-1), drawn)
    return token.astype(jnp.int32), jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]


def _column(temperature: Float[Array, " B"] | None, sampling: Sampling) -> Float[Array, "#B 1"]:
    return jnp.asarray([sampling.temperature] if temperature is None else temperature, jnp.float32)[:, None]


def _categorical(logp: Float[Array, "B V"], uniform: Float[Array, "B 2"]) -> Int[Array, " B"]:
    """Inverse-CDF draw in two levels: a block of the vocabulary, then a token in it.

    Two numbers per row instead of one per token (Gumbel noise for 64 x 49,152 logits cost as much as a fifth of a
    decoding step), and sums short enough for float32.
    """
    batch, vocab = logp.shape
    size = min(BLOCK, vocab)
    probs = jnp.pad(jnp.exp(logp), ((0, 0), (0, -vocab % size))).reshape(batch, -1, size)
    block = _invert(jnp.sum(probs, axis=-1), uniform[:, 0])
    inside = jnp.take_along_axis(probs, block[:, None, None], axis=1)[:, 0]
    return block * size + _invert(inside, uniform[:, 1])


def _invert(weights: Float[Array, "B N"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """Index i with probability weights[i] / sum(weights); never one of weight 0."""
    total = jnp.cumsum(weights, axis=-1)
    index = jnp.sum(total <= uniform[:, None] * total[:, -1:], axis=-1)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    return jnp.minimum(index, last)
