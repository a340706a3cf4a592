"""A folder of shards that grows record by record, of which no more than a row group is held, and appears whole."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from . import card, columns

Format = Literal["parquet", "array_record"]
GROUP = 1000  # records that are written, and can be read, together


class ShardFolder:
    """Writes records of several kinds, each with its Arrow schema, to KIND-NNNNN-of-NNNNN.FORMAT in a folder.

    Until it is published it is a folder beside, called FOLDER.partial; what is left there of a process that was killed
    is removed first. Raises FileExistsError if the folder is there.
    """

    def __init__(
        self, folder: Path, schemas: Mapping[str, pyarrow.Schema], *, rows_per_shard: int, format: Format
    ) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {rows_per_shard}; give at least 1")
        if folder.exists():
            raise FileExistsError(f"{folder} exists; remove it or write elsewhere")
        self._folder, self._partial = folder, folder.with_name(folder.name + ".partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._kinds = {
            kind: _Shards(self._partial / kind, schema, rows_per_shard, format) for kind, schema in schemas.items()
        }

    def add(self, kind: str, record: Mapping[str, Any]) -> None:
        """Append a record."""
        self._kinds[kind].add(record)

    def publish(self, manifest: Mapping[str, Any], readme: str, *, folder: Path | None = None) -> Path:
        """Add the files' checksums to manifest and README, and give the folder its name, or another one."""
        files = {name: item for shards in self._kinds.values() for name, item in shards.close().items()}
        _write_text(
            self._partial / "manifest.json", json.dumps({**manifest, "files": files}, indent=1, ensure_ascii=False)
        )
        _write_text(self._partial / "README.md", readme + card.files(files))
        _to_disk(self._partial)
        folder = folder or self._folder
        self._partial.rename(folder)
        _to_disk(folder.parent)
        return folder


def sha256(file: Path) -> str:
    """The checksum of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class _Shards:
    """The shards of one kind. How many there will be, which their names say, is known when they are closed."""

    def __init__(self, prefix: Path, schema: pyarrow.Schema, rows_per_shard: int, format: Format) -> None:
        self._prefix, self._schema, self._rows_per_shard, self._format = prefix, schema, rows_per_shard, format
        self._written: list[tuple[Path, int]] = []
        self._waiting: list[Mapping[str, Any]] = []
        self._open()

    def add(self, record: Mapping[str, Any]) -> None:
        if self._rows + len(self._waiting) == self._rows_per_shard:
            self._close()
            self._open()
        self._waiting.append(record)
        if len(self._waiting) == GROUP:
            self._flush()

    def close(self) -> dict[str, dict[str, Any]]:
        """The files by their names, with rows, bytes and checksum."""
        self._close()
        found = {}
        for number, (file, rows) in enumerate(self._written):
            name = f"{self._prefix.name}-{number:05d}-of-{len(self._written):05d}.{self._format}"
            named = file.rename(file.with_name(name))
            found[name] = {"rows": rows, "bytes": named.stat().st_size, "sha256": sha256(named)}
        return found

    def _open(self) -> None:
        self._file, self._rows = self._prefix.with_name(f"{self._prefix.name}-{len(self._written)}"), 0
        self._writer: _Writer = (
            parquet.ParquetWriter(self._file, self._schema, compression="zstd")
            if self._format == "parquet"
            else _ArrayRecords(self._file)
        )

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pyarrow.Table.from_pylist(self._waiting, self._schema))
        self._rows += len(self._waiting)
        self._waiting = []

    def _close(self) -> None:
        self._flush()
        self._writer.close()
        _to_disk(self._file)
        self._written.append((self._file, self._rows))


class _Writer(Protocol):
    def write_table(self, table: pyarrow.Table) -> None: ...

    def close(self) -> None: ...


class _ArrayRecords:
    """Rows of tables, each as JSON, in records that can be read one by one."""

    def __init__(self, file: Path) -> None:
        self._writer = ArrayRecordWriter(str(file), "group_size:1")

    def write_table(self, table: pyarrow.Table) -> None:
        for record in table.to_pylist():
            self._writer.write(columns.to_json(record).encode())

    def close(self) -> None:
        self._writer.close()


def _write_text(file: Path, text: str) -> None:
    file.write_text(text + "\n", encoding="utf-8")
    _to_disk(file)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
