"""The loop that every training stage shares: resume, iterate, save, stop cleanly when asked."""

import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from . import checkpoint
from . import state as states
from .checkpoint import Checkpoints
from .metrics import Log

Cursor = dict[str, Any]
_Line = tuple[int, Mapping[str, Any], dict[str, float]]
Iterate = Callable[[Any, Cursor, Log], tuple[Any, Cursor, Mapping[str, Any]]]


class Interrupted(Exception):
    """A signal asked the run to stop; what was reached is on disk."""


_stop = threading.Event()


def request_stop(number: int, _frame: object) -> None:
    """Signal handler: stop at the next safe place. A second Ctrl-C stops at once."""
    if _stop.is_set() and number == signal.SIGINT:
        raise KeyboardInterrupt
    _stop.set()


def check_stop() -> None:
    """Raise `Interrupted` if a signal has come. For long work inside an iteration that may be thrown away."""
    if _stop.is_set():
        raise Interrupted


class Trained(NamedTuple):
    """What a loop trains: a state, made or described for restoring, and how the result is stored in a stage's folder.

    For a language model it is a `State`; a stage that trains several models may have any tree of arrays.
    """

    create: Callable[[], Any]
    abstract: Callable[[], Any]
    store: Callable[[Path, Any], None]


def language_model(start: str, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> Trained:
    """The model at `start`, opened only if there is no checkpoint; the result is in model/."""
    config = checkpoint.open_config(start)

    def store(out: Path, state: Any) -> None:
        tokenizer = checkpoint.open_tokenizer(start)
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
    save_every: int,
    mesh: jax.sharding.Mesh,
    iterate: Iterate,
) -> None:
    """Train the model at `start` until `steps` iterations are done; the result is in `out`/model. See `train`."""
    model = language_model(start, optimizer, mesh)
    train(out, model, steps=steps, save_every=save_every, iterate=iterate)


def train(out: Path, trained: Trained, *, steps: int, save_every: int, iterate: Iterate) -> None:
    """Iterate until `steps` iterations are done, from the newest checkpoint if there is one; store the result.

    Args:
        out: the stage's folder.
        trained: what is trained.
        steps: iterations in all.
        save_every: iterations between checkpoints. After the last one the finished model is stored instead.
        iterate: one iteration: (state, cursor, log) -> (state, cursor, metrics). It may donate the state, but only once
            nothing can interrupt it any more. `cursor["iteration"]` counts what is done.

    Raises:
        Interrupted: after a signal, with everything that was done saved.
    """
    checkpoints = Checkpoints(out / "checkpoints")
    done = checkpoints.latest()
    if done is None:
        state, cursor = trained.create(), {"iteration": 0}
    else:
        state, cursor = checkpoints.restore(done, trained.abstract())
    try:
        with Log(out, title=out.name, total=steps, start=cursor["iteration"]) as log:
            waiting: list[_Line] = []
            while cursor["iteration"] < steps:
                try:
                    check_stop()
                    state, cursor, metrics = iterate(state, cursor, log)
                except Interrupted:
                    _write(log, waiting)
                    checkpoints.save(cursor["iteration"], state, cursor)
                    raise
                finally:
                    # Read the numbers of the step before only now: this step is already on its way.
                    _write(log, waiting)
                cursor = {**cursor, "iteration": cursor["iteration"] + 1}
                waiting.append((cursor["iteration"], metrics, log.lap()))
                if cursor["iteration"] % save_every == 0 and cursor["iteration"] < steps:
                    # The line comes before the checkpoint: a run that goes on from step n must find the line of step n.
                    _write(log, waiting)
                    with log.phase("checkpoint"):
                        checkpoints.save(cursor["iteration"], state, cursor)
            _write(log, waiting)
    finally:
        checkpoints.close()
    trained.store(out, state)


def _write(log: Log, waiting: list[_Line]) -> None:
    """Write the lines that wait, once; the time until their numbers are there is their step's training."""
    while waiting:
        step, values, seconds = waiting.pop(0)
        begin = time.perf_counter()
        jax.block_until_ready(values)
        seconds["train"] = round(seconds.get("train", 0.0) + time.perf_counter() - begin, 4)
        log.write(step, values, seconds)
