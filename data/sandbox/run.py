"""Run model-written code in a sandbox: programs on inputs, or a solution under tests that it cannot see."""

import contextlib
import dataclasses
import itertools
import json
import marshal
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

from .level import Level, SandboxError, boot, bubblewrap, interpreter, machine, readable, require, user

Kind = Literal["exited", "timeout", "memory", "disk", "processes", "output", "lost"]
START_SECONDS = 30.0  # for a sandbox to begin, on a machine that is busy
END_SECONDS = 6.0  # for its first process to end the others
_MIB = 1 << 20
_turns = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What code may use, all its processes together unless said otherwise."""

    seconds: float = 10.0  # of the clock, per input
    cpu_seconds: int = 10  # of a processor, per process
    memory: int = 1024 * _MIB  # bytes; also the address space of each process
    disk: int = 64 * _MIB  # bytes of files
    processes: int = 16  # threads count
    output: int = 1 * _MIB  # bytes of standard output, and of standard error
    files: int = 64  # open at once, per process

    def __post_init__(self):
        wrong = [f"{name}={value}" for name, value in dataclasses.asdict(self).items() if value <= 0]
        if wrong:
            raise ValueError(f"limits must be above 0, got {', '.join(wrong)}")


@dataclass(frozen=True, kw_only=True)
class Program:
    """Code to run: Python in the sandbox's interpreter, or a program in another language with its command."""

    source: str
    file: str = "main.py"
    build: tuple[str, ...] = ()  # a command that makes it runnable, such as a compiler's
    run: tuple[str, ...] = ()  # none for Python
    address_space: bool = True  # False for runtimes that reserve far more than they use: then only what is used counts


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended, told by the process that watched it. "lost": the watcher was ended, or the sandbox was."""

    kind: Kind
    code: int = 0  # of the exit; negative for a signal
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0

    @property
    def succeeded(self) -> bool:
        """Whether it ended by itself, with exit code 0."""
        return self.kind == "exited" and self.code == 0

    def describe(self) -> str:
        """What happened, in a few words."""
        if self.kind != "exited":
            ends = {"timeout": "ran out of time", "lost": "ended its sandbox", "processes": "started too many others"}
            return ends.get(self.kind, f"used too much {self.kind}")
        last = self.stderr.strip().splitlines()[-1:] if self.code else []
        return f"exit code {self.code}{': ' if last else ''}{''.join(last)[:200]}"


class Frame(NamedTuple):
    """What the watching process reports of a run: how it ended, and two texts that were written, errors the second."""

    kind: Kind
    code: int
    seconds: float
    written: list[bytes]

    def outcome(self, stdout: str = "") -> Outcome:
        """The outcome, with an output of this text."""
        return Outcome(
            kind=self.kind, code=self.code, stdout=stdout, stderr=_text(self.written[1]), seconds=self.seconds
        )


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """A way to run model-written code: what it may use, and the least that must stand between it and the machine.

    Every call of `run` or `test` is a sandbox of its own, gone afterwards with all its processes and files.
    `packages` are folders of Python packages that code may import and read.

    Raises:
        SandboxError: from a run, where the machine does not reach `required`, or the sandbox does not start.
    """

    required: Level = Level.BUBBLEWRAP
    limits: Limits = field(default_factory=Limits)
    packages: tuple[str, ...] = ()
    level: Level | None = None  # to run at a lower level than the machine reaches, as tests of that level do

    def __post_init__(self):
        if self.level is not None and self.level < self.required:
            raise ValueError(f"level {self.level.name} was asked for, and {self.required.name} is required")

    def run(self, program: Program, inputs: Sequence[str] = ("",), *, until_failure: bool = False) -> list[Outcome]:
        """Run a program on each input in turn, in a new process each time: an outcome each.

        Where the program cannot be built, every outcome is that of the build. With `until_failure` the first outcome
        that is no success is the last.
        """
        frames, lost = self._start(program, inputs, None, until_failure=until_failure)
        outcomes = [frame.outcome(stdout=_text(frame.written[0])) for frame in frames]
        if program.build and outcomes:
            built, *outcomes = outcomes
            if not built.succeeded:
                return [built] * len(inputs)
        if until_failure and outcomes and not outcomes[-1].succeeded:
            return outcomes
        return (outcomes + [lost] * len(inputs))[: len(inputs)]

    def test(
        self, solution: str, tests: Sequence[str], *, setup: str = "", names: Sequence[str] | None = None,
        objects: bool = False,
    ) -> tuple[list[str], Outcome]:  # fmt: skip
        """Run Python unit tests against a solution in another process: what failed of each test, and the outcome.

        The empty text stands for a test that passed. Tests are code with assertions that uses the solution's names;
        `names`, `objects` and `setup` as in `asking.run_tests`.
        """
        listed = None if names is None else list(names)
        given = {"setup": setup, "tests": list(tests), "names": listed, "objects": objects}
        frames, outcome = self._start(Program(source=solution), (), given)
        failures: list[str] = []
        for frame in frames:
            lines = frame.written[0].splitlines(keepends=True)
            failures = [json.loads(line) for line in lines if line.endswith(b"\n")]
            outcome = frame.outcome()
        failures += [f"no verdict: {outcome.describe()}"] * (len(tests) - len(failures))
        return failures[: len(tests)], outcome

    def _start(
        self, program: Program, inputs: Sequence[str], tests: dict | None, *, until_failure: bool = False
    ) -> tuple[list[Frame], Outcome]:
        """The frames that came, and the outcome for those that did not."""
        level = machine().level if self.level is None else self.level
        require(max(self.required, level))
        number = 2 * (os.getpid() * 7 + next(_turns))
        users = (user(number), user(number + 1)) if machine().is_root else (None, None)
        num_runs = len(inputs) + bool(program.build) + bool(tests)
        with _workdir(level, users[0]) as workdir, tempfile.TemporaryFile() as errors:
            spec = self._spec(program, level, workdir) | {
                "inputs": list(map(str, inputs)), "until_failure": until_failure, "tests": bool(tests),
                "user": users[0], "tests_user": users[1],
            }  # fmt: skip
            seconds = START_SECONDS + num_runs * (self.limits.seconds + 2)
            most = num_runs * 3 * (self.limits.output + 65536)
            with _file(marshal.dumps(spec, 4)) as given, _file(json.dumps(tests).encode()) as hidden:
                command, variables = self._command(level, _variables(workdir))
                files = (given.fileno(), hidden.fileno())
                taken = _taken(command, variables, files, errors, seconds=seconds, most=most)
            errors.seek(0)
            said = errors.read(2000).decode("utf-8", "replace").strip()
        frames = _frames(taken)
        if not frames and said:
            raise SandboxError(f"the sandbox did not start: {said}")
        return frames, Outcome(kind="lost", stderr=said)

    def _command(self, level: Level, variables: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """What starts the sandbox, with which environment; the descriptors of its files follow."""
        python = interpreter(level)
        if level is not Level.BUBBLEWRAP:
            return boot(python, level), variables
        walled = bubblewrap(python, disk=self.limits.disk, readable=self.packages, variables=variables)
        return [*walled, *boot(python, level)], {}

    def _spec(self, program: Program, level: Level, workdir: str) -> dict[str, Any]:
        """What the process inside has to know, but for what is to be run on."""
        found, limits = machine(), self.limits
        return {
            "files": {program.file: str(program.source)}, "file": program.file,
            "run": program.run, "build": program.build,
            "workdir": workdir, "packages": self.packages,
            "landlock": level >= Level.LANDLOCK and found.landlock > 0,
            "seccomp": found.seccomp,
            "signals": found.is_root or level is Level.BUBBLEWRAP or (found.landlock >= 6 and level is Level.LANDLOCK),
            "readable": readable(interpreter(level), level, self.packages),
            "writable": [workdir, "/dev/null", *(["/dev/shm"] if level is Level.BUBBLEWRAP else [])],
            "limits": {
                "wall": limits.seconds, "cpu": limits.cpu_seconds, "memory": limits.memory, "disk": limits.disk,
                "processes": limits.processes, "output": limits.output, "files": limits.files,
                "address_space": program.address_space, "nproc": limits.processes + _others(level),
            },
        }  # fmt: skip


def _frames(data: bytes) -> list[Frame]:
    """The frames that came whole: a line with kind, exit code, seconds and sizes, then bytes of these sizes."""
    frames: list[Frame] = []
    place = 0
    while (end := data.find(b"\n", place)) >= 0:
        kind, code, seconds, *sizes = data[place:end].split()
        place, written = end + 1, list[bytes]()
        for size in map(int, sizes):
            written.append(data[place : place + size])
            place += size
        if place <= len(data):
            frames.append(Frame(cast(Kind, kind.decode()), int(code), float(seconds), written))
    return frames


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _others(level: Level) -> int:
    """Processes that the kernel counts with those in a sandbox: its limit is one per user and user namespace."""
    if machine().is_root:
        return 0
    if level is Level.BUBBLEWRAP:
        return 4
    mine = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == os.getuid():
                mine += len(os.listdir(process / "task"))
    return mine + 4


def _variables(workdir: str) -> dict[str, str]:
    """The environment inside; with the same string hashes every time, a program gives the same output every time."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": workdir, "TMPDIR": workdir,
        "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip


@contextlib.contextmanager
def _workdir(level: Level, owner: int | None) -> Iterator[str]:
    """The folder that code may write to: in memory, seen by nobody else, where there is a mount namespace."""
    if level is Level.BUBBLEWRAP:
        yield "/tmp"
        return
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        if owner is not None:
            os.chown(folder, owner, owner)
        yield folder


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[IO[bytes]]:
    """A file without a name."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        yield file


def _taken(
    command: list[str], variables: dict[str, str], files: tuple[int, int], errors: IO[bytes], *, seconds: float,
    most: int,
) -> bytes:  # fmt: skip
    """Start the first process of a sandbox and take what it writes, until it ends."""
    incoming, outgoing = os.pipe()
    try:
        descriptors = [str(files[0]), str(outgoing), str(files[1])]
        process = subprocess.Popen(
            [*command, *descriptors], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            pass_fds=(*files, outgoing), env=variables, cwd="/", start_new_session=True,
        )  # fmt: skip
    except BaseException:
        os.close(incoming)
        raise
    finally:
        os.close(outgoing)
    try:
        return _take(incoming, time.monotonic() + seconds, most)
    finally:
        os.close(incoming)  # a watcher that still runs ends everything now
        _end(process)


def _take(descriptor: int, deadline: float, most: int) -> bytes:
    """What comes through a pipe until its end, a deadline, or a size."""
    taken = bytearray()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while len(taken) <= most and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        data = os.read(descriptor, 1 << 20)
        if not data:
            break
        taken += data
    return bytes(taken)


def _end(process: subprocess.Popen) -> None:
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
