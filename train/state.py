"""Training state on a mesh: made sharded, described abstractly for checkpoints and planners."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..model import transformer
from ..model.config import ModelConfig
from ..sharding import mesh as meshes
from .step import State


def create(params: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> State:
    """The state before the first update; the optimizer's moments lie like the parameters they belong to."""
    params_at = jax.tree.map(lambda x: x.sharding, params)
    where = _opt_shardings(params, params_at, optimizer, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=where)(params)
    return State(params, opt_state, jax.device_put(jnp.int32(0), meshes.replicated(mesh)))


def abstract(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> State:
    """Shapes, types and shardings of a state, without making one."""
    shapes = transformer.abstract_params(config)
    params_at = transformer.shardings(config, mesh)
    opt_shapes = jax.eval_shape(optimizer.init, shapes)
    opt_at = _opt_shardings(shapes, params_at, optimizer, mesh)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        State(shapes, opt_shapes, step),  # pyright: ignore[reportArgumentType]
        State(params_at, opt_at, meshes.replicated(mesh)),  # pyright: ignore[reportArgumentType]
    )


def abstract_params(config: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """Shapes, types and shardings of the parameters alone."""
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        transformer.abstract_params(config),
        transformer.shardings(config, mesh),
    )


def _opt_shardings(params: Any, params_at: Any, optimizer: optax.GradientTransformation, mesh: Any) -> Any:
    """What has a parameter's name and shape lies like it; the rest (counts, factored moments) is everywhere.

    Names rather than `optax.tree_map_params`, which cannot see that a factored moment has another shape.
    """
    known = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    places = dict(jax.tree_util.tree_leaves_with_path(params_at))

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        name = next((path[i:] for i in range(len(path)) if path[i:] in known), None)
        return places[name] if name is not None and known[name] == leaf.shape else meshes.replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))
