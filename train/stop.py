"""Stopping where nothing is lost: a signal to any host stops all of them at the same place, saved.

Every host passes the same checks in the same order (`check_stop`: before an iteration, between the answers of a
rollout). The host that is asked to stop tells the others; each says how many checks it has passed and passes none while
they are compared; all stop at the first check that none has passed.
"""

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

RUN_AGAIN = 75
"""Exit code of a run that was stopped with everything saved (EX_TEMPFAIL): the same command goes on."""

LOSSLESS_SECONDS = 2.0
"""How long a process that has done nothing yet (it compiles, say) still looks for a place to stop at."""

_KEY = "posttrain/stop"
_ANSWER_SECONDS = 60


class Interrupted(Exception):
    """A signal asked the run to stop; what was reached is on disk."""


class _Agreement:
    """The check at which all hosts stop. Threads of its own answer the others, whatever the main thread is doing."""

    def __init__(self, client: Any, index: int, count: int) -> None:
        self.client, self.index, self.count = client, index, count
        self.lock = threading.Lock()
        self.checks = 0
        self.last: int | None = None
        self.known = threading.Event()
        for work in (self._tell, self._listen):
            threading.Thread(target=work, daemon=True).start()

    def passes(self) -> bool:
        """Whether the main thread may go on past this check."""
        if _asked.is_set():
            self.known.wait(_ANSWER_SECONDS)
        with self.lock:
            self.checks += 1
            return self.last is None or self.checks < self.last

    def _tell(self) -> None:
        _asked.wait()
        self.client.key_value_set(_KEY, "", allow_overwrite=True)

    def _listen(self) -> None:
        while not self.known.is_set():
            try:
                self.client.blocking_key_value_get(_KEY, 24 * 3600 * 1000)
            except Exception as error:  # JAX raises what it likes here
                if "DEADLINE_EXCEEDED" not in str(error):
                    return  # the run is over
                continue
            with self.lock:
                self.last = self._compare()
            _asked.set()
            self.known.set()

    def _compare(self) -> int:
        self.client.key_value_set(f"{_KEY}/{self.index}", str(self.checks))
        places = [f"{_KEY}/{index}" for index in range(self.count)]
        try:
            passed = [self.client.blocking_key_value_get(place, _ANSWER_SECONDS * 1000) for place in places]
        except Exception as error:
            leave(f"asked to stop, but another host does not answer ({error}): run the same command again")
            raise
        return max(map(int, passed)) + 1


_asked = threading.Event()
_reached = threading.Event()
_signals = 0
_agreement: _Agreement | None = None
_lossless = True


def agree(client: Any, index: int, count: int) -> None:
    """From now on, stop together with the other hosts of `jax.distributed`, of which this is one."""
    global _agreement
    _agreement = _Agreement(client, index, count)


@contextlib.contextmanager
def listening(grace: float) -> Iterator[None]:
    """Inside, SIGTERM and SIGINT ask to stop, also while the main thread compiles or waits for a device.

    Args:
        grace: seconds that SIGTERM leaves. A process that reaches no place to stop at in that time leaves with what was
            saved last; one that has done nothing since leaves within seconds, whatever the signal.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python runs a handler only between instructions of the main thread; the byte in this pipe comes at once.
    pipe = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=_hear, args=(reader, grace), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        thread.join()
        os.close(reader)


def request_stop(number: int, _frame: object) -> None:
    """Signal handler: stop at the next safe place. A second Ctrl-C stops at once."""
    global _signals
    _signals += number == signal.SIGINT
    if _signals > 1 and number == signal.SIGINT:
        raise KeyboardInterrupt
    _asked.set()


def check_stop() -> None:
    """Raise `Interrupted` if a signal has come. For long work inside an iteration that may be thrown away."""
    if not _asked.is_set() if _agreement is None else _agreement.passes():
        return
    _reached.set()
    raise Interrupted


def is_asked() -> bool:
    """Whether a signal has come, to this host or another."""
    return _asked.is_set()


def set_lossless(value: bool) -> None:
    """Say whether all that this process has done is on disk (or was nothing)."""
    global _lossless
    _lossless = value


def leave(sentence: str, code: int = RUN_AGAIN) -> None:
    """End this process at once, whatever its threads wait for, with a sentence on stderr."""
    say(sentence)
    os._exit(code)


def leave_after(work: Callable[[], None]) -> None:
    """Do the work of this process and end it as Python would, but for not taking the interpreter apart.

    The exit code is that of a `SystemExit`; 1, after a traceback, for any other error; else 0. Threads of JAX's and
    tensorstore's outlive the work: one that comes back to Python while the interpreter is taken apart is ended by it,
    which C++ answers with an abort. A run that is done would seem to have failed, and one that has failed would not say
    so. For their sake JAX's devices are not taken apart either; every other exit function is called.
    """
    code: Any = 0
    try:
        work()
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    if jax := sys.modules.get("jax._src.api"):  # no public way to keep the devices
        atexit.unregister(jax.clean_up)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def say(sentence: str) -> None:
    """Write a sentence to stderr, past Python's buffers and locks."""
    os.write(2, f"posttrain: {sentence}\n".encode())


def _hear(reader: int, grace: float) -> None:
    """Wait for signals; once asked to stop, see to it that the process does not stay for ever."""
    asked, hurried = None, False
    while True:
        if select.select([reader], [], [], 0.2)[0]:
            heard = os.read(reader, 64)
            if not heard:  # closed: the run has ended
                return
            hurried |= signal.SIGTERM in heard
            if {signal.SIGTERM, signal.SIGINT} & set(heard):
                _asked.set()
        if _asked.is_set() and not _reached.is_set():
            asked = asked or time.monotonic()
            passed = time.monotonic() - asked
            if (_lossless and passed > min(LOSSLESS_SECONDS, grace)) or (hurried and passed > grace):
                leave("stopped in the middle of a step: run the same command again to go on from what was saved last")
