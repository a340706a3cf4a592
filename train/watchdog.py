"""A watchdog: a process in which nothing moves any more says where it is stuck and leaves, to be started again.

JAX notices hosts that died, and not those that hang.
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from ..sharding import hosts
from . import stop

FIRST, TIMES = 6, 20
"""Limits: this many times `seconds` until a stage's first step is done; then this often the longest pause so far."""

_KEY = "posttrain/stuck"


class Watchdog:
    """Leaves with code 75 when no `beat` comes for too long; on several hosts, all do, and say which was the first.

    The stacks of all threads are then in `folder`/host-N.txt.
    """

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self.folder, self.seconds, self.host, self.client = folder, seconds, hosts.name(), hosts.client()
        self.moved, self.phase, self.longest, self.warm = time.monotonic(), "start", 0.0, False
        self.ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()
        if self.client is not None:
            threading.Thread(target=self._listen, daemon=True).start()

    def beat(self, phase: str) -> None:
        """The main thread is alive, and about to do this."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self.moved) if self.warm else 0.0
        self.moved, self.phase = now, phase

    def limit(self) -> float:
        """Seconds that may pass now until the next beat."""
        return max(self.seconds, TIMES * self.longest) if self.warm else FIRST * self.seconds

    def _watch(self) -> None:
        while (quiet := time.monotonic() - self.moved) < self.limit():
            if self.ended.wait(min(1.0, self.seconds / 4)):
                return
        sentence = f"{self.host} is stuck: nothing has moved for {quiet:.0f} s, the last was {self.phase!r}"
        stop.say(f"{sentence}{self._dump()}")
        if self.client is not None:
            self.client.key_value_set(_KEY, sentence, allow_overwrite=False)
            time.sleep(1.0)  # so that the others hear of it before this process takes the connection with it
        os._exit(stop.RUN_AGAIN)

    def _listen(self) -> None:
        try:
            sentence = self.client.blocking_key_value_get(_KEY, 30 * 24 * 3600 * 1000)
        except Exception:  # the run is over
            return
        if not self.ended.is_set() and not sentence.startswith(self.host):
            stop.leave(f"{sentence}{self._dump()}")

    def _dump(self) -> str:
        """Write the stacks of all threads down; how a sentence goes on with where they are."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"host-{jax.process_index()}.txt"
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        return f"; this host's stacks are in {path}: run the same command again to go on"


_watchdog: Watchdog | None = None


@contextlib.contextmanager
def watching(folder: Path, *, seconds: float) -> Iterator[None]:
    """Watch this process inside; see `Watchdog`."""
    global _watchdog
    _watchdog = Watchdog(folder, seconds=seconds)
    try:
        yield
    finally:
        _watchdog.ended.set()
        _watchdog = None


def beat(phase: str, *, warm: bool | None = None) -> None:
    """Say that the main thread moves. `warm` says whether a stage's first step, which compiles, is behind it."""
    if _watchdog is not None:
        _watchdog.beat(phase)
        if warm is not None:
            _watchdog.warm = warm
