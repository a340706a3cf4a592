"""The processes of a run: they find each other, hear of each other's end, and leave together."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from ..sharding import hosts
from ..sharding import mesh as meshes
from ..train import stop
from ..train.stop import Interrupted

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment of processes that no cluster manager describes. On TPU pods, Slurm and Open MPI nothing is needed."""
HEARTBEAT = "POSTTRAIN_HEARTBEAT_SECONDS"
"""Environment: how long a host may be silent before the others take it for dead; 60 unless set."""

_FAILED, _HEARD = "posttrain/failed", "posttrain/heard"
_FAREWELL_SECONDS = 5.0
_LOST = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "coordination service")
"""What errors say that come of another process's end; JAX raises them as ValueError, RuntimeError and its own."""
_failing, _told = False, ""


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Take part in the run of all hosts. What fails on one is told to the others, who would wait for it for ever."""
    _join()
    several = jax.process_count() > 1
    try:
        yield
    except Interrupted:  # at the same place on all hosts
        if several:
            jax.distributed.shutdown()
        raise
    except Exception as error:
        if several:
            _part(error)
        raise
    if several:
        jax.distributed.shutdown()  # waits for all


def _join() -> None:
    """Initialise `jax.distributed` before any device is used, where there are, or may be, other processes.

    Raises:
        ValueError: if the environment names a coordinator, and not how many processes there are or which this is.
    """
    if jax.distributed.is_initialized():
        return
    # Signals are heard by train/stop.py: JAX's own service swallows SIGTERM, and looks for it once a second.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_check_proxy_envs", False)
    meshes.spare_threads()
    beat = int(os.environ.get(HEARTBEAT, "60"))
    settings: dict[str, Any] = {"heartbeat_timeout_seconds": beat, "shutdown_timeout_seconds": beat}
    if ADDRESS in os.environ:
        count, index = _place()
        jax.distributed.initialize(os.environ[ADDRESS], count, index, cluster_detection_method="deactivate", **settings)
    else:
        with contextlib.suppress(ValueError, RuntimeError):  # no cluster around; or a program that uses JAX already
            jax.distributed.initialize(**settings)
    if jax.process_count() > 1:
        stop.agree(hosts.client(), jax.process_index(), jax.process_count())
        threading.Thread(target=_hear_of_failures, daemon=True).start()
        _explain_aborts()


def _place() -> tuple[int, int]:
    """How many processes there are, and which this is."""
    words = [os.environ.get(name, "") for name in (COUNT, INDEX)]
    if not all(word.isdecimal() for word in words) or not int(words[1]) < int(words[0]):
        raise ValueError(
            f"{ADDRESS} is set, and {COUNT} is {words[0]!r} and {INDEX} {words[1]!r}: give the number of processes, "
            "and to each its own, 0 to the one at that address"
        )
    return int(words[0]), int(words[1])


def _part(error: Exception) -> None:
    """Before this host leaves with an error: tell the others why, or find out which of them went first."""
    global _failing
    if any(word in str(error) for word in _LOST):
        time.sleep(_FAREWELL_SECONDS)  # whoever left had something better to say; `_hear_of_failures` repeats it
        stop.leave(_lost(" ".join(str(error).split())[:200]))
    _failing = True
    with contextlib.suppress(Exception):  # the coordinator itself may be gone
        sentence = f"{hosts.name()} failed: {type(error).__name__}: {' '.join(str(error).split())}"
        hosts.client().key_value_set(_FAILED, sentence, allow_overwrite=False)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while time.monotonic() < deadline:
            if len(hosts.client().key_value_dir_get(_HEARD)) >= jax.process_count() - 1:
                break
            time.sleep(0.05)


def _hear_of_failures() -> None:
    global _told
    try:
        sentence = hosts.client().blocking_key_value_get(_FAILED, 30 * 24 * 3600 * 1000)
    except Exception:  # the run is over
        return
    if not _failing:
        _told = f"{sentence}; this host leaves with it"
        with contextlib.suppress(Exception):
            hosts.client().key_value_set(f"{_HEARD}/{jax.process_index()}", "")
        time.sleep(0.2)
        stop.leave(_told, 1)


def _lost(why: str) -> str:
    return (
        f"{hosts.name()} lost touch with the others ({why}): one of them has ended; run the same command again on all "
        "hosts to go on from what was saved last"
    )


def _explain_aborts() -> None:
    """Have JAX's abort after a host's death end in a sentence and code 75: Python's own handlers do not run then.

    The abort comes from a thread of JAX's, so that calling back into Python from it is sound.
    """
    global _handler
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: _aborted())
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _handler)


_handler: Any = None


def _aborted() -> None:
    if _failing:
        os._exit(1)
    if _told:  # the host that failed was gone before this one
        stop.leave(_told, 1)
    stop.leave(_lost("a host is silent, or the coordinator is"))


def leave(code: int) -> None:
    """End this process as one of several: without waiting for the others, who may be gone."""
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
