"""Traces of chosen steps, for xprof (`xprof OUT/STAGE/profile`): where the time on the devices goes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

_steps = range(0)


def request(steps: range) -> None:
    """Have these steps of every training stage traced, as the log counts them."""
    global _steps
    _steps = steps


@contextlib.contextmanager
def around(folder: Path, step: int) -> Iterator[None]:
    """Trace the step inside, if it was asked for, into `folder`/profile; one trace holds all of them."""
    if step not in _steps:
        yield
        return
    if step == _steps[0]:
        jax.profiler.start_trace(str(folder / "profile"))
    try:
        with jax.profiler.StepTraceAnnotation("step", step_num=step):
            yield
    finally:
        if step == _steps[-1]:
            jax.profiler.stop_trace()
