"""The blocks of a Llama decoder as Flax modules. Flax names the parameters and is seen nowhere outside this folder."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from ..sharding import mesh as meshes
from . import attention, flash, moe, rope
from .cache import Cache, note, read, write
from .config import ModelConfig

PARAM_AXES: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "final_norm": ("norm",),
    "score": ("norm",),
    "score_bias": (),
    "attention_norm": ("norm",),
    "mlp_norm": ("norm",),
    "q": ("embed", "heads", "head_dim"),
    "k": ("embed", "kv_heads", "head_dim"),
    "v": ("embed", "kv_heads", "head_dim"),
    "o": ("heads", "head_dim", "embed"),
    "q_bias": ("heads", "head_dim"),
    "k_bias": ("kv_heads", "head_dim"),
    "v_bias": ("kv_heads", "head_dim"),
    "o_bias": ("norm",),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "gate_bias": ("mlp",),
    "up_bias": ("mlp",),
    "down_bias": ("norm",),
    "q_norm": ("norm",),
    "k_norm": ("norm",),
    **moe.PARAM_AXES,
}
"""Logical axes of every parameter by its name; parameters under `layers` have one more, leading axis."""


def rms_norm(x: Float[Array, "B T *H D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "B T *H D"]:
    """x / rms(x) * scale in float32, returned in x's type. https://arxiv.org/abs/1910.07467"""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return (wide * jnp.expand_dims(scale, range(x.ndim - 1)).astype(jnp.float32)).astype(x.dtype)


class Where(NamedTuple):
    """What every layer must know of the tokens at hand: positions, the rotary angles of them, who sees whom.

    That is a mask, or, for the kernel that makes its own, the segments of packed rows. Keys and values are those of the
    packed rows themselves, or with `cached` all that the cache holds. `experts`, if given, are those that every layer's
    mixture takes, whatever its router says.
    """

    positions: Int[Array, "B T"]
    angles: tuple[Float[Array, "B T K2"], Float[Array, "B T K2"]]
    seen: Bool[Array, "B T S"] | Int[Array, "B T"]
    cached: bool
    experts: Integer[Array, "L B T k"] | None = None


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: Cache | None,
        layer: Int[Array, ""] | int,
        where: Where,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c = self.config
        cos, sin = where.angles
        query = rope.rotate(self._project(x, "q", c.num_heads), cos, sin)
        key = rope.rotate(self._project(x, "k", c.num_kv_heads), cos, sin)
        value = self._project(x, "v", c.num_kv_heads)
        keys, values = key.swapaxes(1, 2), value.swapaxes(1, 2)
        if cache is not None:
            cache = write(cache, layer, where.positions, (key, value))
            if where.cached:
                keys, values = read(cache, layer)
        if where.cached:
            out = attention.attend(query, keys, values, where.seen)
        else:
            out = _attend_packed(query, keys, values, where.seen)
        kernel = self.param("o", _init(c), (c.num_heads, c.head_dim, c.embed_dim))
        out = jnp.einsum("bthk,hkd->btd", out, kernel.astype(x.dtype))
        if c.attention_bias:
            out = out + self.param("o_bias", nn.initializers.zeros, (c.embed_dim,)).astype(x.dtype)[None, None]
        return out, cache

    def _project(self, x: Array, name: str, heads: int) -> Array:
        c = self.config
        kernel = self.param(name, _init(c), (c.embed_dim, heads, c.head_dim))
        out = jnp.einsum("btd,dhk->bthk", x, kernel.astype(x.dtype))
        if c.attention_bias:
            out = (
                out + self.param(f"{name}_bias", nn.initializers.zeros, (heads, c.head_dim)).astype(x.dtype)[None, None]
            )
        if c.qk_norm and name != "v":
            out = rms_norm(out, self.param(f"{name}_norm", nn.initializers.ones, (c.head_dim,)), c.norm_eps)
        return meshes.constrain(out, "batch", "length", "heads" if name == "q" else "kv_heads", "head_dim")


def _attend_packed(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B N S K"],
    value: Float[Array, "B N S K"],
    seen: Bool[Array, "B T S"] | Int[Array, "B T"],
) -> Float[Array, "B T H K"]:
    """Attention within packed rows on every device: its rows, heads, and part of the queries of a row with all keys.

    From the segments by the kernel for TPUs, which makes the mask itself; from the mask elsewhere.
    """
    heads, kv_heads = query.shape[2], key.shape[1]
    if meshes.current_parts("heads", heads) != meshes.current_parts("kv_heads", kv_heads):
        key, value = (jnp.repeat(x, heads // kv_heads, axis=1) for x in (key, value))
    keys = ("batch", "kv_heads", None, None)
    axes = (("batch", "heads", "length", None), keys, keys)
    query = query.swapaxes(1, 2)
    if seen.ndim == 3:
        out = meshes.per_device(attention.attend_packed, *axes, ("batch", "length", None))(query, key, value, seen)
        return out.swapaxes(1, 2)

    def local(query: Array, key: Array, value: Array, own: Array, whole: Array, order: Array) -> Array:
        return flash.attend(query, key, value, (own, whole), order[:1])

    attend = meshes.per_device(local, *axes, ("batch", "length"), ("batch", None), ("length",))
    order = jnp.arange(seen.shape[1], dtype=jnp.int32)
    return attend(query, key, value, seen, seen, order).swapaxes(1, 2)


@jax.custom_vjp
def _matmul(x: Float[Array, "B T D"], kernel: Float[Array, "D F"]) -> Float[Array, "B T F"]:
    """x @ kernel, with its derivative written out.

    For the one that JAX derives, XLA transposes the gradient on CPUs first: a feed-forward takes half as long again.
    """
    return x @ kernel


def _matmul_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    return jnp.einsum("btf,df->btd", gradient, kernel), jnp.einsum("btd,btf->df", x, gradient)


_matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matmul_backward)


class Mlp(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x)). https://arxiv.org/abs/2002.05202"""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        hidden = jax.nn.silu(self._dense(x, "gate", (c.embed_dim, c.mlp_dim))) * self._dense(
            x, "up", (c.embed_dim, c.mlp_dim)
        )
        hidden = meshes.constrain(hidden, "batch", "length", "mlp")
        return self._dense(hidden, "down", (c.mlp_dim, c.embed_dim))

    def _dense(self, x: Array, name: str, shape: tuple[int, int]) -> Array:
        out = _matmul(x, self.param(name, _init(self.config), shape).astype(x.dtype))
        if self.config.mlp_bias:
            out = out + self.param(f"{name}_bias", nn.initializers.zeros, shape[1:]).astype(x.dtype)[None, None]
        return out


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each after a norm and added to the stream."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cache: Cache | None, layer: Int[Array, ""] | int, where: Where
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        out, cache = Attention(self.config, name="attention")(self._norm(x, "attention_norm"), cache, layer, where)
        x = meshes.constrain(x + out, "batch", "length", None)
        normed = self._norm(x, "mlp_norm")
        if self.config.num_experts:
            given = None if where.experts is None else where.experts[layer].astype(jnp.int32)
            out, chosen = moe.Moe(self.config, name="mlp")(normed, given)
            cache = None if cache is None else note(cache, layer, where.positions, chosen)
        else:
            out = Mlp(self.config, name="mlp")(normed)
        return meshes.constrain(x + out, "batch", "length", None), cache

    def _norm(self, x: Array, name: str) -> Array:
        return rms_norm(
            x,
            self.param(name, nn.initializers.ones, (self.config.embed_dim,)),
            self.config.norm_eps,
        )


class Ends(nn.Module):
    """What stands before and after the layers: embedding, final norm, and the head where it is not tied.

    The scalar head begins as that of Tulu 3 does, with standard deviation 1 / sqrt(D + 1).
    """

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", _init(c), (c.vocab_size, c.embed_dim))
        self.final_norm = self.param("final_norm", nn.initializers.ones, (c.embed_dim,))
        if c.output == "score":
            self.score = self.param("score", nn.initializers.normal((c.embed_dim + 1) ** -0.5), (c.embed_dim,))
            self.score_bias = self.param("score_bias", nn.initializers.zeros, ())
        elif not c.tie_embeddings:
            self.head = self.param("head", _init(c), (c.embed_dim, c.vocab_size))

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look tokens up, in the compute type.

        Each device looks up its own columns for all rows, which are then exchanged for all columns of its own rows:
        neither the table nor its gradient is ever whole on a device.
        """
        table = meshes.constrain(self.embedding, *PARAM_AXES["embedding"])
        x = meshes.constrain(table[tokens].astype(self.config.dtype), "rows", "length", "embed")
        return meshes.constrain(x, "batch", "length", None)

    def norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The norm after the last layer."""
        return rms_norm(x, self.final_norm, self.config.norm_eps)


def _init(config: ModelConfig) -> nn.initializers.Initializer:
    return nn.initializers.normal(config.init_std)
