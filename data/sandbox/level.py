"""How well this machine can wall off model-written code, and the command that starts a sandbox of each level."""

import compileall
import enum
import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import fences

INSIDE = str(Path(__file__).parent)  # the trusted code that a sandbox starts with
BOOT = (  # a package of its own inside: nothing else of ours is there to import
    "import sys; sys.path[:] = [path for path in sys.path if path]; sys.path.insert(0, {folder!r}); "
    "from {package} import inside; del sys.path[0]; inside.main(*map(int, sys.argv[1:]))"
)
_MOUNTED = "/run/posttrain"
# A few users beyond those that systems give to people and services, within what a rootless container has.
_FIRST_USER, _NUM_USERS = 61_200, 4_000
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_SETTINGS = ("/etc/ld.so.cache", "/etc/alternatives")


class Level(enum.IntEnum):
    """What stands between model-written code and the machine, the strongest last."""

    NONE = 0
    """Nothing: code cannot be run here."""
    PLAIN = 1
    """A process with limits, and no network and no signals on Linux. It reads and writes the user's files."""
    LANDLOCK = 2
    """Files outside its folder are out of reach, too, by Landlock; so are network and signals, by seccomp."""
    BUBBLEWRAP = 3
    """A mount, process, network and IPC namespace of its own beside all of that: it does not see the machine."""


class SandboxError(RuntimeError):
    """This machine cannot wall off model-written code as well as it was asked to, or a sandbox did not start."""


class Machine(NamedTuple):
    """What the machine offers."""

    level: Level
    reason: str  # why no higher
    landlock: int  # version, 0 without
    seccomp: bool
    is_root: bool  # then sandboxes have users of their own


@functools.cache
def machine() -> Machine:
    """What this machine offers, tried out once per process: bubblewrap counts where it starts."""
    landlock, seccomp = fences.landlock_version(), fences.has_seccomp()
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    refusal = _bubblewrap_refusal()
    if not refusal:
        return Machine(Level.BUBBLEWRAP, "", landlock, seccomp, is_root)
    if is_root and not _open_to_all(interpreter(Level.PLAIN)):
        reason = f"{refusal}; and no other user could read {interpreter(Level.PLAIN)}: install python3"
        return Machine(Level.NONE, reason, landlock, seccomp, is_root)
    if landlock and seccomp:
        return Machine(Level.LANDLOCK, refusal, landlock, seccomp, is_root)
    missing = "Landlock" if not landlock else f"table of the system calls of {platform.machine()}"
    return Machine(Level.PLAIN, f"{refusal}; no {missing}", landlock, seccomp, is_root)


def require(level: Level) -> None:
    """Say now, and not one verdict of 0 after another, that the machine cannot keep to a level.

    Raises:
        SandboxError: with what to install, or what to accept.
    """
    found = machine()
    if found.level < level:
        raise SandboxError(
            f"model-written code is to run at level {level} ({level.name.lower()}) and this machine reaches "
            f"{found.level} ({found.level.name.lower()}): {found.reason}. Install bubblewrap (apt-get install "
            f"bubblewrap) where user namespaces are allowed, or accept less: --sandbox {found.level.name.lower()}, in "
            f"code Sandbox(required=Level.{found.level.name})"
        )


def interpreter(level: Level) -> str:
    """The Python of sandboxes: this one; below bubblewrap the system's where their user could not read this one."""
    own = os.path.realpath(sys.executable)
    if level is Level.BUBBLEWRAP or os.geteuid() != 0:
        return own
    candidates = (own, "/usr/bin/python3", "/usr/local/bin/python3")
    return next((path for path in candidates if os.path.exists(path) and _open_to_all(path)), own)


def _open_to_all(path: str) -> bool:
    """Whether every folder on the way can be entered by any user."""
    return all(parent.stat().st_mode & 0o001 for parent in Path(os.path.realpath(path)).parents)


@functools.cache
def _bubblewrap_refusal() -> str:
    """Why sandboxes cannot be started with bubblewrap here; empty where they can."""
    if not sys.platform.startswith("linux"):
        return "bubblewrap is for Linux"
    if shutil.which("bwrap", path=os.defpath + ":/usr/local/bin") is None:
        return "bubblewrap (bwrap) is not installed"
    command = [*bubblewrap(sys.executable, disk=1 << 20), "/bin/sh", "-c", "exit 7"]
    done = subprocess.run(command, env={}, capture_output=True, text=True, timeout=60, check=False)
    return "" if done.returncode == 7 else f"bubblewrap does not start ({done.stderr.strip()[:200]})"


def bubblewrap(
    python: str, *, disk: int, readable: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> list[str]:
    """The beginning of a command that runs in namespaces of its own; to be started with an empty environment.

    Whoever starts it as root gets no user namespace, which adds nothing then, but keeps what it takes to become
    another user inside.
    """
    program = shutil.which("bwrap", path=os.defpath + ":/usr/local/bin") or "bwrap"
    command = [program, "--die-with-parent", "--new-session", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    command += ["--as-pid-1", "--unshare-uts", "--hostname", "sandbox", "--clearenv"]
    if os.geteuid() == 0:
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    for path in _SYSTEM:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    command += ["--proc", "/proc", "--dev", "/dev"]
    for path, size in (("/tmp", disk), ("/dev/shm", min(disk, 16 << 20))):  # the sandbox's own
        command += ["--perms", "1777", "--size", str(size), "--tmpfs", path]
    for path in (*_SETTINGS, _prefix(python), *readable):
        if not f"{path}/".startswith("/usr/"):
            for folder in reversed(Path(path).parents[:-1]):  # made by a bind, they would be open to root alone
                command += ["--dir", str(folder)]
            command += ["--ro-bind-try", path, path]
    command += ["--dir", "/run", "--dir", _MOUNTED, "--ro-bind", INSIDE, f"{_MOUNTED}/{Path(INSIDE).name}"]
    for name, value in (variables or {}).items():
        command += ["--setenv", name, value]
    return [*command, "--remount-ro", "/dev", "--chdir", "/tmp"]


def _prefix(python: str) -> str:
    """The folder that an interpreter's standard library is below."""
    return str(Path(python).parent.parent)


def boot(python: str, level: Level) -> list[str]:
    """The command of the first, trusted process in a sandbox; three descriptors follow (see `inside.main`)."""
    _compile(python)
    folder = _MOUNTED if level is Level.BUBBLEWRAP else str(Path(INSIDE).parent)
    code = BOOT.format(folder=folder, package=Path(INSIDE).name)
    return [python, "-s", "-S", "-B", "-c", code]


@functools.cache
def _compile(python: str) -> None:
    """Have the trusted code as bytecode: a sandbox cannot write it, and compiling takes longer than Python's start."""
    if python == os.path.realpath(sys.executable):
        compileall.compile_dir(INSIDE, maxlevels=0, quiet=2)
    else:
        subprocess.run([python, "-m", "compileall", "-q", "-l", INSIDE], capture_output=True, check=False)


def readable(python: str, level: Level, more: Sequence[str]) -> list[str]:
    """What Landlock lets untrusted code read: all there is in namespaces of its own, else the system and Python."""
    if level is Level.BUBBLEWRAP:
        return ["/"]
    devices = ["/dev/urandom", "/dev/random", "/dev/zero"]
    return [*_SYSTEM, *_SETTINGS, _prefix(python), *devices, *more]


def user(number: int) -> int:
    """A user of a sandbox's own, by a number such as a process id; neighbours differ."""
    return _FIRST_USER + number % _NUM_USERS
