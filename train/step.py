"""The train step: the one place that takes gradients.

A loss is `loss(params, batch, *constants) -> (sum, weight, metrics)`: a sum over tokens, the weight to divide it by,
and further sums for the log. Gradients of sums are added up over micro-batches and divided once by the global weight,
so they do not depend on how a batch is split, packed or sharded. A metric is a sum too, or a `Mean` over a weight of
its own, or a `Max`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Params = Any
Batch = Mapping[str, Array]
Metrics = dict[str, Any]
Loss = Callable[..., tuple[Float[Array, ""], Float[Array, ""], Metrics]]


class Mean(NamedTuple):
    """A metric that is divided by a weight of its own and not by the loss's; both are sums."""

    total: Float[Array, ""]
    weight: Float[Array, ""]


class Max(NamedTuple):
    """A metric of which the largest value of all micro-batches counts; never negative."""

    value: Float[Array, ""]


class State(NamedTuple):
    """What training changes: float32 parameters, the optimizer's state, and the number of updates so far."""

    params: Params
    opt_state: Any
    step: Int[Array, ""]


class Sums(NamedTuple):
    """Gradients and values summed over some micro-batches, not yet divided by `weight`."""

    grads: Params
    loss: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: Metrics


def make_accumulate(loss: Loss) -> Callable[..., Sums]:
    """`accumulate(sums, params, batch, *constants) -> sums` with one micro-batch added. Jit it, donating the sums."""

    def value(params: Params, batch: Batch, *constants: Any) -> tuple[Array, tuple[Array, Metrics]]:
        total, weight, metrics = loss(params, batch, *constants)
        return total, (weight, metrics)

    def accumulate(sums: Sums, params: Params, batch: Batch, *constants: Any) -> Sums:
        (total, (weight, metrics)), grads = jax.value_and_grad(value, has_aux=True)(params, batch, *constants)
        added = jax.tree.map(jnp.add, sums, Sums(grads, total, weight, metrics))
        largest = {name: _largest(sums.metrics[name], new) for name, new in metrics.items() if isinstance(new, Max)}
        return added._replace(metrics={**added.metrics, **largest})

    return accumulate


def _largest(old: Max, new: Max) -> Max:
    return Max(jnp.maximum(old.value, new.value))


def zero_sums(loss: Loss, params: Params, batch: Batch, *constants: Any) -> Sums:
    """Where `accumulate` starts: zeros of the parameters' and metrics' shapes."""
    total, weight, metrics = jax.eval_shape(loss, params, batch, *constants)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), Sums(params, total, weight, metrics))


def make_update(optimizer: optax.GradientTransformation) -> Callable[[State, Sums], tuple[State, Metrics]]:
    """`update(state, sums) -> (state, metrics)`: divide by the weight and take one optimizer step.

    Jit it, donating the state. A weight of 0 (no token counted) leaves gradients of zero, not NaN.
    """

    def update(state: State, sums: Sums) -> tuple[State, Metrics]:
        scale = jnp.where(sums.weight > 0, 1.0 / jnp.where(sums.weight > 0, sums.weight, 1.0), 0.0)
        grads = jax.tree.map(lambda g: g * scale, sums.grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {name: _value(metric, scale) for name, metric in sums.metrics.items()}
        metrics |= {"loss": sums.loss * scale, "weight": sums.weight, "grad_norm": optax.tree.norm(grads)}
        return State(params, opt_state, state.step + 1), metrics

    return update


def _value(metric: Array | Mean | Max, scale: Array) -> Array:
    if isinstance(metric, Max):
        return metric.value
    if isinstance(metric, Mean):
        return jnp.where(metric.weight > 0, metric.total / jnp.where(metric.weight > 0, metric.weight, 1.0), 0.0)
    return metric * scale


def make_train_step(
    loss: Loss, optimizer: optax.GradientTransformation, *, accumulate: int = 1
) -> Callable[..., tuple[State, Metrics]]:
    """`train_step(state, batch, *constants) -> (state, metrics)`, pure. Jit it once, donating the state.

    Args:
        loss: see the module.
        optimizer: an optax transformation, as `optimizer.build` makes them.
        accumulate: number of micro-batches, taken one after the other, that the batch's rows are split into.
    """
    add, update = make_accumulate(loss), make_update(optimizer)

    def train_step(state: State, batch: Batch, *constants: Any) -> tuple[State, Metrics]:
        # Every accumulate-th row: a batch whose rows are split over devices is then cut without moving any.
        micro = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), dict(batch))
        first = jax.tree.map(lambda x: x[0], micro)
        sums = zero_sums(loss, state.params, first, *constants)
        if accumulate == 1:
            sums = add(sums, state.params, first, *constants)
        else:
            body = lambda sums, one: (add(sums, state.params, one, *constants), None)  # noqa: E731
            sums, _ = jax.lax.scan(body, sums, micro)
        return update(state, sums)

    return train_step
