"""The programs a stage runs, with abstract arguments: a planner compiles them for a mesh that is not here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..data.batch import FIELDS
from ..model import sample
from ..model.config import ModelConfig
from ..model.processing import Sampling
from ..model.speaker import Mixed, Speaker
from ..sharding import mesh as meshes
from . import state as states
from . import updater
from .compute import Compute
from .step import Loss


@dataclass(frozen=True, kw_only=True)
class Program:
    """A jitted function of a stage, what it is called with, and how often.

    `function(*static, *arguments, **options)` is the call; `arguments` are abstract, with shardings. `calls` is how
    many the whole stage makes and `tokens` how many tokens one takes in or puts out, both estimated from the stage's
    settings: every row full, every answer as long as it may be. `trips` is how often a loop turns whose end depends on
    data. `forward`, called with the arguments after the first, is the forward pass of a program that differentiates:
    three times its work is what the model needs, the rest is recomputation. `resident`
    are arrays that lie in memory meanwhile, though the program does not take them.
    """

    function: Any
    arguments: tuple[Any, ...]
    static: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    calls: float | int = 1
    tokens: int = 0
    trips: int = 1
    forward: Callable[..., Any] | None = None
    resident: Any = ()

    def trace(self) -> Any:
        """The traced call (`jax.stages.Traced`): it has the jaxpr, and lowers."""
        return self.function.trace(*self.static, *self.arguments, **self.options)


Programs = dict[str, Program]

_INTEGERS = ("tokens", "targets", "segments", "positions", "age", "teacher_tokens")
_KINDS = {**dict.fromkeys(_INTEGERS, jnp.int32), "kept": jnp.uint8}


def abstract_batch(
    compute: Compute,
    mesh: jax.sharding.Mesh,
    fields: Mapping[str, tuple[int, ...]] | None = None,
    *,
    kinds: Mapping[str, Any] | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a micro-batch on a mesh; `fields` are further ones, with what follows [B, T] of their shape.

    `kinds` are types of fields beside those that are the same everywhere.
    """
    types = {**_KINDS, **(kinds or {})}
    shape = (compute.rows(mesh), compute.row_tokens)
    batch = {name: jax.ShapeDtypeStruct(shape, _KINDS.get(name, jnp.float32)) for name in FIELDS}
    for name, rest in (fields or {}).items():
        batch[name] = jax.ShapeDtypeStruct((*shape, *rest), types.get(name, jnp.float32))
    where = meshes.batch_shardings(batch, mesh)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[name]) for name, x in batch.items()}


def training(
    loss: Loss,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    mesh: jax.sharding.Mesh,
    *constants: Any,
    updates: int,
    tokens: int,
    resident: Any = (),
) -> Programs:
    """What an `Updater` runs: gradients of a micro-batch, and the update.

    Args:
        loss: of the stage.
        config: of the model that is trained.
        optimizer: of the stage.
        batch: a micro-batch, as `abstract_batch` describes it.
        mesh: where it all lies.
        *constants: further arguments of the loss, abstract.
        updates: number of updates in the stage.
        tokens: number of tokens that an update learns from, an estimate.
        resident: what else is in memory, beside the optimizer's state.
    """
    state = states.abstract(config, optimizer, mesh)
    sums = updater.abstract_sums(loss, mesh, state.params, batch, *constants)
    micro_batches = -(-tokens // batch["tokens"].size)
    gradients = Program(
        function=updater.jit_accumulate(loss, sums),
        arguments=(sums, state.params, dict(batch), *constants),
        calls=updates * micro_batches,
        tokens=min(tokens, batch["tokens"].size),
        forward=loss,
        resident=(state.opt_state, resident),
    )
    update = Program(
        function=updater.jit_update(optimizer, state), arguments=(state, sums), calls=updates, resident=resident
    )
    return {"gradients": gradients, "update": update}


def generation(
    config: Speaker,
    sampling: Sampling,
    compute: Compute,
    mesh: jax.sharding.Mesh,
    *,
    group: int,
    answers: int,
    times: int = 1,
    resident: Any = (),
) -> Programs:
    """Weights laid out for decoding, prefill and decoding of full slots, with prompts as long as a row leaves room for.

    Args:
        config: of the model that answers, or of two that are mixed.
        sampling: of the stage.
        compute: of the stage; its slots are answered at a time.
        mesh: where it all lies.
        group: answers to a prompt, which share its prefill.
        answers: number of answers that are asked for at a time.
        times: how often that happens in the stage.
        resident: what else is in memory.
    """
    prompt_tokens = max(1, compute.row_tokens - sampling.max_tokens)
    sizes = {"slots": compute.slots, "group": group, "prompt_tokens": prompt_tokens}
    if isinstance(config, Mixed):
        params = tuple(states.abstract_params(one, mesh) for one in config.models)
    else:
        params = states.abstract_params(config, mesh)
    calls = sample.programs(config, params, sampling, **sizes, mesh=mesh)
    prompts, together = calls["prefill"].arguments[-1].shape
    slots = calls["decode"].arguments[1].token.size
    waves = times * -(-answers // slots)
    prefills = -(-min(slots, answers) // (prompts * together))
    shared = {
        "decoder": {"calls": times},
        "prefill": {
            "calls": waves * prefills,
            "tokens": -(-min(slots, answers) // together) * prompt_tokens // prefills,
            "resident": (resident, calls["decode"].arguments[0]),
        },
        "decode": {
            "calls": waves,
            "tokens": min(slots, answers) * sampling.max_tokens,
            "trips": sampling.max_tokens,
            "resident": (resident, params),
        },
    }
    return {name: Program(**one._asdict(), **{"resident": resident, **shared[name]}) for name, one in calls.items()}
