"""Judges responses in worker processes that can be killed: a verifier may hang, raise or exit, and training goes on."""

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ..task import Task, Verdict
from . import worker

START_SECONDS = 120.0  # a worker's start, and the imports that its first tasks need
CHUNK = 64  # the most items in one message
ENVIRONMENT = {  # of the workers: nothing of the trainer's (it may hold keys), and the same string hashes every time
    "PATH": os.defpath,
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
BOOT = "import sys; sys.path[:] = sys.argv.pop().splitlines(); import {module}; sys.modules['{module}'].main()"


class Reply(NamedTuple):
    """A worker's line: kind is ready, loaded, ok, error or memory; timeout and died are added on this side."""

    kind: str
    score: float
    reason: str


class VerifierPool:
    """Persistent worker processes that judge (task, response) pairs, each pair with its own wall clock.

    with VerifierPool(workers=4) as pool:
        verdicts = pool.judge(tasks, responses)

    A verifier that raises, returns no valid Verdict, exceeds `timeout` seconds or `memory_mib`, or ends its process
    gives Verdict(0.0, reason) and is counted in `counts` under "error", "timeout", "memory" or "died"; "judged"
    counts everything. Workers are new interpreters (never forks: JAX is multithreaded), know the same import path,
    and have none of the parent's environment; they die with the parent, however it ends. Verifiers and tasks must be
    importable from a module; those of a script's own `__main__` are refused.
    """

    def __init__(self, workers: int = 1, timeout: float = 10.0, *, memory_mib: int = 4096):
        if workers < 1 or timeout <= 0 or memory_mib < 256:
            raise ValueError(
                f"VerifierPool(workers={workers}, timeout={timeout}, memory_mib={memory_mib}): "
                "give at least 1 worker, a positive timeout in seconds and at least 256 MiB"
            )
        self.counts: Counter[str] = Counter()
        self._timeout = timeout
        self._num_workers = workers
        self._memory_bytes = memory_mib * 2**20
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def __enter__(self) -> "VerifierPool":
        self._workers = [_Worker(self._memory_bytes) for _ in range(self._num_workers)]
        for each in self._workers:
            each.wait_until_ready()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; the pool cannot judge until it is entered again."""
        for each in self._workers:
            each.kill()
        self._workers = []

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [each.pid for each in self._workers]

    def judge(self, tasks: Sequence[Task], responses: Sequence[str]) -> list[Verdict]:
        """One verdict per pair, in order. Takes at most `timeout` seconds per pair, over the number of workers."""
        if len(tasks) != len(responses):
            raise ValueError(f"judge() needs one response per task, got {len(tasks)} tasks, {len(responses)} responses")
        if not self._workers:
            raise RuntimeError("the VerifierPool is not running: use it as `with VerifierPool(...) as pool:`")
        items = [_pickled(task, response) for task, response in zip(tasks, responses, strict=True)]
        size = max(1, min(CHUNK, -(-len(items) // (4 * self._num_workers))))
        starts = iter(range(0, len(items), size))
        replies: list[Reply] = [Reply("died", 0.0, "")] * len(items)
        starts_lock = threading.Lock()

        def drain(slot: int) -> None:
            while True:
                with starts_lock:
                    start = next(starts, None)
                if start is None:
                    return
                replies[start : start + size] = self._judge_chunk(slot, items[start : start + size])

        with self._lock:
            if self._num_workers == 1:
                drain(0)
            else:
                with ThreadPoolExecutor(self._num_workers) as threads:
                    list(threads.map(drain, range(self._num_workers)))
            self.counts.update(reply.kind for reply in replies if reply.kind != "ok")
            self.counts["judged"] += len(replies)
        return [Verdict(reply.score, reply.reason) for reply in replies]

    def _judge_chunk(self, slot: int, items: list[bytes]) -> list[Reply]:
        """Replies to all items, through as many workers as it takes."""
        done: list[Reply] = []
        idle_deaths = 0  # workers in a row that ended before they had loaded the items: no single item is to blame
        while len(done) < len(items):
            replies, healthy = self._attempt(slot, items[len(done) :])
            done += replies
            if not healthy:
                self._workers[slot].kill()
                self._workers[slot] = _Worker(self._memory_bytes)
            idle_deaths = 0 if replies else idle_deaths + 1
            if idle_deaths == 3:
                reason = "died: three workers in a row ended before they could load the tasks"
                done += [Reply("died", 0.0, reason)] * (len(items) - len(done))
        return done

    def _attempt(self, slot: int, items: list[bytes]) -> tuple[list[Reply], bool]:
        """Replies up to the first item that costs the worker its life, and whether the worker can be used again."""
        current = self._workers[slot]
        replies: list[Reply] = []
        loaded = False
        try:
            current.wait_until_ready()
            current.send(items, START_SECONDS)
            current.receive(START_SECONDS)
            loaded = True
            while len(replies) < len(items):
                reply = current.receive(self._timeout)
                replies.append(reply)
                if reply.kind == "memory":  # what filled the memory may still be there
                    return replies, False
            return replies, True
        except TimeoutError:
            failure = Reply("timeout", 0.0, f"timeout: no verdict within {self._timeout:g} s")
        except (EOFError, ConnectionError):
            failure = Reply("died", 0.0, f"died: the worker ended with exit code {current.kill()}")
        except BaseException:  # Ctrl-C: late replies must not answer the next call
            current.kill()
            raise
        return ([*replies, failure] if loaded else []), False


def _pickled(task: Task, response: str) -> bytes:
    """The pair as bytes; a TypeError where a worker process could not import the verifier."""
    if task.verifier.__module__ == "__main__":
        raise TypeError(
            f"the verifier {task.verifier!r} is defined in the script that is running, which worker processes cannot "
            "import: move it to a module"
        )
    try:
        return pickle.dumps((task, response), protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"task {task.id} cannot be sent to a worker process ({error}): its verifier must be a class or function "
            "at the top of a module, its metadata plain data"
        ) from error


class _Worker:
    """One worker process, spoken to through pipes with deadlines."""

    def __init__(self, memory_bytes: int):
        lifeline, self._lifeline = os.pipe()
        path = "\n".join(os.path.abspath(entry) for entry in sys.path)
        boot = BOOT.format(module=worker.__name__)
        self._ready = False
        self._exit_code: int | None = None
        self._buffer = b""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", boot, str(lifeline), str(memory_bytes), path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                pass_fds=(lifeline,),
                env=ENVIRONMENT,
                start_new_session=True,
            )
        finally:
            os.close(lifeline)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        if not self._ready:
            self.receive(START_SECONDS)
            self._ready = True

    def send(self, items: list[bytes], seconds: float) -> None:
        payload = pickle.dumps(items)
        view = memoryview(len(payload).to_bytes(8, "big") + payload)
        deadline = time.monotonic() + seconds
        while view:
            _wait(self._stdin.fileno(), select.POLLOUT, deadline)
            view = view[os.write(self._stdin.fileno(), view) :]

    def receive(self, seconds: float) -> Reply:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            _wait(self._stdout.fileno(), select.POLLIN, deadline)
            data = os.read(self._stdout.fileno(), 65536)
            if not data:
                raise EOFError("the worker closed its pipe")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            return Reply(*json.loads(line))
        except (ValueError, TypeError) as error:
            raise ConnectionError(f"the worker wrote {line[:80]!r}, which is no reply") from error

    def kill(self) -> int:
        """End the worker and whatever it started; its exit code, which is its own where it had already ended."""
        if self._exit_code is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._exit_code = self._process.wait()
            self._stdin.close()
            self._stdout.close()
            os.close(self._lifeline)
        return self._exit_code


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Return when the descriptor can be read or written; a TimeoutError at the deadline."""
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
