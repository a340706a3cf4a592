"""Run folders in a bucket: a working copy on this machine, and in the bucket all that another machine needs to go on.

Arrays (checkpoints, parameters) go straight between the devices and the bucket. Small files are written here and sent
before anything that relies on them: the log before the checkpoint of its last line, DONE after all.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import fsspec.config
from etils import epath  # paths of buckets, as Orbax uses them; with gcsfs they reach Google Cloud Storage

from ..sharding import hosts

LOCAL, ARRAYS = (".lock", ".compiled"), ("checkpoints", "params", ".compiled")
"""What stays on this machine, and what is in the bucket alone."""
FIRST = ("rollouts", "profile", "stacks")
"""What the first host alone fetches, for the report."""

REMEDY = "see to its quota, billing or permissions and run the same command again"
_REFUSED = re.compile(
    r"^Forbidden: \S+\s+(?P<gcsfs>.+)|"
    r"^(?:PERMISSION_DENIED|UNAUTHENTICATED): .*http_response_body='.*?message\W+(?P<tensorstore>.*?)\\*\"",
    re.DOTALL,
)
"""The errors of the two clients: gcsfs writes the small files, TensorStore the arrays."""

fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False  # other hosts write, too


class _Copy:
    """A local folder and its place in the bucket."""

    def __init__(self, local: Path, remote: epath.Path) -> None:
        self.local, self.remote = local, remote
        self.sent: dict[Path, tuple[int, int]] = {}
        self.fetched: dict[Path, str] = {}

    def fetch(self) -> None:
        """Copy the small files of the bucket that are new to this machine."""
        system, root = fsspec.core.url_to_fs(str(self.remote))
        for name, about in system.find(root, detail=True).items():
            path = Path(name).relative_to(root)
            if set(path.parts) & {*ARRAYS, *(() if hosts.is_first() else FIRST)}:
                continue
            if self.fetched.get(path) != about["generation"]:
                local = self.local / path
                local.parent.mkdir(parents=True, exist_ok=True)
                local.write_bytes(system.cat_file(name))
                self.sent[local], self.fetched[path] = _version(local), about["generation"]

    def send(self) -> None:
        """Copy what has changed here into the bucket, and take away what is gone; DONE comes last."""
        found = [path for path in self.local.rglob("*") if path.is_file() and not set(LOCAL) & set(path.parts)]
        for path in sorted(found, key=lambda path: path.name == "DONE"):
            if self.sent.get(path) != (version := _version(path)) and not path.name.endswith(".partial"):
                self._write(path)
                self.sent[path] = version
        for path in set(self.sent) - set(found):
            (self.remote / path.relative_to(self.local)).unlink(missing_ok=True)
            del self.sent[path]

    def _write(self, path: Path) -> None:
        try:
            (self.remote / path.relative_to(self.local)).write_bytes(path.read_bytes())
        except OSError as error:
            if said := refusal(error):
                raise OSError(f"{self.remote} cannot be written, the bucket says {said!r}: {REMEDY}") from error
            raise


_copies: list[_Copy] = []


@contextlib.contextmanager
def working_copy(out: str | Path) -> Iterator[Path]:
    """The folder to work in: `out` itself, or for gs://BUCKET/PATH a local copy of what is there, sent back at the end.

    Raises:
        ValueError: for a bucket that cannot be read, with what it said.
        ImportError: without gcsfs.
    """
    if not str(out).startswith("gs://"):
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="posttrain-") as folder:  # anew: what is in the bucket counts
        copy = _Copy(Path(folder).resolve(), epath.Path(str(out)))
        _fetch_all(copy)
        _copies.append(copy)
        try:
            yield copy.local
        finally:
            publish()
            _copies.remove(copy)


def _fetch_all(copy: _Copy) -> None:
    try:
        copy.fetch()
    except ImportError as error:
        raise ImportError(f"--out {copy.remote} needs gcsfs: run `pip install 'posttrain[gcs]'`") from error
    except Exception as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{copy.remote} cannot be read ({said}): create the bucket, or ask for access") from error


def place(path: Path) -> Any:
    """Where arrays that belong at a local path are: there, or in the bucket of the working copy that it is in."""
    path = path.resolve()
    for copy in _copies:
        if path.is_relative_to(copy.local):
            return copy.remote / path.relative_to(copy.local)
    return epath.Path(path)


def is_remote(path: Path) -> bool:
    """Whether a path belongs to a working copy."""
    return any(path.resolve().is_relative_to(copy.local) for copy in _copies)


def publish() -> None:
    """Send what the first host has written."""
    if hosts.is_first():
        for copy in _copies:
            copy.send()


def refusal(error: Exception) -> str:
    """What Google Cloud Storage said when it would not take or give an object; empty for any other error."""
    if found := _REFUSED.search(str(error)):
        return " ".join((found["gcsfs"] or found["tensorstore"]).split())
    return ""


def refresh() -> None:
    """Let all other hosts have what the first has written until now. Every host must call."""
    publish()
    hosts.barrier()
    if not hosts.is_first():
        for copy in _copies:
            copy.fetch()


def remove(path: Path) -> None:
    """Delete a folder of arrays, wherever it is."""
    if (found := place(path)).exists():
        found.rmtree()


def _version(path: Path) -> tuple[int, int]:
    return path.stat().st_mtime_ns, path.stat().st_size
