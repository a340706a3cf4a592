"""Optimizers as settings that can be written down and compared, and what is kept of the weights beside them.

An optimizer's state may hold copies of the parameters, which are then sharded, checkpointed and resumed with it: a
running average (`ema`), and the reference of a KL term that is replaced now and then.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from ..model.layers import PARAM_AXES


@runtime_checkable
class Optimizer(Protocol):
    """Settings of an optimizer."""

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps` updates."""
        ...


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """What all optimizers share: the learning rate over time, gradient clipping, an average of the weights.

    The learning rate climbs to `learning_rate` in `warmup_steps`, then stays ("constant"), falls to `final` times its
    peak in a straight line ("linear") or as a cosine ("cosine"), or stays until the last `decay` of all updates and
    falls in a straight line then ("wsd": warm-up, stable, decay, https://arxiv.org/abs/2404.06395, section 4).
    `clip_norm` bounds the norm of the whole gradient. With `ema` d, a running average of the weights,
    d average + (1 - d) weights after each update, is stored beside the model as OUT/ema (InstructGPT has 0.992,
    https://arxiv.org/abs/2203.02155, appendix C.4).
    """

    learning_rate: float
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    final: float = 0.0
    decay: float = 0.1
    clip_norm: float = 1.0
    ema: float | None = None

    def __post_init__(self) -> None:
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema}: the share of the average that an update keeps lies between 0 and 1")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is {self.decay}: the share of updates in which a wsd schedule falls is up to 1")

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate at each of `steps` updates."""
        remaining, peak = max(steps - self.warmup_steps, 1), self.learning_rate
        if self.schedule == "constant":
            after = optax.constant_schedule(peak)
        elif self.schedule == "linear":
            after = optax.linear_schedule(peak, peak * self.final, remaining)
        elif self.schedule == "cosine":
            after = optax.cosine_decay_schedule(peak, remaining, alpha=self.final)
        else:
            falling = min(max(math.ceil(self.decay * steps), 1), remaining)
            after = optax.linear_schedule(peak, peak * self.final, falling, transition_begin=remaining - falling)
        warmup = optax.linear_schedule(peak / max(self.warmup_steps, 1), peak, max(self.warmup_steps - 1, 1))
        return optax.join_schedules([warmup, after], [self.warmup_steps]) if self.warmup_steps else after

    def _chain(self, core: optax.GradientTransformation) -> optax.GradientTransformation:
        optimizer = optax.chain(optax.clip_by_global_norm(self.clip_norm), core)
        return optimizer if self.ema is None else optax.chain(optimizer, _averaged(self.ema))


@dataclass(frozen=True, kw_only=True)
class AdamW(Scheduled):
    """AdamW (https://arxiv.org/abs/1711.05101)."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps` updates."""
        rate = self.rate(steps)
        return self._chain(optax.adamw(rate, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay))


@dataclass(frozen=True, kw_only=True)
class Muon(Scheduled):
    """Muon: the momentum of each weight matrix in the layers orthogonalised, one moment instead of two; Adam elsewhere.

    Each layer's matrices, seen from their inputs to their outputs, are orthogonalised by themselves; embedding, head,
    norms and biases have Adam with `adam_rate` times the learning rate. `rms` scales an update so that its entries have
    that root mean square whatever the matrix's shape; 0.2 lets AdamW's learning rates be used. Muon,
    https://kellerjordan.github.io/posts/muon; the scale and weight decay, https://arxiv.org/abs/2502.16982, eq. 4.
    """

    momentum: float = 0.95
    rms: float = 0.2
    weight_decay: float = 0.0
    adam_rate: float = 1.0
    b1: float = 0.9
    b2: float = 0.95

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps` updates."""
        schedule = self.rate(steps)
        muon = optax.contrib.muon(
            schedule,
            beta=self.momentum,
            weight_decay=self.weight_decay,
            adam_b1=self.b1,
            adam_b2=self.b2,
            adam_weight_decay=self.weight_decay,
            adam_learning_rate=lambda count: self.adam_rate * schedule(count),
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=self.rms,
        )
        return self._chain(muon)


@dataclass(frozen=True, kw_only=True)
class Adafactor(Scheduled):
    """Adafactor: second moments kept as one row and one column of each matrix, hardly any memory.

    `relative` scales an update by the root mean square of the weights it changes. https://arxiv.org/abs/1804.04235.
    """

    decay_rate: float = 0.8
    momentum: float | None = None
    relative: bool = False
    weight_decay: float = 0.0

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps` updates."""
        adafactor = optax.adafactor(
            self.rate(steps),
            decay_rate=self.decay_rate,
            momentum=self.momentum,
            multiply_by_parameter_scale=self.relative,
            weight_decay_rate=self.weight_decay or None,
        )
        return self._chain(adafactor)


def _matrices(params: Any) -> Any:
    """For each parameter which axes are inputs and which are outputs of a matrix; None for those that are no matrix."""

    def of(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = PARAM_AXES[path[-1].key]
        if "embed" not in names or "vocab" in names:
            return None
        names = names[1:] if names[0] == "experts" else names  # each expert has a matrix of its own
        first = leaf.ndim - len(names)  # a stack of layers has one axis more
        inputs = [first + i for i, name in enumerate(names) if (name == "embed") == (names[0] == "embed")]
        outputs = [first + i for i in range(len(names)) if first + i not in inputs]
        return optax.contrib.MuonDimensionNumbers(tuple(inputs), tuple(outputs))

    return jax.tree_util.tree_map_with_path(of, params)


class AveragedState(NamedTuple):
    """The running average of the parameters."""

    averaged_params: Any


def _averaged(decay: float) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AveragedState]:
        moved = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.averaged_params, moved)
        return updates, AveragedState(average)

    return optax.GradientTransformation(lambda params: AveragedState(jax.tree.map(jnp.copy, params)), update)


def average_of(opt_state: Any) -> Any:
    """The running average of the parameters in an optimizer's state; None where it keeps none."""
    return optax.tree_utils.tree_get(opt_state, "averaged_params")


class ReferenceState(NamedTuple):
    """Updates so far, and the parameters as they were after the last multiple of some number of updates."""

    num_updates: Int[Array, ""]
    reference_params: Any


def with_reference(optimizer: optax.GradientTransformation, *, every: int) -> optax.GradientTransformation:
    """The optimizer, which also keeps the parameters as they were after the last multiple of `every` updates."""

    def init(params: Any) -> ReferenceState:
        return ReferenceState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ReferenceState]:
        count = state.num_updates + 1
        moved = optax.apply_updates(params, updates)
        is_due = count % every == 0
        reference = jax.tree.map(lambda old, new: jnp.where(is_due, new, old), state.reference_params, moved)
        return updates, ReferenceState(count, reference)

    return optax.chain(optimizer, optax.GradientTransformation(init, update))


def reference_of(opt_state: Any) -> Any:
    """The parameters that `with_reference` keeps."""
    return optax.tree_utils.tree_get(opt_state, "reference_params")
