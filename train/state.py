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
    shapes = jax.eval_shape(optimizer.init, params)
    return optax.tree_map_params(
        optimizer,
        lambda _, at: at,
        shapes,
        params_at,
        transform_non_params=lambda _: meshes.replicated(mesh),
    )
