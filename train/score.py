"""Score given tokens under a model: log-probabilities and last hidden states of packed batches."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ..data.pack import Packed, unpack
from ..model import transformer
from ..model.config import ModelConfig
from ..sharding import mesh as meshes
from . import updater
from .compute import Compute


@functools.partial(jax.jit, static_argnums=0, static_argnames="temperature")
def token_logp(config: ModelConfig, params: Any, batch: Any, *, temperature: float = 1.0) -> jax.Array:
    """Log-probability of each target of a batch, [B, T] float32."""
    hidden = _hidden(config, params, batch)
    return transformer.token_logp(config, params, hidden, batch["targets"], temperature=temperature)


@functools.partial(jax.jit, static_argnums=0)
def values(config: ModelConfig, params: Any, batch: Any) -> jax.Array:
    """What a scoring model (reward model, critic) makes of each position, [B, T] float32."""
    return transformer.score(config, params, _hidden(config, params, batch))


@functools.partial(jax.jit, static_argnums=0)
def last_hidden(config: ModelConfig, params: Any, batch: Any) -> jax.Array:
    """Hidden states after the last norm, [B, T, D]."""
    return _hidden(config, params, batch)


def _hidden(config: ModelConfig, params: Any, batch: Any) -> jax.Array:
    return transformer.apply(config, params, batch["tokens"], positions=batch["positions"], segments=batch["segments"])[
        0
    ]


def examples(
    score: Callable[[Mapping[str, jax.Array]], jax.Array], packed: Packed, compute: Compute, mesh: jax.sharding.Mesh
) -> list[np.ndarray]:
    """What `score` gives each position [B, T] of a micro-batch, example by example: a value for each token [N]."""
    micros = updater.micro_batches(packed.batch, compute.rows(mesh), mesh)
    return unpack(np.concatenate([meshes.to_host(score(micro)) for micro in micros]), packed.spans)
