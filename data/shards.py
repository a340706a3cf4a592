"""Rows and pairs in Parquet shards with checksums and a data card, the same bytes for the same rows.

`source.read(*shards.paths(folder))` gives conversations to train on, and with `parse=columns.row` the rows again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from . import card, columns, source
from .filters.funnel import Filter, Funnel, describe
from .pairs import Pair
from .row import Row

Format = Literal["parquet", "array_record"]


def write_rows(
    folder: str | os.PathLike[str],
    found: Funnel,
    filters: Sequence[Filter],
    *,
    title: str,
    rows_per_shard: int = 10_000,
    format: Format = "parquet",
) -> Path:
    """Write what a funnel kept to rows-*.parquet, what it dropped to dropped-*.parquet, a data card and a manifest.

    With the format "array_record" the shards are rows-*.array_record, each record the JSON of what a row of Parquet
    holds, which grain reads at any index. The folder appears whole or not at all. Raises FileExistsError if it is
    there, ValueError for a row that the format cannot hold.
    """
    settings = describe(tuple(filters))
    files = {
        "rows": (columns.ROWS, map(columns.of_row, found.kept), len(found.kept)),
        "dropped": (columns.DROPPED, map(columns.of_dropped, found.dropped), len(found.dropped)),
    }
    manifest = {"title": title, "filters": settings, "steps": [step._asdict() for step in found.steps]}
    return _write(Path(folder), files, manifest, card.of_rows(title, found, settings, format), rows_per_shard, format)


def write_pairs(
    folder: str | os.PathLike[str], pairs: Iterable[Pair], *, title: str, rows_per_shard: int = 10_000
) -> Path:
    """Write preference pairs, in order of their ids, to pairs-*.parquet, as `write_rows` does.

    Read them by `source.read(*paths(folder, "pairs"), parse=columns.preference)`.
    """
    ordered = sorted(pairs, key=lambda pair: pair.id)
    files = {"pairs": (columns.PAIRS, map(columns.of_pair, ordered), len(ordered))}
    return _write(Path(folder), files, {"title": title}, card.of_pairs(title, ordered), rows_per_shard, "parquet")


def paths(folder: str | os.PathLike[str], kind: str = "rows") -> tuple[str, ...]:
    """The shards of a folder, "rows", "dropped" or "pairs", in order. Raises ValueError if one is not what was written.

    Reads every file once, to compare its checksum.
    """
    manifest = Path(folder) / "manifest.json"
    if not manifest.is_file():
        raise FileNotFoundError(f"there is no {manifest}; give a folder that write_rows or write_pairs made")
    files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    chosen = [name for name in files if name.startswith(f"{kind}-")]
    if not chosen:
        raise ValueError(f"{folder} has no shards of {kind!r}; it has {sorted(files)}")
    for name in chosen:
        file = Path(folder) / name
        if not file.is_file() or _sha256(file) != files[name]["sha256"]:
            raise ValueError(f"{file} is missing or not what was written (its checksum differs); write the data again")
    return tuple(str(Path(folder) / name) for name in chosen)


def rows_folder(stage: str | os.PathLike[str]) -> Path:
    """The shards' folder that a stage's folder stands for: its `rows`, or the folder itself."""
    inside = Path(stage) / "rows"
    return inside if inside.is_dir() else Path(stage)


def read_rows(stage: str | os.PathLike[str], kind: str = "rows") -> list[Row]:
    """All rows of a folder that `write_rows` made, or of a stage's; none where there are none."""
    files = paths(rows_folder(stage), kind)
    manifest = json.loads((Path(files[0]).parent / "manifest.json").read_text(encoding="utf-8"))["files"]
    if not sum(manifest[Path(file).name]["rows"] for file in files):
        return []
    records = source.read(*files, parse=columns.row)
    return [records[index] for index in range(len(records))]


def _write(
    folder: Path,
    files: Mapping[str, tuple[pyarrow.Schema, Iterator[Mapping[str, Any]], int]],
    manifest: Mapping[str, Any],
    readme: str,
    rows_per_shard: int,
    format: Format,
) -> Path:
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard}; give at least 1")
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or write elsewhere")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    written: dict[str, Any] = {}
    for kind, (schema, records, total) in files.items():
        shards = max(1, -(-total // rows_per_shard))
        for shard in range(shards):
            rows = [record for _, record in zip(range(rows_per_shard), records, strict=False)]
            file = partial / f"{kind}-{shard:05d}-of-{shards:05d}.{format}"
            table = pyarrow.Table.from_pylist(rows, schema)
            if format == "parquet":
                parquet.write_table(table, file, compression="zstd")
            else:
                _write_array_record(file, table)
            _to_disk(file)
            written[file.name] = {"rows": len(rows), "bytes": file.stat().st_size, "sha256": _sha256(file)}
    _write_text(partial / "manifest.json", json.dumps({**manifest, "files": written}, indent=1, ensure_ascii=False))
    _write_text(partial / "README.md", readme + card.files(written))
    _to_disk(partial)
    partial.rename(folder)
    _to_disk(folder.parent)
    return folder


def _write_array_record(file: Path, table: pyarrow.Table) -> None:
    """The rows of a table, each as JSON, in records that can be read one by one."""
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in table.to_pylist():
        writer.write(columns.to_json(record).encode())
    writer.close()


def _write_text(file: Path, text: str) -> None:
    file.write_text(text + "\n", encoding="utf-8")
    _to_disk(file)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
