"""A Llama-architecture language model as pure functions: init, apply, logits, token_logp.

Parameters are a nested dict of float32 arrays, layers stacked on a leading axis. Trainer, sampler, teacher and
reference all call the same `apply`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from ..sharding import mesh as meshes
from . import attention, logp, rope
from .cache import Cache
from .config import ModelConfig
from .layers import PARAM_AXES, Block, Ends, Where

Params = dict[str, Any]

LOGITS = 2**25
"""Scores that `token_logp` holds at a time on a device that has the whole head: 128 MiB."""


def init(config: ModelConfig, key: Array) -> Params:
    """Random float32 parameters, normal with the config's standard deviation."""
    ends_key, layers_key = jax.random.split(key)
    one = jnp.zeros((1, 1), jnp.int32)
    where = Where(one, rope.angles(config, one), jnp.ones((1, 1, 1), bool), cached=False)
    x = jnp.zeros((1, 1, config.embed_dim), config.dtype)

    def layer(key: Array) -> Params:
        return dict(Block(config).init(key, x, None, 0, where)["params"])

    ends = Ends(config).init(ends_key, one, method="embed")["params"]
    return {**ends, "layers": jax.vmap(layer)(jax.random.split(layers_key, config.num_layers))}


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and types of the parameters, without computing any."""
    leaves, tree = _shapes(config)
    return jax.tree.unflatten(tree, leaves)


@functools.cache
def _shapes(config: ModelConfig) -> tuple[list[jax.ShapeDtypeStruct], Any]:
    return jax.tree.flatten(jax.eval_shape(lambda key: init(config, key), jax.random.key(0)))


def logical_axes(config: ModelConfig) -> Params:
    """The logical axes of every parameter, in the parameters' own tree."""

    def axes(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> tuple[str, ...]:
        names = PARAM_AXES[path[-1].key]
        return names if len(names) == leaf.ndim else ("layers", *names)

    return jax.tree_util.tree_map_with_path(axes, abstract_params(config))


def shardings(config: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
    """Where each parameter lies on a mesh."""
    return meshes.shardings(logical_axes(config), abstract_params(config), mesh)


def apply(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    experts: Integer[Array, "B T L k"] | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Final hidden states of some tokens, and the cache with their keys and values.

    Args:
        config: the model's shape.
        params: as `init` makes them.
        tokens: input ids.
        positions: rotary positions; with a cache also the slots that the tokens take.
        segments: who attends to whom among these tokens (see `attention.segment_mask`).
        cache: where their keys and values are put. Without `segments`, queries see its slots up to their own position.
        experts: which experts each token goes to in each layer of a mixture, instead of those that its router chooses.
            Those are put into the cache.

    Returns:
        Hidden states after the last norm in the compute type, and the updated cache (None if none was given).
    """
    if experts is not None and not config.num_experts:
        raise ValueError("experts are given, and the model is dense: it has none to choose from")
    if segments is not None:
        seen = segments if meshes.platform() == "tpu" else attention.segment_mask(segments)
    elif cache is not None:
        seen = attention.cache_mask(positions, cache.slots)
    else:
        raise ValueError("apply needs `segments` (training) or `cache` (decoding) to know who attends to whom")
    ends = {name: value for name, value in params.items() if name != "layers"}
    x = _run(Ends(config), ends, tokens, method="embed")
    chosen = None if experts is None else jnp.moveaxis(experts, 2, 0)
    where = Where(positions, rope.angles(config, positions), seen, cached=segments is None, experts=chosen)
    x, cache = _layers(config, params["layers"], (x, cache), where)
    return _run(Ends(config), ends, x, method="norm"), cache


def _run(module: Any, params: Params, *args: Any, **kwargs: Any) -> Any:
    """What a Flax module returns (which Flax types as any tree)."""
    return module.apply({"params": params}, *args, **kwargs)


def _layers(
    config: ModelConfig, layers: Params | tuple[Params, ...], carry: tuple[Array, Cache | None], where: Where
) -> tuple[Array, Cache | None]:
    """All decoder layers: one scan over stacked weights, or one after the other over a tuple of them."""

    def block(x: Array, cache: Cache | None, index: Array | int, weights: Params) -> tuple[Array, Cache | None]:
        return _run(Block(config), weights, x, cache, index, where)

    if isinstance(layers, tuple):
        for index, weights in enumerate(layers):
            carry = block(*carry, index, weights)
        return carry
    indices = jnp.arange(config.num_layers)

    def scanned(carry: tuple[Array, Cache | None], layer: tuple[Array, Params]) -> tuple[Any, None]:
        index, weights = layer
        return block(*carry, index, _placed(weights)), None

    step = _remat(config, scanned)
    return jax.lax.scan(step, carry, (indices, layers))[0]


def _placed(weights: Params) -> Params:
    """One layer's weights, told to lie as they are stored: then their gradients are scattered as they appear."""
    return jax.tree_util.tree_map_with_path(lambda path, x: meshes.constrain(x, *PARAM_AXES[path[-1].key]), weights)


def _remat(config: ModelConfig, step: Callable) -> Callable:
    if config.remat == "none":
        return step
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else policies.nothing_saveable
    return jax.checkpoint(step, prevent_cse=False, policy=policy)


def for_decoding(config: ModelConfig, params: Params) -> Params:
    """The same model as a decoding loop wants it: a tuple of layers instead of a stack, which `apply` takes as well.

    Matrices are in the compute type and split over the tensor axis only: a loop that makes one token a turn would
    else gather every weight for every token. From a stack it would also copy each layer's weights and cache (measured:
    half of what Llama-3.1-8B moves on TPUs; on CPU, for SmolLM2-135M at 64 rows, twice the time of the layers).
    """

    def lay(path: tuple[Any, ...], x: Array) -> Array:
        return meshes.constrain(x if x.ndim == 1 else x.astype(config.dtype), *decoding_axes(path))

    def layer(index: int) -> Params:
        return jax.tree.map(lambda x: x[index], params["layers"])

    whole = {**params, "layers": tuple(layer(index) for index in range(config.num_layers))}
    return jax.tree_util.tree_map_with_path(lay, whole)


def decoding_axes(path: tuple[Any, ...]) -> tuple[str | None, ...]:
    """The logical axes of the parameter at a path of what `for_decoding` makes: nothing lies over the fsdp axis."""
    return tuple(None if name == "embed" else name for name in PARAM_AXES[path[-1].key])


def head(config: ModelConfig, params: Params) -> Float[Array, "D V"]:
    """The matrix that turns hidden states into logits; the transposed embedding where it is tied.

    Raises:
        ValueError: for a model that gives scores.
    """
    if config.output == "score":
        raise ValueError("this model gives scores, not logits: it can judge text and neither write nor predict it")
    return params["embedding"].T if config.tie_embeddings else params["head"]


def with_score(config: ModelConfig, params: Params, key: Array) -> tuple[ModelConfig, Params]:
    """A language model made into a scoring one: the same but for its head, which is a new scalar one."""
    scoring = config.replace(output="score")
    fresh = Ends(scoring).init(key, jnp.zeros((1, 1), jnp.int32), method="embed")["params"]
    kept = {name: value for name, value in params.items() if name != "head"}
    return scoring, {**kept, "score": fresh["score"], "score_bias": fresh["score_bias"]}


def score(config: ModelConfig, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """What a scoring model makes of each position, float32; before any sigmoid.

    Raises:
        ValueError: for a model without the scalar head.
    """
    if config.output != "score":
        raise ValueError("this is a language model without a scalar head: train a reward model from it first")
    kernel = params["score"].astype(jnp.float32)
    return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), kernel) + params["score_bias"].astype(jnp.float32)


def logits(config: ModelConfig, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Float32 logits. For a few positions at a time: over a whole batch use `token_logp`."""
    kernel = head(config, params).astype(hidden.dtype)
    out = jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=jnp.float32)
    return meshes.constrain(out, "batch", "length", "vocab")


def token_logp(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> Float[Array, "B T"]:
    """Log-probability of each target under softmax(logits / temperature), float32.

    Never holds logits of more than about `chunk` entries of the vocabulary, forward or backward; the backward pass
    computes them again. Unless told, 4,096 entries of a head that is split over devices, so that no device gathers much
    of it, or as many as make `LOGITS` scores of one that is not.
    """
    if chunk is None:
        tokens = targets.size // meshes.current_parts("batch", targets.shape[0])
        chunk = max(128, LOGITS // tokens) if logp.is_whole(hidden.shape[2], config.vocab_size) else 4096
    return logp.token_logp(hidden, head(config, params), targets, chunk=chunk, temperature=temperature)
