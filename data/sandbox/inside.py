"""The first process in a sandbox: it forks the untrusted ones, fences them off, watches them, and reports to outside.

It is trusted and runs with the standard library alone. The untrusted processes are its children: other processes, of
another user where the sandbox was started by root, that cannot trace or signal it. What it reports goes through a pipe
that they do not have.
"""

import builtins
import contextlib
import json
import os
import select
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from . import answering, asking, fences

WATCH_SECONDS = 0.05  # between two looks at memory, disk and number of processes
KILL_SECONDS = 5.0
_NO_FILES: dict[str, Any] = {"files": {}, "workdir": "/", "writable": []}  # for the process of the tests


class Role(BaseException):
    """Raised in a fenced child: what it runs, once the frames of the watching process are left."""

    def __init__(self, run: Callable[[], object]):
        self.run = run


@dataclass
class Watched:
    """What is known of the untrusted processes: their output, and why they were ended, if they were."""

    limits: dict[str, Any]
    workdir: str
    output: dict[int, bytearray] = field(default_factory=dict)  # by descriptor
    children: dict[int, int] = field(default_factory=dict)  # process id -> exit code of those that have ended
    used: float = 0.0  # seconds of processor of the last that ended


def main(spec_descriptor: int, status: int, tests: int) -> None:
    """Do what the specification asks, and write a line of JSON about each part of it."""
    with os.fdopen(spec_descriptor, "rb") as file:
        spec = json.load(file)
    fences.adopt_orphans()
    fences.hide()
    try:
        for frame in _judged(spec, status, tests) if spec["tests"] else _cases(spec, status):
            answering.write(status, json.dumps(frame).encode() + b"\n")
    except Role as role:
        run = role.run
    else:
        os._exit(0)
    run()


def _cases(spec: dict[str, Any], status: int) -> Iterable[dict[str, Any]]:
    """Build the program if it has to be, then run it on each input: a frame each."""
    if spec["build"]:
        frame = _run(spec, status, "", lambda: _execute(spec["build"]))
        yield frame
        if frame["kind"] != "exited" or frame["code"] != 0:
            return
    for text in spec["inputs"]:
        frame = _run(spec, status, text, lambda: _execute(spec["run"]) if spec["run"] else _python(spec, "__main__"))
        yield frame
        if spec["until_failure"] and (frame["kind"] != "exited" or frame["code"] != 0):
            return


def _run(spec: dict[str, Any], status: int, text: str, program: Callable[[], object]) -> dict[str, Any]:
    output, errors = os.pipe(), os.pipe()
    entrance = _file_with(text.encode("utf-8", "replace"))
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(spec, (entrance, output[1], errors[1]), keep=(), user=spec["user"])
        raise Role(program)
    _close(entrance, output[1], errors[1])
    watched = Watched(spec["limits"], spec["workdir"], {output[0]: bytearray(), errors[0]: bytearray()})
    kind = _watch(watched, child, [child], status)
    seconds = time.monotonic() - began
    _close(output[0], errors[0])
    return _frame(kind, watched, child, seconds) | {
        "stdout": _text(watched.output[output[0]]),
        "stderr": _text(watched.output[errors[0]]),
    }


def _judged(spec: dict[str, Any], status: int, tests: int) -> Iterable[dict[str, Any]]:
    """Run the solution and its tests in two processes with pipes between them: one frame."""
    questions, answers, verdicts, errors = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    nothing = _file_with(b"")
    began = time.monotonic()
    solution = os.fork()
    if solution == 0:
        _become(spec, (nothing, errors[1], errors[1]), keep=(questions[0], answers[1]), user=spec["user"])
        raise Role(lambda: _answer(spec, questions[0], answers[1]))
    tester = os.fork()
    if tester == 0:
        kept = (answers[0], questions[1], verdicts[1], tests)
        _become(spec | _NO_FILES, (nothing, errors[1], errors[1]), keep=kept, user=spec["tests_user"])
        fences.hide()
        raise Role(lambda: _test(spec, answers[0], questions[1], verdicts[1], tests))
    _close(nothing, *questions, *answers, verdicts[1], errors[1], tests)
    watched = Watched(spec["limits"], spec["workdir"], {verdicts[0]: bytearray(), errors[0]: bytearray()})
    kind = _watch(watched, tester, [tester, solution], status)
    seconds = time.monotonic() - began
    yield _frame(kind, watched, tester, seconds) | {
        "verdicts": _verdicts(watched.output[verdicts[0]]),
        "stderr": _text(watched.output[errors[0]]),
    }


def _frame(kind: str, watched: Watched, child: int, seconds: float) -> dict[str, Any]:
    return {"kind": kind, "code": watched.children.get(child, 0), "seconds": round(seconds, 3)}


def _verdicts(data: bytearray) -> list[str]:
    return [json.loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]


def _text(data: bytearray) -> str:
    return data.decode("utf-8", "replace")


# Watching ----------------------------------------------------------------------------------------------------------


def _watch(watched: Watched, main_child: int, children: list[int], status: int) -> str:
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


# The untrusted side ------------------------------------------------------------------------------------------------


def _become(spec: dict[str, Any], standard: tuple[int, int, int], *, keep: tuple[int, ...], user: int | None) -> None:
    """Give up, in a forked child, everything that untrusted code must not have."""
    for target, descriptor in enumerate(standard):
        os.dup2(descriptor, target)
    first = 3
    for descriptor in sorted(keep):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, 1024)
    limits = spec["limits"]
    fences.limit(
        seconds=limits["cpu"],
        memory=limits["memory"] if limits["address_space"] else None,
        file_size=limits["disk"],
        processes=limits["nproc"],
        files=limits["files"],
    )
    if user is not None:
        fences.drop_user(user)
    os.chdir(spec["workdir"])
    for name, content in spec["files"].items():
        with open(name, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(content)
    if spec["landlock"]:
        fences.allow_files(readable=spec["readable"], writable=spec["writable"])
    if spec["seccomp"]:
        fences.filter_calls(signals=spec["signals"])


def _execute(argv: list[str]) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
        os._exit(127)


def _python(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Run Python code in this interpreter, as if it had just been started with it; the names that it made."""
    import _sitebuiltins  # exit() and quit(), which the site module would have made

    for word in ("exit", "quit"):
        setattr(builtins, word, _sitebuiltins.Quitter(word, "Ctrl-D"))
    for descriptor, stream, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        errors = "backslashreplace" if stream == "stderr" else "surrogateescape"
        opened = open(descriptor, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115 - kept open
        setattr(sys, stream, opened)
        setattr(sys, f"__{stream}__", opened)
    sys.argv[:] = [spec["file"]]
    sys.path[:] = [spec["workdir"], *sys.path, *spec["packages"]]
    module = types.ModuleType(name)
    module.__file__ = spec["file"]
    sys.modules[name] = module
    exec(compile(spec["files"][spec["file"]], spec["file"], "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _answer(spec: dict[str, Any], questions: int, answers: int) -> None:
    namespace = _python(spec, "solution")
    answering.serve(namespace, os.fdopen(questions, "rb"), answers)
    os._exit(0)  # whatever threads it started


def _test(spec: dict[str, Any], answers: int, questions: int, verdicts: int, tests: int) -> None:
    with os.fdopen(tests, "rb") as file:
        given = json.load(file)
    solution = asking.Solution(os.fdopen(answers, "rb"), questions, objects=given["objects"])
    for failure in asking.run_tests(solution, given["setup"], given["tests"], given["names"]):
        answering.write(verdicts, json.dumps(failure[:300]).encode() + b"\n")
    os._exit(0)


def _file_with(data: bytes) -> int:
    """A descriptor at the start of a file in memory with this content."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("input")
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    answering.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
