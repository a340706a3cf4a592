"""Rows and pairs in Parquet shards with checksums and a data card, the same bytes for the same rows.

`source.read(*shards.paths(folder))` gives conversations to train on, and with `parse=shards.row` the rows again.
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

from . import card, chat, source
from .filters.funnel import Dropped, Filter, Funnel, describe
from .pairs import Pair
from .row import Provenance, Row, text_of
from .source import Record
from .task import Message

Format = Literal["parquet", "array_record"]
_TEXT = pyarrow.string()
_CALL = pyarrow.struct({"id": _TEXT, "type": _TEXT, "function": pyarrow.struct({"name": _TEXT, "arguments": _TEXT})})
_MESSAGE = pyarrow.struct(
    {
        "role": _TEXT,
        "content": _TEXT,
        "reasoning_content": _TEXT,
        "name": _TEXT,
        "tool_call_id": _TEXT,
        "tool_calls": pyarrow.list_(_CALL),
    }
)
_KEYS = {_MESSAGE.field(place).name for place in range(_MESSAGE.num_fields)}
_SHARED = {  # what a row has beside its messages; JSON where the content is free
    "id": _TEXT,
    "prompt_id": _TEXT,
    "domain": _TEXT,
    "finish": _TEXT,
    "num_tokens": pyarrow.int64(),
    "score": pyarrow.float64(),
    "reason": _TEXT,
    "pass_rate": pyarrow.float64(),
    "reward": pyarrow.float64(),
    "licences": pyarrow.list_(_TEXT),
    "tools": pyarrow.list_(_TEXT),
    "prompt_source": _TEXT,
    "teacher": _TEXT,
    "teacher_fingerprint": _TEXT,
    "sampling": _TEXT,
    "verifiers": _TEXT,
}
_MESSAGES = pyarrow.list_(_MESSAGE)
ROWS = pyarrow.schema({"prompt": _MESSAGES, "response": _MESSAGES, **_SHARED})
DROPPED = pyarrow.schema({**{field.name: field.type for field in ROWS}, "filter": _TEXT, "dropped_because": _TEXT})
PAIRS = pyarrow.schema(
    {
        "prompt": _MESSAGES,
        "chosen": _MESSAGES,
        "rejected": _MESSAGES,
        "id": _TEXT,
        "domain": _TEXT,
        "chosen_row": pyarrow.struct(_SHARED),
        "rejected_row": pyarrow.struct(_SHARED),
    }
)


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
        "rows": (ROWS, map(_record, found.kept), len(found.kept)),
        "dropped": (DROPPED, map(_dropped_record, found.dropped), len(found.dropped)),
    }
    manifest = {"title": title, "filters": settings, "steps": [step._asdict() for step in found.steps]}
    return _write(Path(folder), files, manifest, card.of_rows(title, found, settings, format), rows_per_shard, format)


def write_pairs(
    folder: str | os.PathLike[str], pairs: Iterable[Pair], *, title: str, rows_per_shard: int = 10_000
) -> Path:
    """Write preference pairs, in order of their ids, to pairs-*.parquet, as `write_rows` does.

    Read them by `source.read(*paths(folder, "pairs"), parse=preference)`.
    """
    ordered = sorted(pairs, key=lambda pair: pair.id)
    files = {"pairs": (PAIRS, map(_pair_record, ordered), len(ordered))}
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
    records = source.read(*files, parse=row)
    return [records[index] for index in range(len(records))]


def row(record: Record) -> Row:
    """The row that a record of rows-*.parquet or dropped-*.parquet holds, as `write_rows` was given it.

    Only keys of messages that held None are gone.
    """
    missing = sorted({"prompt", "response", "id", "finish", "num_tokens", "teacher"} - set(record))
    if missing:
        raise ValueError(f"it lacks {missing}; read rows-*.parquet or dropped-*.parquet of a folder by write_rows")
    provenance = Provenance(
        prompt_source=record["prompt_source"],
        teacher=record["teacher"],
        teacher_fingerprint=record["teacher_fingerprint"],
        sampling=json.loads(record["sampling"]),
        verifiers=json.loads(record["verifiers"]),
    )
    names = ("id", "prompt_id", "domain", "finish", "num_tokens", "score", "pass_rate", "reward", "reason")
    return Row(
        **{name: record[name] for name in names if record.get(name) is not None},
        prompt=tuple(map(_message, record["prompt"])),
        response=tuple(map(_message, record["response"])),
        licences=tuple(record["licences"]),
        tools=tuple(map(json.loads, record["tools"])),
        provenance=provenance,
    )


def conversation(found: Row) -> chat.Conversation:
    """The messages of a row, with the tools that were offered.

    Unlike in `source.conversation` of its record, arguments of tool calls are as they were given.
    """
    messages = (*found.prompt, *found.response)
    return chat.WithTools(messages, found.tools) if found.tools else messages


def preference(record: Record) -> source.Preference:
    """The messages of a record of pairs: as `source.preference`, with arguments of tool calls as they were given."""
    found = source.preference(record)
    return source.Preference(*(tuple(map(_message, messages)) for messages in found))


def _record(item: Row) -> dict[str, Any]:
    return {"prompt": _messages(item.prompt), "response": _messages(item.response), **_shared(item)}


def _dropped_record(item: Dropped) -> dict[str, Any]:
    return {**_record(item.row), "filter": item.filter, "dropped_because": item.reason}


def _pair_record(pair: Pair) -> dict[str, Any]:
    return {
        "prompt": _messages(pair.chosen.prompt),
        "chosen": _messages(pair.chosen.response),
        "rejected": _messages(pair.rejected.response),
        "id": pair.id,
        "domain": pair.chosen.domain,
        "chosen_row": _shared(pair.chosen),
        "rejected_row": _shared(pair.rejected),
    }


def _shared(item: Row) -> dict[str, Any]:
    provenance = item.provenance
    return {
        **{name: vars(item)[name] for name in _SHARED if name in vars(item)},
        "licences": list(item.licences),
        "tools": [_json(tool) for tool in item.tools],
        "prompt_source": provenance.prompt_source,
        "teacher": provenance.teacher,
        "teacher_fingerprint": provenance.teacher_fingerprint,
        "sampling": _json(provenance.sampling),
        "verifiers": _json(provenance.verifiers),
    }


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [_encoded(message) for message in messages]


def _encoded(message: Message) -> dict[str, Any]:
    unknown = sorted(set(message) - _KEYS)
    if unknown:
        raise ValueError(f"a message of {message['role']!r} has the keys {unknown}; a row can hold {sorted(_KEYS)}")
    text_of(message)
    calls = message.get("tool_calls")
    return {**message, "tool_calls": None if calls is None else [_encoded_call(call) for call in calls]}


def _encoded_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are JSON: a column of free objects would give each the keys of all others."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not {*call} <= {"id", "type", "function"} or "arguments" not in function:
        raise ValueError(f'it has the tool call {call!r:.80}; give {{"function": {{"name": ..., "arguments": ...}}}}')
    return {**call, "function": {"name": function.get("name"), "arguments": _json(function["arguments"])}}


def _message(message: Mapping[str, Any]) -> Message:
    """The message as it was before Parquet: without the keys it did not have."""
    found = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in found:
        found["tool_calls"] = [_call(call) for call in found["tool_calls"]]
    return found


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}
    return {**{key: value for key, value in call.items() if value is not None}, "function": function}


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
        writer.write(_json(record).encode())
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


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
