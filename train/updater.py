"""Compiled updates over any number of micro-batches of one fixed shape: nothing recompiles when a batch grows."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from ..data.batch import Batch
from ..sharding import mesh as meshes
from .step import Loss, Metrics, State, Sums, make_accumulate, make_update, zero_sums


class Updater:
    """Adds gradients up micro-batch by micro-batch, then takes one optimizer step."""

    def __init__(self, loss: Loss, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> None:
        self.loss, self.mesh = loss, mesh
        self.accumulate = jax.jit(make_accumulate(loss), donate_argnums=0)
        self.update = jax.jit(make_update(optimizer), donate_argnums=0)

    def add(self, sums: Sums | None, state: State, batch: Mapping[str, Any], *constants: Any) -> Sums:
        """One more micro-batch; None starts a new sum."""
        with jax.set_mesh(self.mesh):
            if sums is None:
                sums = self._zeros(state.params, batch, *constants)
            return self.accumulate(sums, state.params, batch, *constants)

    def finish(self, state: State, sums: Sums) -> tuple[State, Metrics]:
        """Divide by the global weight and update. The state is donated."""
        with jax.set_mesh(self.mesh):
            return self.update(state, sums)

    def _zeros(self, params: Any, batch: Mapping[str, Any], *constants: Any) -> Sums:
        shapes = jax.eval_shape(functools.partial(zero_sums, self.loss), params, batch, *constants)
        replicated = jax.tree.map(lambda _: meshes.replicated(self.mesh), shapes)
        where = replicated._replace(grads=jax.tree.map(lambda x: x.sharding, params))
        return _zeros_like(shapes, where)


def _zeros_like(shapes: Sums, where: Sums) -> Sums:
    make = lambda: jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)  # noqa: E731
    return jax.jit(make, out_shardings=where)()


def micro_batches(batch: Batch, rows: int, mesh: jax.sharding.Mesh) -> list[dict[str, jax.Array]]:
    """Split a batch into micro-batches of `rows` rows on a mesh; the last is filled up with empty rows."""
    total = next(iter(batch.values())).shape[0]
    pieces = []
    for start in range(0, total, rows):
        piece = {name: _filled(value[start : start + rows], rows) for name, value in batch.items()}
        if np.any(piece["mask"]):
            pieces.append(jax.device_put(piece, meshes.batch_shardings(piece, mesh)))
    return pieces


def _filled(value: np.ndarray, rows: int) -> np.ndarray:
    missing = rows - value.shape[0]
    return np.concatenate([value, np.zeros((missing, *value.shape[1:]), value.dtype)]) if missing else value
