"""Attacks that a sandbox must withstand, each run for real: the tests of the sandbox, and a check of any machine.

An attack is tried from inside and judged from outside: by a file that must not be there, a process that must still
live or must not, a test that must fail.
"""

import contextlib
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from .level import Level
from .run import Limits, Outcome, Program, Sandbox

LIMITS = Limits(seconds=10.0, cpu_seconds=10, memory=256 << 20, disk=8 << 20, processes=8, output=1 << 16)
METADATA = "169.254.169.254"  # where cloud machines hand out credentials


class Finding(NamedTuple):
    """Whether an attack was withstood."""

    name: str
    held: bool
    detail: str
    needed: Level  # from this level on it has to be


@dataclass(frozen=True)
class Probe:
    """An attack: `attempt` tries it in a sandbox and says what got through; the empty text where nothing did."""

    name: str
    attempt: Callable[[Sandbox], str]
    needed: Level = Level.PLAIN


def check(sandbox: Sandbox) -> list[Finding]:
    """Try every attack in a sandbox of this kind, under small limits."""
    small = replace(sandbox, limits=LIMITS)
    findings = []
    for probe in probes():
        got_through = probe.attempt(small)
        findings.append(Finding(probe.name, not got_through, got_through, probe.needed))
    return findings


def got_through(findings: Sequence[Finding], level: Level) -> list[Finding]:
    """The attacks that a sandbox of this level should have withstood and did not."""
    return [one for one in findings if not one.held and one.needed <= level]


def probes() -> tuple[Probe, ...]:
    """All attacks."""
    return (
        Probe("writes a file outside", _writes_outside, Level.LANDLOCK),
        Probe("reads a file outside", _reads_outside, Level.LANDLOCK),
        Probe("opens a device", _opens_devices, Level.LANDLOCK),
        Probe("reads the parent's environment", _reads_environment, Level.LANDLOCK),
        Probe("connects to this machine", _connects, Level.LANDLOCK),
        Probe("asks the metadata address", _asks_metadata, Level.LANDLOCK),
        Probe("makes a namespace", _makes_namespace, Level.LANDLOCK),
        Probe("kills another process", _kills, Level.LANDLOCK),
        Probe("fork bomb", _forks),
        Probe("lives on past the time-out", _daemonizes),
        Probe("fills the memory", _fills_memory),
        Probe("fills the memory from many processes", _fills_memory_together),
        Probe("fills memory that processes share", _fills_shared_memory),
        Probe("fills memory that no process has", _fills_memory_apart, Level.LANDLOCK),
        Probe("fills the disk", _fills_disk),
        Probe("never ends", _never_ends),
        Probe("prints without end", _prints),
        Probe("exits before the tests", lambda sandbox: _passes(sandbox, "raise SystemExit(0)")),
        Probe("exits during a test", lambda sandbox: _passes(sandbox, "import os\ndef answer(): os._exit(0)")),
        Probe("equals everything", lambda sandbox: _passes(sandbox, _EQUAL)),
        Probe("ends the tests' loops", lambda sandbox: _passes(sandbox, "def answer(): raise StopIteration")),
        Probe("writes verdicts", lambda sandbox: _passes(sandbox, _FORGES)),
        Probe("looks for expected values", lambda sandbox: _passes(sandbox, _SEARCHES)),
    )


def _output(sandbox: Sandbox, attack: str, text: str = "") -> str:
    """What an attack printed; that it was tried to its end is made sure of."""
    outcome = sandbox.run(Program(source=f"{attack}\nprint('tried')"), [text])[0]
    if not outcome.stdout.endswith("tried\n"):
        raise RuntimeError(f"an attack could not be tried: {outcome.describe()}\n{outcome.stderr[-2000:]}")
    return outcome.stdout.removesuffix("tried\n")


def _outcome(sandbox: Sandbox, source: str) -> Outcome:
    return sandbox.run(Program(source=source))[0]


def _brief(sandbox: Sandbox) -> Sandbox:
    """For attacks that only the clock ends."""
    return replace(sandbox, limits=replace(sandbox.limits, seconds=1.0))


@contextlib.contextmanager
def _open_folder():
    """A folder that every user may write to."""
    with tempfile.TemporaryDirectory(prefix="probe-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


def _writes_outside(sandbox: Sandbox) -> str:
    with _open_folder() as folder:
        _output(sandbox, "try: open(input(), 'w').write('I was here')\nexcept OSError: pass", str(folder / "file"))
        return "wrote a file in a folder that is open to all" if list(folder.iterdir()) else ""


def _reads_outside(sandbox: Sandbox) -> str:
    with _open_folder() as folder:
        secret = secrets.token_hex(8)
        (folder / "secret").write_text(secret)
        attack = "try: print(open(input()).read())\nexcept OSError: pass"
        return "read a file" if secret in _output(sandbox, attack, str(folder / "secret")) else ""


def _opens_devices(sandbox: Sandbox) -> str:
    source = """
import glob
for pattern in ("accel*", "vfio/*", "nvidia*", "dri/*", "kvm", "mem", "sd*", "vd*", "nvme*", "tty[0-9]*", "tpu*"):
    for path in glob.glob("/dev/" + pattern):
        try: open(path, "rb").close()
        except OSError: continue
        print(path)
"""
    found = _output(sandbox, source).split()
    return f"opened {', '.join(found)}" if found else ""


def _reads_environment(sandbox: Sandbox) -> str:
    source = """
import glob
for path in glob.glob("/proc/[0-9]*/environ"):
    try: print(open(path, "rb").read())
    except OSError: pass
"""
    found = _output(sandbox, source)
    with contextlib.suppress(OSError):
        for entry in Path("/proc/self/environ").read_bytes().decode("utf-8", "replace").split("\0"):
            name, _, value = entry.partition("=")
            if len(value) > 5 and entry in found and name not in ("LANG", "PYTHONHASHSEED"):
                return f"read {name} of the environment"
    return ""


def _connects(sandbox: Sandbox) -> str:
    source = """
import socket
port = int(input())
for kind, name in ((socket.SOCK_STREAM, "TCP"), (socket.SOCK_DGRAM, "UDP")):
    try:
        made = socket.socket(socket.AF_INET, kind)
        made.settimeout(1)
        made.connect(("127.0.0.1", port))
        made.send(b"hello")
        print(name)
    except OSError: pass
try: socket.socket(socket.AF_UNIX).connect("\\0probe-" + str(port)); print("an abstract socket")
except OSError: pass
"""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = listener.getsockname()[1]
        datagrams = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        datagrams.bind(("127.0.0.1", port))
        datagrams.settimeout(0.05)
        said = _output(sandbox, source, str(port)).split()
        listener.settimeout(0.05)
        with contextlib.suppress(OSError):
            listener.accept()[0].close()
            return "a TCP connection arrived"
        with contextlib.suppress(OSError):
            datagrams.recv(16)
            return "a UDP packet arrived"
    return "connected to an abstract socket" if "socket" in said else ""


def _asks_metadata(sandbox: Sandbox) -> str:
    source = f"""
import socket
try: print("connected", socket.create_connection(({METADATA!r}, 80), timeout=1))
except TimeoutError: print("waited for an answer")
except OSError: print("refused at once")
"""
    said = _output(sandbox, source).strip()
    return "" if said == "refused at once" else said or "said nothing"


def _makes_namespace(sandbox: Sandbox) -> str:
    source = """
import ctypes
print(ctypes.CDLL(None).unshare(0x10000000))  # a user namespace, where this process would have all capabilities
"""
    return "made a user namespace" if _output(sandbox, source).strip() == "0" else ""


def _kills(sandbox: Sandbox) -> str:
    source = """
import os, signal
for process in (int(input()), os.getppid()):
    try: os.kill(process, signal.SIGKILL)
    except OSError: pass
"""
    with subprocess.Popen(["/bin/sleep", "60"], env={}) as victim:
        try:
            outcome = sandbox.run(Program(source=source), [str(victim.pid)])[0]
            time.sleep(0.05)
            if victim.poll() is not None:
                return "killed a process outside"
            return "killed the process that watches it" if outcome.kind == "lost" else ""
        finally:
            victim.kill()


def _named(name: str) -> str:
    return f"import ctypes\nctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)\n"


def alive(name: str) -> int:
    """How many processes of the machine have this name."""
    found = 0
    for file in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            found += file.read_text().strip() == name
    return found


def _forks(sandbox: Sandbox) -> str:
    name = f"probe{secrets.token_hex(4)}"
    source = f"""{_named(name)}
import os, sys, time
made = 0
while True:
    try:
        if os.fork() == 0: time.sleep(0.001); continue
        made += 1; sys.stdout.write("x"); sys.stdout.flush()
    except OSError: time.sleep(0.01)
"""
    outcome = _outcome(_brief(sandbox), source)
    if outcome.kind == "exited" or len(outcome.stdout) > 40 * sandbox.limits.processes:
        return f"{outcome.describe()} after {len(outcome.stdout)} forks"
    return f"{alive(name)} processes live on" if alive(name) else ""


def _daemonizes(sandbox: Sandbox) -> str:
    name = f"probe{secrets.token_hex(4)}"
    source = f"""{_named(name)}
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in set(signal.Signals) - {{signal.SIGKILL, signal.SIGSTOP}}: signal.signal(number, signal.SIG_IGN)
        time.sleep(60)
    os._exit(0)
time.sleep(60 if input() else 0)
"""
    for text in ("stay", ""):
        outcome = (_brief(sandbox) if text else sandbox).run(Program(source=source), [f"{text}\n"])[0]
        if outcome.kind != ("timeout" if text else "exited"):
            return outcome.describe()
        if alive(name):
            return "a process lives on"
    return ""


def _fills_memory(sandbox: Sandbox) -> str:
    size = 4 * sandbox.limits.memory
    outcome = _outcome(
        sandbox, f"data = bytearray({size})\nfor place in range(0, {size}, 4096): data[place] = 1\nprint('full')"
    )
    return f"filled {size >> 20} MiB" if "full" in outcome.stdout else ""


def _fills_memory_together(sandbox: Sandbox) -> str:
    return _fills_from_all(sandbox, "bytearray(size)")


def _fills_shared_memory(sandbox: Sandbox) -> str:
    return _fills_from_all(sandbox, "mmap.mmap(-1, size)")


def _fills_from_all(sandbox: Sandbox, memory: str) -> str:
    """Half of the memory that all may have, in each of as many processes as there may be."""
    size, processes = sandbox.limits.memory // 2, sandbox.limits.processes - 1
    source = f"""
import mmap, os, time
for _ in range({processes - 1}):
    if os.fork() == 0: break
size = {size}
data = {memory}
for place in range(0, size, 4096): data[place] = 1
time.sleep(1)
print("full")
"""
    outcome = _outcome(sandbox, source)
    return "" if outcome.kind == "memory" else f"{outcome.describe()}, printed {outcome.stdout!r}"


def _fills_memory_apart(sandbox: Sandbox) -> str:
    source = """
import ctypes, os
libc, size = ctypes.CDLL(None), 1 << 20
libc.shmat.restype = ctypes.c_void_p
try:
    os.write(os.memfd_create("probe"), bytes(size)); print("a file in memory")
except OSError: pass
found = libc.shmget(0, size, 0o1600)
if found >= 0:
    libc.shmctl(found, 0, None)  # it would outlive the sandbox
    print("a shared segment")
"""
    made = _output(sandbox, source).splitlines()
    return f"made {' and '.join(made)}" if made else ""


def _fills_disk(sandbox: Sandbox) -> str:
    source = """
import os
number = 0
while True:
    number += 1
    with open(f"file{number}", "wb", buffering=0) as file:
        for _ in range(16):
            file.write(bytes(65536)); os.write(1, b"x")
"""
    outcome = _outcome(sandbox, source)
    written = len(outcome.stdout) * 65536
    ended = outcome.kind == "disk" or (outcome.kind == "exited" and written <= sandbox.limits.disk)
    return "" if ended else f"{outcome.describe()} after {written >> 20} MiB"


def _never_ends(sandbox: Sandbox) -> str:
    begun = time.monotonic()
    outcome = _outcome(_brief(sandbox), "9 ** 9 ** 9")
    return "" if outcome.kind == "timeout" and time.monotonic() - begun < 60 else outcome.describe()


def _prints(sandbox: Sandbox) -> str:
    outcome = _outcome(sandbox, "while True: print('x' * 9999)")
    if outcome.kind != "output" or len(outcome.stdout) > sandbox.limits.output:
        return f"{outcome.describe()} after {len(outcome.stdout)} bytes"
    return ""


def _passes(sandbox: Sandbox, solution: str) -> str:
    """Whether a solution that knows nothing passes a test of a value that nobody can guess."""
    expected = secrets.token_hex(8)
    tests = (
        f"assert answer() == {expected!r}",
        f"assert {expected!r} in answer()",
        f"assert not answer() != {expected!r}",
        f"assert all(map(lambda one: answer() == one, [{expected!r}]))",
        f"assert abs(answer() - {ord(expected[0])}) < 1e-6",
    )
    failures, _ = sandbox.test(solution, tests)
    passed = [test for test, failure in zip(tests, failures, strict=True) if not failure]
    return f"passed {passed[0].replace(expected, '...')}" if passed else ""


_EQUAL = """
class Equal(str):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __contains__(self, other): return True
    def __sub__(self, other): return 0
    def __abs__(self): return 0
    def __lt__(self, other): return True
    def __hash__(self): return 0
class Other:
    pass
for name, value in list(vars(Equal).items()):
    if callable(value): setattr(Other, name, value)
import builtins
builtins.abs = lambda value: 0
abs = all = builtins.abs
turn = 0
def answer():
    global turn
    turn += 1
    return Equal() if turn % 2 else Other()
"""

_FORGES = """
import os, sys
def answer():
    for text in (b'""\\n', b'["t", [true, true, ["l", []]]]\\n', b'{"kind": "exited", "verdicts": ["", "", ""]}\\n'):
        for number in range(256):
            try: os.write(number, text)
            except OSError: pass
    return True
"""

_SEARCHES = """
import gc, glob, os, re, sys
def strings(value, depth=0):
    if isinstance(value, str): yield value
    elif isinstance(value, bytes): yield value.decode("latin1")
    elif depth < 3 and isinstance(value, (list, tuple, set)):
        for item in value: yield from strings(item, depth + 1)
    elif depth < 3 and isinstance(value, dict):
        for item in value.values(): yield from strings(item, depth + 1)
def places():
    for thing in gc.get_objects():
        yield from strings(thing)
    for frame in sys._current_frames().values():
        while frame:
            yield from strings(frame.f_locals)
            frame = frame.f_back
    for pattern in ("/proc/self/fd/*", "/proc/[0-9]*/fd/*", "/proc/[0-9]*/environ", "/proc/[0-9]*/cmdline", "/tmp/*"):
        for path in glob.glob(pattern):
            if "/fd/" in path and "pipe" in os.readlink(path): continue
            try: yield open(path, "rb").read(1 << 20).decode("latin1")
            except OSError: pass
    for path in glob.glob("/proc/[0-9]*/maps"):
        if path.split("/")[2] == str(os.getpid()): continue
        try:
            memory = open(path.replace("maps", "mem"), "rb")
            for line in open(path):
                first, last = (int(part, 16) for part in line.split()[0].split("-"))
                if "rw" in line:
                    memory.seek(first); yield memory.read(min(last - first, 1 << 24)).decode("latin1")
        except OSError: pass
def answer():
    for text in places():
        found = re.search(r"assert answer\\(\\) == '([0-9a-f]{16})'", text)
        if found: return found[1]
    return "nothing"
"""
