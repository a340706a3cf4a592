"""The programs a stage runs, with abstract arguments: a planner compiles them for a mesh that is not here."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..data.batch import FIELDS
from ..model import sample
from ..model.config import ModelConfig
from ..model.processing import Sampling
from ..sharding import mesh as meshes
from . import state as states
from .compute import Compute
from .step import Loss, make_train_step

Programs = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]

_KINDS = {"tokens": jnp.int32, "targets": jnp.int32, "segments": jnp.int32, "positions": jnp.int32}


def abstract_batch(
    compute: Compute, mesh: jax.sharding.Mesh, fields: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a micro-batch on a mesh; `fields` are further float32 ones, with what follows [B, T] of their shape."""
    shape = (compute.rows(mesh), compute.row_tokens)
    batch = {name: jax.ShapeDtypeStruct(shape, _KINDS.get(name, jnp.float32)) for name in FIELDS}
    for name, rest in (fields or {}).items():
        batch[name] = jax.ShapeDtypeStruct((*shape, *rest), jnp.float32)
    where = meshes.batch_shardings(batch, mesh)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[name]) for name, x in batch.items()}


def training(
    loss: Loss,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    compute: Compute,
    mesh: jax.sharding.Mesh,
    *constants: Any,
    fields: Mapping[str, tuple[int, ...]] | None = None,
) -> Programs:
    """The train step of one micro-batch and its update."""
    state = states.abstract(config, optimizer, mesh)
    return {"train": (make_train_step(loss, optimizer), (state, abstract_batch(compute, mesh, fields), *constants))}


def generation(
    config: ModelConfig, sampling: Sampling, compute: Compute, group: int, mesh: jax.sharding.Mesh
) -> Programs:
    """Prefill and decoding of full slots, with prompts as long as a row leaves room for."""
    params = states.abstract_params(config, mesh)
    prompt_tokens = max(1, compute.row_tokens - sampling.max_tokens)
    sizes = {"slots": compute.slots, "group": group, "prompt_tokens": prompt_tokens}
    return sample.programs(config, params, sampling, **sizes, parts=meshes.batch_parts(mesh))
