"""Score given tokens under a model: log-probabilities and last hidden states of packed batches."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..data.pack import Packed, unpack
from ..model import transformer
from ..model.config import ModelConfig
from ..sharding import mesh as meshes
from . import updater
from .compute import Compute
from .losses import chunked_logp

CHUNK = 8192
"""Entries of the vocabulary that log-probs among kept tokens are computed for at a time."""


def target_logp(
    config: ModelConfig, params: Any, hidden: Float[Array, "B T D"], batch: Any, *, temperature: float = 1.0
) -> Float[Array, "B T"]:
    """Log-probability of each target of a batch from its hidden states, float32.

    Where the batch has `kept`, the tokens that the sampler could draw (uint8 [B, T, ceil(V / 8)]), it is that among
    these: the sampler's own distribution.
    """
    if "kept" not in batch:
        return transformer.token_logp(config, params, hidden, batch["targets"], temperature=temperature)
    # Tokens that nobody sampled have no support; all of them, so that nothing there is infinite.
    kept = jnp.where(batch["mask"][..., None] != 0, batch["kept"], jnp.uint8(255))
    head = transformer.head(config, params).astype(hidden.dtype)
    split = {"chunk": CHUNK, "vocab_shards": meshes.current_parts("vocab", head.shape[1])}
    return chunked_logp.kept_logp(hidden / temperature, head, batch["targets"], kept=kept, **split)


@functools.partial(jax.jit, static_argnums=0, static_argnames="temperature")
def token_logp(config: ModelConfig, params: Any, batch: Any, *, temperature: float = 1.0) -> jax.Array:
    """Log-probability of each target of a batch, [B, T] float32; among the `kept` tokens if the batch has them."""
    return target_logp(config, params, hidden(config, params, batch), batch, temperature=temperature)


@functools.partial(jax.jit, static_argnums=0)
def values(config: ModelConfig, params: Any, batch: Any) -> jax.Array:
    """What a scoring model (reward model, critic) makes of each position, [B, T] float32."""
    return transformer.score(config, params, hidden(config, params, batch))


@functools.partial(jax.jit, static_argnums=0)
def last_hidden(config: ModelConfig, params: Any, batch: Any) -> jax.Array:
    """Hidden states after the last norm, [B, T, D]."""
    return hidden(config, params, batch)


def hidden(config: ModelConfig, params: Any, batch: Any) -> Float[Array, "B T D"]:
    """Hidden states of a packed batch; where it has `experts`, tokens go to these instead of their router's choice."""
    return transformer.apply(
        config,
        params,
        batch["tokens"],
        positions=batch["positions"],
        segments=batch["segments"],
        experts=batch.get("experts"),
    )[0]


def examples(
    score: Callable[[Mapping[str, jax.Array]], jax.Array], packed: Packed, compute: Compute, mesh: jax.sharding.Mesh
) -> list[np.ndarray]:
    """What `score` gives each position [B, T] of a micro-batch, example by example: a value for each token [N]."""
    micros = updater.micro_batches(packed.batch, compute.rows(mesh), mesh)
    return unpack(np.concatenate([meshes.to_host(score(micro)) for micro in micros]), packed.spans)
