"""Rows and pairs in Parquet shards with checksums and a data card, the same bytes for the same rows.

`source.read(*shards.paths(folder))` gives conversations to train on, and with `parse=columns.row` the rows again.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import card, columns, source
from .filters.funnel import Dropped, Filter, Funnel, Step, describe, sort_dropped
from .pairs import Pair
from .row import Row
from .shard_folder import Format, ShardFolder, sha256


class RowWriter:
    """Writes rows to rows-*.parquet as filters keep them, and to dropped-*.parquet those that they drop.

    Rows come in `streams.order`. With the format "array_record" the shards are rows-*.array_record, each record the
    JSON of what a row of Parquet holds, which grain reads at any index. The folder appears at `publish`, whole or not
    at all. Raises FileExistsError if it is there, ValueError for a row that the format cannot hold.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        filters: Sequence[Filter],
        *,
        title: str,
        rows_per_shard: int = 10_000,
        format: Format = "parquet",
    ) -> None:
        self.counts, self._title, self._settings = card.Counts(), title, describe(tuple(filters))
        schemas = {"rows": columns.ROWS, "dropped": columns.DROPPED}
        self._folder = ShardFolder(Path(folder), schemas, rows_per_shard=rows_per_shard, format=format)
        self._format: Format = format

    def add(self, kept: Iterable[Row], dropped: Iterable[Dropped] = ()) -> None:
        """Write what was made of a batch; batches in order."""
        for row in kept:
            self.counts.add(row)
            self._folder.add("rows", columns.of_row(row))
        for one in sort_dropped(dropped):
            self.counts.dropped += 1
            self._folder.add("dropped", columns.of_dropped(one))

    def publish(self, steps: Sequence[Step] = (), *, folder: Path | None = None) -> Path:
        """Write data card and manifest, with what the filters did, and let the folder appear, or another one."""
        manifest = {"title": self._title, "filters": self._settings, "steps": [step._asdict() for step in steps]}
        readme = card.of_rows(self._title, self.counts, steps, self._settings, self._format)
        return self._folder.publish(manifest, readme, folder=folder)


def write_rows(folder: str | os.PathLike[str], found: Funnel, filters: Sequence[Filter], **settings: Any) -> Path:
    """Write what a funnel kept and what it dropped; `settings` and errors are those of `RowWriter`."""
    writer = RowWriter(folder, filters, **settings)
    writer.add(found.kept, found.dropped)
    return writer.publish(found.steps)


def write_pairs(
    folder: str | os.PathLike[str], pairs: Iterable[Pair], *, title: str, rows_per_shard: int = 10_000
) -> Path:
    """Write preference pairs, in the order they come, to pairs-*.parquet, with a data card and a manifest.

    Read them by `source.read(*paths(folder, "pairs"), parse=columns.preference)`.
    """
    writer = ShardFolder(Path(folder), {"pairs": columns.PAIRS}, rows_per_shard=rows_per_shard, format="parquet")
    chosen, rejected = card.Counts(), card.Counts()
    for pair in pairs:
        chosen.add(pair.chosen)
        rejected.add(pair.rejected)
        writer.add("pairs", columns.of_pair(pair))
    return writer.publish({"title": title}, card.of_pairs(title, chosen, rejected))


def paths(folder: str | os.PathLike[str], kind: str = "rows") -> tuple[str, ...]:
    """The shards of a folder, "rows", "dropped" or "pairs", in order. Raises ValueError if one is not what was written.

    Reads every file once, to compare its checksum.
    """
    files = _files(folder, kind)
    for name, item in files.items():
        file = Path(folder) / name
        if not file.is_file() or sha256(file) != item["sha256"]:
            raise ValueError(f"{file} is missing or not what was written (its checksum differs); write the data again")
    return tuple(str(Path(folder) / name) for name in files)


def rows_folder(stage: str | os.PathLike[str]) -> Path:
    """The shards' folder that a stage's folder stands for: its `rows`, or the folder itself."""
    inside = Path(stage) / "rows"
    return inside if inside.is_dir() else Path(stage)


def scan_rows(stage: str | os.PathLike[str], kind: str = "rows") -> Iterator[Row]:
    """The rows of a folder that was written here, or of a stage's, one after the other, in `streams.order`."""
    return source.scan(*paths(rows_folder(stage), kind), parse=columns.row)


def read_rows(stage: str | os.PathLike[str], kind: str = "rows") -> list[Row]:
    """All of them at once."""
    return list(scan_rows(stage, kind))


def count_rows(stage: str | os.PathLike[str], kind: str = "rows") -> int:
    """How many they are, by the manifest."""
    return sum(item["rows"] for item in _files(rows_folder(stage), kind).values())


def _files(folder: str | os.PathLike[str], kind: str) -> dict[str, Mapping[str, Any]]:
    manifest = Path(folder) / "manifest.json"
    if not manifest.is_file():
        raise FileNotFoundError(f"there is no {manifest}; give a folder that write_rows or write_pairs made")
    files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    chosen = {name: item for name, item in files.items() if name.startswith(f"{kind}-")}
    if not chosen:
        raise ValueError(f"{folder} has no shards of {kind!r}; it has {sorted(files)}")
    return chosen
