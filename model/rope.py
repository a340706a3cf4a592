"""Rotary position embeddings with every scaling rule that Llama-architecture configs name.

RoPE: https://arxiv.org/abs/2104.09864. A pair (x_i, x_{i + K/2}) is rotated by position * theta^(-2i/K).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .config import ModelConfig, RopeScaling


def angles(config: ModelConfig, positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T K2"], Float[Array, "B T K2"]]:
    """Cosines and sines for each position, [B, T, K2 = head_dim / 2] float32, already scaled by the attention factor.

    "dynamic" and "longrope" choose one set of frequencies by the longest position of the whole batch, as transformers
    does: past the pretraining context rows are not independent of each other, nor a decoded token of a prefilled one.
    """
    scaling = config.rope_scaling
    if scaling is None:
        scaled, factor = frequencies(config), 1.0
    elif scaling.kind == "linear":
        scaled, factor = frequencies(config) / scaling.factor, 1.0
    elif scaling.kind == "dynamic":
        scaled, factor = _dynamic(config, scaling, positions), 1.0
    elif scaling.kind == "yarn":
        scaled, factor = _yarn(config, scaling)
    elif scaling.kind == "longrope":
        scaled, factor = _longrope(config, scaling, positions)
    else:
        scaled, factor = llama3(config, scaling), 1.0
    phase = positions.astype(jnp.float32)[..., None] * jnp.asarray(scaled, jnp.float32)[None, None, :]
    return jnp.cos(phase) * factor, jnp.sin(phase) * factor


def rotate(
    x: Float[Array, "B T H K"], cos: Float[Array, "B T K2"], sin: Float[Array, "B T K2"]
) -> Float[Array, "B T H K"]:
    """Rotate the two halves of the head dimension against each other, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def frequencies(config: ModelConfig) -> np.ndarray:
    """Unscaled rotary frequencies theta^(-2i/K), [K2] float64."""
    dim = config.head_dim
    return 1.0 / config.rope_theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)


def _dynamic(config: ModelConfig, scaling: RopeScaling, positions: Array) -> Array:
    """NTK-aware base that grows with the longest sequence at hand; the plain base up to the pretraining context."""
    dim, context = config.head_dim, config.context
    length = jnp.maximum(jnp.max(positions) + 1, context).astype(jnp.float32)
    base = config.rope_theta * (scaling.factor * length / context - (scaling.factor - 1)) ** (dim / (dim - 2))
    return 1.0 / base ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def llama3(config: ModelConfig, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, a smooth ramp between.

    https://arxiv.org/abs/2407.21783
    """
    context = scaling.original_context or config.context
    plain = frequencies(config)
    wavelength = 2 * math.pi / plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * plain / scaling.factor + keep * plain


def _yarn(config: ModelConfig, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """YaRN: interpolate slow dimensions, keep fast ones, and warm the attention. https://arxiv.org/abs/2309.00071"""
    dim, theta = config.head_dim, config.rope_theta
    context = scaling.original_context or config.context

    def dimension(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    plain = frequencies(config)
    mixed = plain / scaling.factor * ramp + plain * (1 - ramp)
    return mixed, _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def warm(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return warm(scaling.mscale) / warm(scaling.mscale_all_dim)
    return warm(1.0)


def _longrope(config: ModelConfig, scaling: RopeScaling, positions: Array) -> tuple[Array, float]:
    """LongRoPE: one learned factor per dimension, a long set past the pretraining context. https://arxiv.org/abs/2402.13753"""
    context = scaling.original_context or config.context
    plain = frequencies(config)
    short = plain / np.asarray(scaling.short_factor, np.float64)
    long = plain / np.asarray(scaling.long_factor, np.float64)
    chosen = jnp.where(
        jnp.max(positions) + 1 > context,
        jnp.asarray(long, jnp.float32),
        jnp.asarray(short, jnp.float32),
    )
    if scaling.attention_factor is not None:
        return chosen, scaling.attention_factor
    factor = scaling.factor
    return chosen, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
