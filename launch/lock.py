"""A lock on a folder, so that two processes never write the same run."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class LockedError(OSError):
    """Another process writes to the folder."""


@contextlib.contextmanager
def held(folder: Path, *, remedy: str = "wait for it, stop it, or give another --out") -> Iterator[None]:
    """Hold the lock of a folder, which is made if need be; the system lets go of it however the process ends.

    Raises:
        LockedError: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise LockedError(f"another process (id {owner}) writes to {folder}: {remedy}") from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
