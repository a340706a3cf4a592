"""The worker process of a VerifierPool: reads pickled (task, response) pairs, writes one line of JSON per verdict."""

import fcntl
import json
import math
import os
import pickle
import resource
import sys
from numbers import Real
from typing import BinaryIO

from ..task import Verdict

MAX_REASON = 300  # characters


def main() -> None:
    """Serve until the parent closes its end. Command line: the lifeline's descriptor, the memory limit in bytes."""
    lifeline, memory_bytes = int(sys.argv[1]), int(sys.argv[2])
    _die_with_parent(lifeline)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what a verifier prints must not mix with the replies, nor fill the trainer's log
        os.dup2(null, descriptor)
    _reply(replies, "ready")
    while header := requests.read(8):
        items = pickle.loads(requests.read(int.from_bytes(header, "big")))
        _serve(items, replies)


def _die_with_parent(lifeline: int) -> None:
    """Have the kernel end this process when the parent is gone, even in the middle of a computation.

    The parent holds the other end of the pipe and never writes. Its death hangs the pipe up, which raises SIGIO here,
    and SIGIO's default action ends the process. A thread that waits for the end of the file would need the GIL, which
    a long integer power does not give back.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    os.set_blocking(lifeline, False)
    try:
        if os.read(lifeline, 1) == b"":  # the parent was gone before the signal was armed
            os._exit(1)
    except BlockingIOError:
        return


def _serve(items: list[bytes], replies: BinaryIO) -> None:
    """Judge the items in order. All are loaded first: importing a verifier's library is not on any item's clock."""
    pairs = []
    for item in items:
        try:
            pairs.append(pickle.loads(item))
        except BaseException as error:
            pairs.append(error)
    _reply(replies, "loaded")
    for pair in pairs:
        if isinstance(pair, BaseException):
            _reply(replies, "error", 0.0, f"the task cannot be loaded in a worker process: {_name(pair)}")
            continue
        _reply(replies, *_judge(*pair))


def _judge(task, response) -> tuple[str, float, str]:
    """(kind, score, reason) for one pair; whatever the verifier raises, SystemExit included, becomes a reason."""
    try:
        return _checked(task.verifier(task, response))
    except MemoryError as error:
        return "memory", 0.0, _name(error)
    except BaseException as error:
        return "error", 0.0, _name(error)


def _checked(verdict) -> tuple[str, float, str]:
    if not isinstance(verdict, Verdict):
        return "error", 0.0, f"the verifier returned {type(verdict).__name__}, not a Verdict"
    score = verdict.score
    if not isinstance(score, Real) or not math.isfinite(score) or not 0.0 <= score <= 1.0:
        return "error", 0.0, f"the verifier's score {score!r} is not a number in [0, 1]"
    return "ok", float(score), str(verdict.reason)


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _reply(replies: BinaryIO, kind: str, score: float = 0.0, reason: str = "") -> None:
    replies.write(json.dumps([kind, score, reason[:MAX_REASON]]).encode() + b"\n")
    replies.flush()
