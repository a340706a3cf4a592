"""Score given tokens under a model: log-probabilities and last hidden states of packed batches."""

import functools
from typing import Any

import jax

from ..model import transformer
from ..model.config import ModelConfig


@functools.partial(jax.jit, static_argnums=0, static_argnames="temperature")
def token_logp(config: ModelConfig, params: Any, batch: Any, *, temperature: float = 1.0) -> jax.Array:
    """Log-probability of each target of a batch, [B, T] float32."""
    hidden = _hidden(config, params, batch)
    return transformer.token_logp(config, params, hidden, batch["targets"], temperature=temperature)


@functools.partial(jax.jit, static_argnums=0)
def last_hidden(config: ModelConfig, params: Any, batch: Any) -> jax.Array:
    """Hidden states after the last norm, [B, T, D]."""
    return _hidden(config, params, batch)


def _hidden(config: ModelConfig, params: Any, batch: Any) -> jax.Array:
    return transformer.apply(config, params, batch["tokens"], positions=batch["positions"], segments=batch["segments"])[
        0
    ]
