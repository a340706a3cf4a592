"""What is sampled from: one model, or a student and a teacher whose distributions are mixed at every token."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..sharding import mesh as meshes
from . import cache as caches
from . import processing, transformer
from .cache import Cache
from .config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Tokens of `teacher_share` x the teacher's distribution + the rest of the student's, both at the temperature.

    Its parameters are a pair, the student's and the teacher's. MiniLLM, https://arxiv.org/abs/2306.08543, section 2.2,
    has a share of 0.2: it keeps a weak student off text that no teacher would continue.
    """

    student: ModelConfig
    teacher: ModelConfig
    teacher_share: float

    def __post_init__(self) -> None:
        if not 0 < self.teacher_share < 1:
            raise ValueError(f"teacher_share is {self.teacher_share}: of a mixture it lies between 0 and 1")
        if self.student.vocab_size != self.teacher.vocab_size:
            raise ValueError(
                f"the student has {self.student.vocab_size} tokens and the teacher {self.teacher.vocab_size}: "
                "distributions over different vocabularies cannot be mixed"
            )

    @property
    def models(self) -> tuple[ModelConfig, ModelConfig]:
        """Student and teacher."""
        return self.student, self.teacher

    @property
    def vocab_size(self) -> int:
        """Of both."""
        return self.student.vocab_size

    @property
    def context(self) -> int:
        """What both can read."""
        return min(self.student.context, self.teacher.context)


Speaker = ModelConfig | Mixed
Caches = Any
"""A cache, or one for each of the models that are mixed."""
Params = Any
"""A model's parameters, or a pair of them."""


def empty(config: Speaker, batch: int, slots: int) -> Caches:
    """Caches of zeros, stacked: see `cache.empty`."""
    if isinstance(config, Mixed):
        return tuple(caches.empty(one, batch, slots) for one in config.models)
    return caches.empty(config, batch, slots)


def unstack(cache: Caches) -> Caches:
    """The same with tuples of layers: see `cache.unstack`."""
    return caches.unstack(cache) if isinstance(cache, Cache) else tuple(map(caches.unstack, cache))


def cache_axes(cache: Caches) -> Caches:
    """The logical axes of every array: see `cache.axes`."""
    return caches.axes(cache) if isinstance(cache, Cache) else tuple(map(caches.axes, cache))


def for_decoding(config: Speaker, params: Params) -> Params:
    """The weights as a decoding loop wants them: see `transformer.for_decoding`."""
    if isinstance(config, Mixed):
        return tuple(map(transformer.for_decoding, config.models, params))
    return transformer.for_decoding(config, params)


def scores(
    config: Speaker,
    params: Params,
    cache: Caches,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
    last: Int[Array, " B"] | None = None,
    temperature: Float[Array, "#B"],
) -> tuple[Float[Array, "B V"], Caches]:
    """Logits of what follows the `last` of some tokens (the first unless given), and the caches with these tokens.

    The logits of a mixture are those that at this temperature give its distribution.
    """
    if isinstance(config, Mixed):
        how = {"positions": positions, "segments": segments, "last": last, "temperature": temperature}
        both = zip(config.models, params, cache, strict=True)
        (student, one), (teacher, other) = (scores(*of, tokens, **how) for of in both)
        warmth = temperature[:, None]
        logp = [jax.nn.log_softmax(processing.tempered(x, warmth), axis=-1) for x in (student, teacher)]
        share = config.teacher_share
        mixed = jnp.logaddexp(jnp.log1p(-share) + logp[0], jnp.log(share) + logp[1])
        return mixed * jnp.where(warmth == 0, 1.0, warmth), (one, other)
    hidden, cache = transformer.apply(config, params, tokens, positions=positions, segments=segments, cache=cache)
    if last is not None:
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    # Rows over all devices, each with its whole vocabulary: an exchange, where drawing from a split one gathers it.
    return meshes.constrain(transformer.logits(config, params, hidden)[:, 0], "draws", None), cache
