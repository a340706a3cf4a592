"""The first process in a sandbox: it forks the untrusted ones, fences them off, watches them, and reports to outside.

It is trusted and runs with the standard library alone. The untrusted processes are its children: other processes, of
another user where the sandbox was started by root, that cannot trace or signal it. What it reports goes through a pipe
that they do not have.
"""

import builtins
import json
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable
from typing import Any

from . import answering, asking, fences
from .watching import Watched, watch

_NO_FILES: dict[str, Any] = {"files": {}, "workdir": "/", "writable": []}  # for the process of the tests


class Role(BaseException):
    """Raised in a fenced child: what it runs, once the frames of the watching process are left."""

    def __init__(self, run: Callable[[], object]):
        self.run = run


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
    kind = watch(watched, child, [child], status)
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
    kind = watch(watched, tester, [tester, solution], status)
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
