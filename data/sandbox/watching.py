"""Watches the untrusted processes of a sandbox: takes their output, ends them at a limit, and leaves none behind.

What the kernel limits is per process or per user; what is watched here is what all of them use together.
"""

from __future__ import annotations

import os
import select
import time

TYPE_CHECKING = False  # importing typing and collections.abc for annotations would be a tenth of a sandbox's start
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

SIGKILL, SIGXCPU = 9, 24  # the signal module makes enumerations, which takes longer than its use
WATCH_SECONDS = 0.05  # between two looks at memory, disk and number of processes
KILL_SECONDS = 5.0


class Watched:
    """What is known of the untrusted processes: their output by descriptor, and how those ended that have."""

    def __init__(self, limits: dict[str, Any], workdir: str, output: dict[int, bytearray]):
        self.limits, self.workdir, self.output = limits, workdir, output
        self.children: dict[int, int] = {}  # process id -> exit code
        self.used = 0.0  # seconds of processor of the wanted one


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
    if kind == "exited" and code in (-SIGKILL, -SIGXCPU) and watched.used >= watched.limits["cpu"] - 0.1:
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
            _kill(process)
        _reap(watched, 0)


def _kill(process: int) -> None:
    try:
        os.kill(process, SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def descendants(process: int) -> list[int]:
    """The processes below a process, zombies included; empty where there is no /proc."""
    found: list[int] = []
    waiting = [process]
    while waiting:
        below = _children(waiting.pop())
        found += below
        waiting += below
    return found


def _children(process: int) -> list[int]:
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
    except OSError:
        return found
    return found


def _resident(process: int) -> int:
    """Bytes of a process's resident memory but for files; what processes share counts for each of them."""
    try:
        with open(f"/proc/{process}/status", encoding="utf-8", errors="replace") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith(("RssAnon:", "RssShmem:")))
    except OSError:
        return 0


def _stored(folder: str) -> int:
    """Bytes of the files below a folder; what cannot be read counts nothing, as it was made unreadable by its owner."""
    return sum(_size(os.path.join(path, name)) for path, _, names in os.walk(folder) for name in names)


def _size(file: str) -> int:
    try:
        return os.lstat(file).st_blocks * 512
    except OSError:
        return 0
