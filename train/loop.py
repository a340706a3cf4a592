"""The loop that every training stage shares: resume, iterate, save, stop cleanly when asked."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from ..sharding import hosts
from . import checkpoint, profile, stop, watchdog
from . import state as states
from .checkpoint import Checkpoints
from .compute import Compute
from .metrics import Log
from .optimizer import average_of
from .stop import Interrupted, check_stop

Cursor = dict[str, Any]
_Line = tuple[int, Mapping[str, Any], dict[str, float]]
Iterate = Callable[[Any, Cursor, Log], tuple[Any, Cursor, Mapping[str, Any]]]
Validate = Callable[[Any, Cursor, Log, bool], Cursor]
"""`validate(state, cursor, log, is_last) -> cursor`, where all is safe to interrupt."""

PACE_STEPS = 10
"""How often hosts compare their seconds, in steps."""


class Trained(NamedTuple):
    """What a loop trains: a state, made or described for restoring, and how the result is stored in a stage's folder.

    For a language model it is a `State`; a stage that trains several models may have any tree of arrays.
    """

    create: Callable[[], Any]
    abstract: Callable[[], Any]
    store: Callable[[Path, Any], None]


def language_model(start: str, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> Trained:
    """The model at `start`, opened only if there is no checkpoint; the result is in model/.

    Where the optimizer keeps an average of the weights, that is stored too, in ema/model.
    """
    config = checkpoint.open_config(start)

    def store(out: Path, state: Any) -> None:
        tokenizer, average = checkpoint.open_tokenizer(start), average_of(state.opt_state)
        if average is not None:
            checkpoint.save_model(out / "ema" / "model", checkpoint.Model(config, average, tokenizer))
        checkpoint.save_model(out / "model", checkpoint.Model(config, state.params, tokenizer))

    return Trained(
        create=lambda: states.create(checkpoint.open_model(start, mesh).params, optimizer, mesh),
        abstract=lambda: states.abstract(config, optimizer, mesh),
        store=store,
    )


def run(
    out: Path,
    *,
    start: str,
    steps: int,
    optimizer: optax.GradientTransformation,
    compute: Compute,
    mesh: jax.sharding.Mesh,
    iterate: Iterate,
    validate: Validate | None = None,
) -> None:
    """Train the model at `start` until `steps` iterations are done; the result is in `out`/model. See `train`."""
    model = language_model(start, optimizer, mesh)
    train(out, model, steps=steps, compute=compute, iterate=iterate, validate=validate)


def train(
    out: Path,
    trained: Trained,
    *,
    steps: int,
    compute: Compute,
    iterate: Iterate,
    validate: Validate | None = None,
) -> None:
    """Iterate until `steps` iterations are done, from the newest checkpoint if there is one; store the result.

    Args:
        out: the stage's folder.
        trained: what is trained.
        steps: iterations in all.
        compute: says how often checkpoints are written, and which are kept. After the last iteration the finished model
            is stored instead.
        iterate: one iteration: (state, cursor, log) -> (state, cursor, metrics). It may donate the state, but only once
            nothing can interrupt it any more. `cursor["iteration"]` counts what is done.
        validate: called before each iteration and after the last; the run ends where its cursor says "stopped".

    Raises:
        Interrupted: after a signal to any host, with everything that was done saved.
    """
    checkpoints = Checkpoints(out / "checkpoints", keep=compute.keep, keep_every=compute.keep_every)
    done = hosts.from_first(checkpoints.latest) or 0
    watchdog.beat("opening the model", warm=False)
    stop.set_lossless(True)
    with contextlib.closing(checkpoints), Log(out, title=out.name, total=steps, start=done) as log:
        with log.phase(log.opening):
            if done:
                state, cursor = checkpoints.restore(done, trained.abstract())
            else:
                state, cursor = trained.create(), {"iteration": 0}
        waiting: list[_Line] = []
        while True:
            step = cursor["iteration"] + 1
            try:
                check_stop()
                if validate is not None:
                    cursor = validate(state, cursor, log, step > steps)
                if step > steps or cursor.get("stopped"):
                    break
                with profile.around(out, step):
                    state, cursor, metrics = iterate(state, cursor, log)
            except Interrupted:
                log.waste()
                _write(log, waiting)
                with log.phase("checkpoint"):
                    checkpoints.save(cursor["iteration"], state, cursor)
                    checkpoints.wait()
                raise
            finally:
                # Read the numbers of the step before only now: this step is already on its way.
                _write(log, waiting)
            cursor = {**cursor, "iteration": step}
            stop.set_lossless(False)
            waiting.append((step, metrics, log.lap()))
            if step % PACE_STEPS == 0:
                _compare_pace(out, step, log)
            if step % compute.save_every == 0 and step < steps:
                # The line comes before the checkpoint: a run that goes on from step n must find the line of step n.
                _write(log, waiting)
                with log.phase("checkpoint"):
                    checkpoints.save(step, state, cursor)
            watchdog.beat(f"{out.name}: after step {step}", warm=True)
        _write(log, waiting)
        with log.phase("checkpoint"):
            checkpoints.wait()
            trained.store(out, state)


def _write(log: Log, waiting: list[_Line]) -> None:
    """Write the lines that wait, once; the time until their numbers are there is their step's training."""
    while waiting:
        step, values, seconds = waiting.pop(0)
        begin = time.perf_counter()
        jax.block_until_ready(values)
        seconds["train"] = round(seconds.get("train", 0.0) + time.perf_counter() - begin, 4)
        log.write(step, values, seconds)


def _compare_pace(out: Path, step: int, log: Log) -> None:
    """Append every host's seconds by phase since the last time to paces.jsonl: who is slow is seen there."""
    if jax.process_count() == 1:
        return
    own = {"host": hosts.name(), "seconds": {name: round(value, 3) for name, value in log.own.items()}}
    log.own.clear()
    with log.phase("sync"):
        paces = hosts.gathered(own)
    if hosts.is_first():
        with (out / "paces.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "hosts": paces}) + "\n")
