"""The first process in a sandbox: it forks the untrusted ones, fences them off, watches them, and reports to outside.

It is trusted and runs with the standard library alone, and with little of it: its start is what a run costs. The
untrusted processes are its children: other processes, of another user where the sandbox was started by root, that
cannot trace or signal it. What it reports goes through a pipe that they do not have.
"""

from __future__ import annotations

import builtins
import marshal
import os
import sys
import time
import types

from . import fences
from .pipes import write
from .watching import Watched, watch

TYPE_CHECKING = False  # importing typing and collections.abc for annotations would be a tenth of a sandbox's start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_AHEAD = ("bisect", "collections", "functools", "heapq", "itertools", "json", "math", "re", "string", "typing")
_NO_FILES: dict[str, Any] = {"files": {}, "workdir": "/", "writable": []}  # for the process of the tests


class Role(BaseException):
    """Raised in a fenced child: what it runs, once the frames of the watching process are left."""

    def __init__(self, run: Callable[[], object]):
        self.run = run


def main(spec_descriptor: int, status: int, tests: int) -> None:
    """Do what the specification asks, and write a frame about each part of it (see `_report`)."""
    with os.fdopen(spec_descriptor, "rb") as file:
        spec = marshal.load(file)
    fences.adopt_orphans()
    fences.hide()
    try:
        if spec["tests"]:
            _judge(spec, status, tests)
        else:
            _run_all(spec, status)
    except Role as role:
        run = role.run
    else:
        os._exit(0)
    run()
    _leave()


def _run_all(spec: dict[str, Any], status: int) -> None:
    """Build the program if it has to be, then run it on each input: a frame each."""
    if spec["build"] and not _run(spec, status, "", lambda: _execute(spec["build"])):
        return
    if len(spec["inputs"]) > 1 and not spec["run"]:
        for name in _AHEAD:  # once for all inputs what the program seems to import
            if name in spec["files"][spec["file"]]:
                __import__(name)
    for text in spec["inputs"]:
        done = _run(spec, status, text, lambda: _execute(spec["run"]) if spec["run"] else _python(spec, "__main__"))
        if spec["until_failure"] and not done:
            return


def _run(spec: dict[str, Any], status: int, text: str, program: Callable[[], object]) -> bool:
    """Run a program on an input and report; whether it succeeded."""
    output, errors = os.pipe(), os.pipe()
    entrance = _file_with(text.encode("utf-8", "replace"))
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(spec, (entrance, output[1], errors[1]), keep=(), user=spec["user"])
        raise Role(program)
    _close(entrance, output[1], errors[1])
    watched = Watched(spec["limits"], spec["workdir"], {output[0]: bytearray(), errors[0]: bytearray()})
    kind = watch(watched, child, [child], status)
    seconds = time.monotonic() - began
    _close(output[0], errors[0])
    code = watched.children.get(child, 0)
    _report(status, kind, code, seconds, watched.output[output[0]], watched.output[errors[0]])
    return kind == "exited" and code == 0


def _judge(spec: dict[str, Any], status: int, tests: int) -> None:
    """Run the solution and its tests in two processes with pipes between them: one frame."""
    from . import answering, asking  # noqa: F401 - loaded here, while files can be read, and only where tests are run

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
    kind = watch(watched, tester, [tester, solution], status)
    seconds = time.monotonic() - began
    code = watched.children.get(tester, 0)
    _report(status, kind, code, seconds, watched.output[verdicts[0]], watched.output[errors[0]])


def _report(status: int, kind: str, code: int, seconds: float, *written: bytearray) -> None:
    """A frame: a line with how a run ended and the sizes of what was written, then what was written."""
    sizes = " ".join(str(len(data)) for data in written)
    write(status, f"{kind} {code} {seconds:.3f} {sizes}\n".encode() + b"".join(written))


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
    import signal

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


def _leave() -> None:
    """End as an interpreter does after a program that came to its end, but leave memory to the kernel.

    Waits for threads, calls exit functions, writes out what was printed, lets go of the program's own objects. To take
    every module apart costs a forked process as much again as all the rest.
    """
    import atexit

    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    written = _flush()
    names = sys.modules["__main__"].__dict__
    while names:
        names.popitem()  # the last first, so that what an object's end needs is there
    os._exit(0 if _flush() and written else 120)  # as Python does where what was printed cannot be written


def _flush() -> bool:
    """Whether all that was printed could be written."""
    try:
        for stream in (sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__):
            if stream is not None and not stream.closed:
                stream.flush()
    except Exception:
        return False
    return True


def _answer(spec: dict[str, Any], questions: int, answers: int) -> None:
    from . import answering

    namespace = _python(spec, "solution")
    answering.serve(namespace, os.fdopen(questions, "rb"), answers)
    os._exit(0)  # whatever threads it started


def _test(spec: dict[str, Any], answers: int, questions: int, verdicts: int, tests: int) -> None:
    import json

    from . import asking

    with os.fdopen(tests, "rb") as file:
        given = json.load(file)
    solution = asking.Solution(os.fdopen(answers, "rb"), questions, objects=given["objects"])
    for failure in asking.run_tests(solution, given["setup"], given["tests"], given["names"]):
        write(verdicts, json.dumps(failure[:300]).encode() + b"\n")
    os._exit(0)


def _file_with(data: bytes) -> int:
    """A descriptor at the start of a file in memory with this content."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("input")
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
