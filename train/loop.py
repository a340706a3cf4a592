"""The loop that every training stage shares: resume, iterate, save, stop cleanly when asked."""

import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from .checkpoint import Checkpoints
from .metrics import Log
from .step import State

Cursor = dict[str, Any]
_Line = tuple[int, Mapping[str, Any], dict[str, float]]
Iterate = Callable[[State, Cursor, Log], tuple[State, Cursor, Mapping[str, Any]]]


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


def run(
    out: Path,
    *,
    title: str,
    steps: int,
    save_every: int,
    fresh: Callable[[], State],
    abstract: State,
    iterate: Iterate,
) -> State:
    """Train until `steps` iterations are done, from the newest checkpoint if there is one.

    Args:
        out: the stage's folder.
        title: what the progress bar says.
        steps: iterations in all.
        save_every: iterations between checkpoints. After the last one the caller stores the finished model instead.
        fresh: makes the state before the first iteration.
        abstract: its shapes and shardings.
        iterate: one iteration: (state, cursor, log) -> (state, cursor, metrics). It may donate the state, but only once
            nothing can interrupt it any more. `cursor["iteration"]` counts what is done.

    Raises:
        Interrupted: after a signal, with everything that was done saved.
    """
    checkpoints = Checkpoints(out / "checkpoints")
    done = checkpoints.latest()
    if done is None:
        state, cursor = fresh(), {"iteration": 0}
    else:
        state, cursor = checkpoints.restore(done, abstract)
    try:
        with Log(out, title=title, total=steps, start=cursor["iteration"]) as log:
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
    return jax.block_until_ready(state)


def _write(log: Log, waiting: list[_Line]) -> None:
    """Write the lines that wait, once."""
    while waiting:
        log.write(*waiting.pop(0))
