"""Watches the untrusted processes of a sandbox: takes their output, ends them at a limit, and leaves none behind.

What the kernel limits is per process or per user; what is watched here is what all of them use together.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

WATCH_SECONDS = 0.05  # between two looks at memory, disk and number of processes
KILL_SECONDS = 5.0


@dataclass
class Watched:
    """What is known of the untrusted processes: their output, and why they were ended, if they were."""

    limits: dict[str, Any]
    workdir: str
    output: dict[int, bytearray] = field(default_factory=dict)  # by descriptor
    children: dict[int, int] = field(default_factory=dict)  # process id -> exit code of those that have ended
    used: float = 0.0  # seconds of processor of the last that ended


def watch(watched: Watched, main_child: int, children: list[int], status: int) -> str:
    """Wait until the main child ends or breaks a limit, then end all of them; why it is over."""
    poll = select.poll()
    for descriptor in watched.output:
        os.set_blocking(descriptor, False)
        poll.register(descriptor, select.POLLIN)
    poll.register(status, 0)  # hangs up when nobody outside waits any more
    exits = _exit_descriptor(main_child)
    if exits is not None:
        poll.register(exits, select.POLLIN)
    began = time.monotonic()
    look = began + WATCH_SECONDS
    kind = ""
    while not kind:
        patience = WATCH_SECONDS if exits is not None else 0.005
        for descriptor, event in poll.poll(patience * 1000):
            if descriptor == status:
                _kill_all(watched)
                os._exit(1)
            if descriptor in watched.output and not _drain(watched, descriptor) and event & select.POLLHUP:
                poll.unregister(descriptor)
        now = time.monotonic()
        if max(map(len, watched.output.values())) > watched.limits["output"]:
            kind = "output"
        elif _reap(watched, main_child):
            kind = "exited"
        elif now - began > watched.limits["wall"]:
            kind = "timeout"
        elif now > look:
            kind, look = _excess(watched), now + WATCH_SECONDS
    _kill_all(watched, children)
    for descriptor in watched.output:
        _drain(watched, descriptor)
        del watched.output[descriptor][watched.limits["output"] :]
    if exits is not None:
        os.close(exits)
    return _cause(kind, watched, main_child)


def _cause(kind: str, watched: Watched, child: int) -> str:
    """The kernel ends a process over its processor time with SIGKILL or SIGXCPU: that is a time-out, too."""
    code = watched.children.get(child, 0)
    if kind == "exited" and code in (-signal.SIGKILL, -signal.SIGXCPU) and watched.used >= watched.limits["cpu"] - 0.1:
        return "timeout"
    return kind


def _exit_descriptor(child: int) -> int | None:
    try:
        return os.pidfd_open(child)
    except (AttributeError, OSError):
        return None


def _drain(watched: Watched, descriptor: int) -> bool:
    """Take what a pipe holds, up to a little over the limit; whether there was something."""
    taken = watched.output[descriptor]
    found = False
    while len(taken) <= watched.limits["output"]:
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return True
        if not data:
            return found
        taken += data
        found = True
    return found


def _reap(watched: Watched, wanted: int) -> bool:
    """Collect the processes that have ended; whether the wanted one has."""
    while True:
        try:
            child, state, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return wanted in watched.children
        if child == 0:
            return wanted in watched.children
        watched.children[child] = os.waitstatus_to_exitcode(state)
        if child == wanted:
            watched.used = usage.ru_utime + usage.ru_stime


def _excess(watched: Watched) -> str:
    """The limit that all the processes together are over: memory, processes, disk; empty where none."""
    below = descendants(os.getpid())
    if len(below) > watched.limits["processes"] + 2:
        return "processes"
    if sum(map(_resident, below)) > watched.limits["memory"]:
        return "memory"
    return "disk" if _stored(watched.workdir) > watched.limits["disk"] else ""


def _kill_all(watched: Watched, children: Iterable[int] = ()) -> None:
    """End every process below this one, those whose parents have ended included."""
    deadline = time.monotonic() + KILL_SECONDS
    _reap(watched, 0)
    while time.monotonic() < deadline:
        living = descendants(os.getpid()) or [child for child in children if child not in watched.children]
        if not living:
            return
        for process in living:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        _reap(watched, 0)


def descendants(process: int) -> list[int]:
    """The processes below a process, zombies included; empty where there is no /proc."""
    found: list[int] = []
    waiting = [process]
    while waiting:
        current = waiting.pop()
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{current}/task"):
                with open(f"/proc/{current}/task/{thread}/children", encoding="ascii") as file:
                    below = [int(child) for child in file.read().split()]
                found += below
                waiting += below
    return found


def _resident(process: int) -> int:
    """Bytes of memory that only a process has, roughly: its resident pages but those shared with files."""
    try:
        with open(f"/proc/{process}/statm", encoding="ascii") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _stored(folder: str) -> int:
    """Bytes of the files below a folder; what cannot be read counts nothing, as it was made unreadable by its owner."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total
