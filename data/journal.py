"""A file of JSON lines that a killed process goes on with: what it holds is never written twice, a torn end is cut."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal, none if there is no file. Raises ValueError for one that is damaged inside."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} of {path} is no JSON ({error}): delete that line") from error


class Journal:
    """Appends to a journal, after cutting a last line that a kill tore. A context manager.

    What was appended survives the death of the process at once, and a power cut from `sync` on.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write lines and hand them to the system. Raises OSError, with the file's name, if they do not fit."""
        # ASCII, because a lone surrogate has no UTF-8.
        rest = memoryview("".join(json.dumps(line) + "\n" for line in lines).encode("ascii"))
        while rest:
            try:
                rest = rest[self._file.write(rest) or 0 :]
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), str(self._path)) from error

    def sync(self) -> None:
        """Have the system put all of it on the disk."""
        os.fsync(self._file.fileno())
