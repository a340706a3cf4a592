"""What the kernel takes from a process before untrusted code runs in it: files, system calls, its user, resources.

Runs inside a sandbox, in the interpreter that is fenced, with the standard library alone. Landlock
(https://docs.kernel.org/userspace-api/landlock.html) and seccomp are reached through ctypes; both bind the process and
all that it will start, and cannot be undone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys

TYPE_CHECKING = False  # importing typing and collections.abc for annotations would be a tenth of a sandbox's start
if TYPE_CHECKING:
    from collections.abc import Sequence

_LIBC = ctypes.CDLL(None, use_errno=True)

# Landlock: the same system call numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_FILES_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_ON_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | 1 << 15
_BIND_AND_CONNECT_TCP, _ABSTRACT_SOCKETS_AND_SIGNALS = 0b11, 0b11
SIGNALS_SCOPED = 6  # the first version of Landlock that keeps signals inside

_SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVS, _SET_CHILD_SUBREAPER = 4, 22, 38, 36
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_NAMESPACES = 0x7E020080  # the CLONE_NEW* flags of clone()

# System calls of (x86_64, aarch64) that fail with EPERM; -1 where the architecture lacks it.
_DENIED = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "sendmsg": (46, 211), "sendmmsg": (307, 269), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "syslog": (103, 116), "vhangup": (153, 58),
    # Memory that no process has mapped, and that may outlive them all, would be in nobody's count.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180),
}  # fmt: skip
_SIGNALS = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
}  # fmt: skip
_SENDTO, _CLONE, _CLONE3 = (44, 206), (56, 220), (435, 435)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*


def landlock_version() -> int:
    """The version of Landlock that the kernel has; 0 where it has none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def has_seccomp() -> bool:
    """Whether system calls can be filtered here: Linux on a processor whose calls the table above has."""
    return sys.platform.startswith("linux") and os.uname().machine in _ARCHITECTURES


def allow_files(*, readable: Sequence[str], writable: Sequence[str]) -> None:
    """From here on this process opens only what lies below these paths, and no TCP port; signals stay inside."""
    version = landlock_version()
    handled = _FILES_BY_VERSION[max(known for known in _FILES_BY_VERSION if known <= version)]
    attributes = struct.pack(
        "QQQ",
        handled,
        _BIND_AND_CONNECT_TCP if version >= 4 else 0,
        _ABSTRACT_SOCKETS_AND_SIGNALS if version >= SIGNALS_SCOPED else 0,
    )
    size = 24 if version >= SIGNALS_SCOPED else 16 if version >= 4 else 8
    ruleset = _call(_CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    for paths, access in ((readable, _READ), (writable, handled)):
        for path in paths:
            _allow(ruleset, path, access & handled)
    _prctl(_SET_NO_NEW_PRIVS, 1)
    _call(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    """Add a path that exists to the rules."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        access &= _ON_A_FILE
    rule = struct.pack("=Qi", access, descriptor)
    _call(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
    os.close(descriptor)


def filter_calls(*, signals: bool) -> None:
    """From here on no sockets, no look into other processes, no namespaces, no memory that nobody has mapped.

    Without `signals`, no signals either.
    """
    column, architecture = _ARCHITECTURES[os.uname().machine]
    denied = [numbers[column] for numbers in (_DENIED | ({} if signals else _SIGNALS)).values()]
    no_permission, no_such_call = _FAIL | errno.EPERM, _FAIL | errno.ENOSYS
    program = [
        _load(4),  # seccomp_data: number at 0, architecture at 4, six arguments of 8 bytes from 16
        _unless(architecture, _KILL),
        _load(0),
        _jump(0x35, 0x40000000, 0, 1),  # the x32 calls of x86_64 have numbers of their own
        _return(no_such_call),
        *_if(_CLONE3[column], no_such_call),  # its flags lie in memory that a filter cannot read; libc then uses clone
    ]
    for number in denied:
        program += _if(number, no_permission)
    program += [
        _jump(0x15, _CLONE[column], 0, 4),
        _load(16),
        _jump(0x45, _NAMESPACES & 0xFFFFFFFF, 0, 1),
        _return(no_permission),
        _return(_ALLOW),
        _jump(0x15, _SENDTO[column], 0, 5),  # to an address; from a pair of connected sockets it has none
        _load(16 + 4 * 8),
        _jump(0x15, 0, 0, 2),
        _load(16 + 4 * 8 + 4),
        _jump(0x15, 0, 1, 0),
        _return(no_permission),
        _return(_ALLOW),
    ]
    code = b"".join(program)
    buffer = ctypes.create_string_buffer(code, len(code))
    pointer = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))  # instructions have 8 bytes
    _prctl(_SET_NO_NEW_PRIVS, 1)
    _prctl(_SET_SECCOMP, 2, ctypes.c_char_p(pointer))


def _instruction(code: int, true: int, false: int, value: int) -> bytes:
    return struct.pack("HBBI", code, true, false, value)


def _load(offset: int) -> bytes:
    return _instruction(0x20, 0, 0, offset)


def _return(action: int) -> bytes:
    return _instruction(0x06, 0, 0, action)


def _jump(code: int, value: int, true: int, false: int) -> bytes:
    """Compare what was loaded (0x15 equal, 0x35 not below, 0x45 shares a bit) and skip that many instructions."""
    return _instruction(code, true, false, value)


def _if(number: int, action: int) -> list[bytes]:
    return [_jump(0x15, number, 0, 1), _return(action)]


def _unless(value: int, action: int) -> bytes:
    return _jump(0x15, value, 1, 0) + _return(action)


def drop_user(user: int) -> None:
    """Become another user, with no group and no capability of root; only root can."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def limit(*, seconds: int, memory: int | None, file_size: int, processes: int | None, files: int) -> None:
    """Set the limits that the kernel keeps per process (`processes` per user), with no way back up."""
    wanted: dict[int, int | None] = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_NOFILE: files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: processes,
    }
    if sys.platform.startswith("linux"):  # elsewhere the address space of a mere interpreter is over any limit
        wanted[resource.RLIMIT_AS] = memory
    for kind, value in wanted.items():
        if value is not None:
            _, most = resource.getrlimit(kind)
            value = value if most == resource.RLIM_INFINITY else min(value, most)
            resource.setrlimit(kind, (value, value))


def hide() -> None:
    """Keep processes of the same user from reading this one's memory and descriptors through /proc."""
    if sys.platform.startswith("linux"):
        _prctl(_SET_DUMPABLE, 0)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that none gets away."""
    if sys.platform.startswith("linux"):
        _prctl(_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int, pointer: ctypes.c_char_p | None = None) -> None:
    if _LIBC.prctl(option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        raise _os_error(f"prctl {option}")


def _call(number: int, *arguments: object) -> int:
    result = _LIBC.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise _os_error(f"system call {number}")
    return result


def _os_error(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")
