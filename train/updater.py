"""Compiled updates over any number of micro-batches of one fixed shape: nothing recompiles when a batch grows."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..data.batch import Batch
from ..sharding import mesh as meshes
from .step import Loss, Metrics, State, Sums, make_accumulate, make_update, zero_sums


class Updater:
    """Adds gradients up micro-batch by micro-batch, then takes one optimizer step. Compiled once, at the first step.

    Sums and state are told to lie where they lay: left to the compiler, they may come back elsewhere and every program
    is compiled a second time for them.
    """

    def __init__(self, loss: Loss, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> None:
        self.loss, self.optimizer, self.mesh = loss, optimizer, mesh
        self._zeros: Callable[[], Sums] | None = None
        self._accumulate: Callable[..., Sums] | None = None
        self._update: Callable[[State, Sums], tuple[State, Metrics]] | None = None

    def add(self, sums: Sums | None, state: State, batch: Mapping[str, Any], *constants: Any) -> Sums:
        """One more micro-batch; None starts a new sum. The sums are donated."""
        with jax.set_mesh(self.mesh):
            if self._zeros is None or self._accumulate is None:
                like = abstract_sums(self.loss, self.mesh, state.params, batch, *constants)
                make = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)  # noqa: E731
                self._zeros = jax.jit(make, out_shardings=_shardings(like))
                self._accumulate = jit_accumulate(self.loss, like)
            return self._accumulate(self._zeros() if sums is None else sums, state.params, batch, *constants)

    def step(self, state: State, micros: Sequence[Mapping[str, Any]], *constants: Any) -> tuple[State, Metrics]:
        """One update from all of the micro-batches; without any, the state as it was. The state is donated."""
        sums = None
        for micro in micros:
            sums = self.add(sums, state, micro, *constants)
        return (state, {}) if sums is None else self.finish(state, sums)

    def finish(self, state: State, sums: Sums) -> tuple[State, Metrics]:
        """Divide by the global weight and update. The state is donated."""
        with jax.set_mesh(self.mesh):
            if self._update is None:
                self._update = jit_update(self.optimizer, state)
            return self._update(state, sums)


def abstract_sums(loss: Loss, mesh: jax.sharding.Mesh, params: Any, batch: Mapping[str, Any], *constants: Any) -> Sums:
    """Shapes, types and shardings of the sums over micro-batches like `batch`; arguments may be abstract."""
    shapes = jax.eval_shape(functools.partial(zero_sums, loss), params, batch, *constants)
    where = jax.tree.map(lambda _: meshes.replicated(mesh), shapes)._replace(grads=_shardings(params))
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, where)


def jit_accumulate(loss: Loss, sums: Sums) -> Callable[..., Sums]:
    """The compiled `accumulate(sums, params, batch, *constants)`, for sums that lie like these. Donates them."""
    return jax.jit(make_accumulate(loss), donate_argnums=0, out_shardings=_shardings(sums))


def jit_update(optimizer: optax.GradientTransformation, state: State) -> Callable[..., tuple[State, Metrics]]:
    """The compiled `update(state, sums)`, for a state that lies like this one. Donates it."""
    return jax.jit(make_update(optimizer), donate_argnums=0, out_shardings=(_shardings(state), None))


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def micro_batches(batch: Batch, rows: int, mesh: jax.sharding.Mesh) -> list[dict[str, jax.Array]]:
    """Split a batch into micro-batches of `rows` rows on a mesh; the last is filled up with empty rows."""
    total = next(iter(batch.values())).shape[0]
    pieces = []
    for start in range(0, total, rows):
        piece = {name: _filled(value[start : start + rows], rows) for name, value in batch.items()}
        if np.any(piece["mask"]):
            pieces.append(meshes.place(piece, meshes.batch_shardings(piece, mesh)))
    return pieces


def _filled(value: np.ndarray, rows: int) -> np.ndarray:
    missing = rows - value.shape[0]
    return np.concatenate([value, np.zeros((missing, *value.shape[1:]), value.dtype)]) if missing else value
