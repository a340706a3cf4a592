"""The loop that every training stage shares: resume, iterate, save, stop cleanly when asked."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax

from ..sharding import hosts
from . import checkpoint, profile, stop, watchdog
from . import state as states
from .checkpoint import Checkpoints
from .metrics import Log
from .step import State
from .stop import Interrupted, check_stop

Cursor = dict[str, Any]
_Line = tuple[int, Mapping[str, Any], dict[str, float]]
Iterate = Callable[[State, Cursor, Log], tuple[State, Cursor, Mapping[str, Any]]]

PACE_STEPS = 10
"""How often hosts compare their seconds, in steps."""


def run(
    out: Path,
    *,
    start: str,
    steps: int,
    optimizer: optax.GradientTransformation,
    save_every: int,
    mesh: jax.sharding.Mesh,
    iterate: Iterate,
    keep: int = 2,
    keep_every: int = 0,
) -> None:
    """Train a model until `steps` iterations are done, from the newest checkpoint if there is one; store the result.

    Args:
        out: the stage's folder; the model is then in `out`/model.
        start: the model to train, opened only if there is no checkpoint.
        steps: iterations in all.
        optimizer: an optax transformation.
        save_every: iterations between checkpoints. After the last one the finished model is stored instead.
        mesh: where the state lies.
        iterate: one iteration: (state, cursor, log) -> (state, cursor, metrics). It may donate the state, but only once
            nothing can interrupt it any more. `cursor["iteration"]` counts what is done.
        keep: how many of the newest checkpoints are kept.
        keep_every: checkpoints of multiples of this are kept beside them; 0 for none.

    Raises:
        Interrupted: after a signal to any host, with everything that was done saved.
    """
    config = checkpoint.open_config(start)
    checkpoints = Checkpoints(out / "checkpoints", keep=keep, keep_every=keep_every)
    done = checkpoints.latest() or 0
    watchdog.beat("opening the model", warm=False)
    stop.set_lossless(True)
    with contextlib.closing(checkpoints), Log(out, title=out.name, total=steps, start=done) as log:
        with log.phase(log.opening):
            if done:
                state, cursor = checkpoints.restore(done, states.abstract(config, optimizer, mesh))
            else:
                state, cursor = (
                    states.create(checkpoint.open_model(start, mesh).params, optimizer, mesh),
                    {"iteration": 0},
                )
        waiting: list[_Line] = []
        while cursor["iteration"] < steps:
            step = cursor["iteration"] + 1
            try:
                check_stop()
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
            if step % save_every == 0 and step < steps:
                # The line comes before the checkpoint: a run that goes on from step n must find the line of step n.
                _write(log, waiting)
                with log.phase("checkpoint"):
                    checkpoints.save(step, state, cursor)
            watchdog.beat(f"{out.name}: after step {step}", warm=True)
        _write(log, waiting)
        with log.phase("checkpoint"):
            checkpoints.wait()
            tokenizer = checkpoint.open_tokenizer(start)
            checkpoint.save_model(out / "model", checkpoint.Model(config, state.params, tokenizer))


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
