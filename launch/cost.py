"""Work of a program from its jaxpr: floating-point operations of its matrix products, loops counted as they turn."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

from ..sharding import rules


def matmul_flops(jaxpr: Any, *, trips: int = 1, groups: int = 1) -> float:
    """Multiply-adds, counted as two, of all matrix products of a jaxpr, over all devices.

    What is computed again in the backward pass counts again. The elementwise rest is left out: it is some per cent of a
    transformer's operations and bound by memory. A row of a ragged product is multiplied by its own group alone.

    Args:
        jaxpr: a (closed) jaxpr.
        trips: turns of a `while` whose end depends on data.
        groups: number of parts that the groups of ragged products lie in, each of which is given all rows.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return math.fsum(_flops(equation, trips, groups) for equation in inner.eqns)


def _flops(equation: Any, trips: int, groups: int) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "ragged_dot_general":
        return 2.0 * math.prod(equation.invars[0].aval.shape) * equation.outvars[0].aval.shape[-1] / groups
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
        return 2.0 * math.prod(out) * math.prod(kernel) / kernel[params["dimension_numbers"].rhs_spec[0]]
    if name == "shard_map":
        groups = math.prod(params["mesh"].shape[axis] for axis in rules.RULES["experts"])
    inside = [matmul_flops(one, trips=trips, groups=groups) for one in _jaxprs(params)]
    if not inside:
        return 0.0
    if name == "scan":
        return params["length"] * sum(inside)
    if name == "while":
        return trips * sum(inside)
    if name == "cond":
        return max(inside)
    if name == "shard_map":
        return params["mesh"].size * sum(inside)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * sum(inside)
    return sum(inside)


def _dot(equation: Any) -> float:
    (left, _), (batch, _) = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    other = equation.invars[1].aval.shape
    contracted = math.prod(shape[axis] for axis in left)
    batched = math.prod(shape[axis] for axis in batch)
    return 2.0 * math.prod(shape) * math.prod(other) / (contracted * batched)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation runs. Of a function with its own derivative, only the function."""
    for key, value in params.items():
        if key in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun", "jvp_jaxpr_thunk"):
            continue
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr | core.Jaxpr):
                yield one


def array_bytes(tree: Any) -> float:
    """Bytes of a tree of abstract arrays on one device; those without a sharding lie there whole."""
    return math.fsum(_on_one_device(leaf) for leaf in jax.tree.leaves(tree))


def _on_one_device(leaf: Any) -> float:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return float(math.prod(shape)) * leaf.dtype.itemsize
