"""Records on disk, each at its index: JSON lines, Parquet, ArrayRecord."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import grain
import numpy as np
import pyarrow
from pyarrow import parquet

from .task import Message

log = logging.getLogger(__name__)

Record = Mapping[str, Any]
T = TypeVar("T")


class Preference(NamedTuple):
    """A conversation so far, and a better and a worse way to go on."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


def conversation(record: Record) -> tuple[Message, ...]:
    """The messages of a record: {"messages": [...]}, or {"prompt", "response"}, or {"prompt", "completion"}.

    A prompt or an answer is a text or a list of messages. Raises ValueError that names the keys found instead.
    """
    if "messages" in record:
        return messages(record["messages"], "user")
    for answer in ("response", "completion"):
        if "prompt" in record and answer in record:
            return (*messages(record["prompt"], "user"), *messages(record[answer], "assistant"))
    raise ValueError(f"it has the keys {sorted(record)} and needs messages, or prompt with response or completion")


def preference(record: Record) -> Preference:
    """A record {"prompt", "chosen", "rejected"}, each a text or a list of messages.

    Both answers may repeat the prompt. Without one, what the two conversations have in common is the prompt, up to the
    last message that is not the assistant's.
    """
    missing = [key for key in ("chosen", "rejected") if key not in record]
    if missing:
        raise ValueError(f"it has the keys {sorted(record)} and lacks {missing}")
    chosen, rejected = (messages(record[key], "assistant") for key in ("chosen", "rejected"))
    if "prompt" in record:
        prompt = messages(record["prompt"], "user")
    else:
        pairs = enumerate(zip(chosen, rejected, strict=False))
        shared = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(chosen), len(rejected)))
        while shared and chosen[shared - 1]["role"] == "assistant":
            shared -= 1
        prompt = chosen[:shared]
        if not prompt:
            raise ValueError(
                f"it has the keys {sorted(record)} and lacks ['prompt'], or conversations that begin alike"
            )
    answers = [said[len(prompt) :] if said[: len(prompt)] == prompt else said for said in (chosen, rejected)]
    if not all(answers):
        raise ValueError("its chosen or its rejected conversation ends with the prompt; add the answer")
    return Preference(prompt, *answers)


def messages(value: Any, role: str) -> tuple[Message, ...]:
    """A text as one message of `role`, or a list of messages as it is. Raises ValueError for anything else."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    if not isinstance(value, list) or not value:
        raise ValueError(f"it has {value!r:.80} where a text or a list of messages belongs")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"it has {message!r:.80} where a message with a role belongs")
        if message.get("content") is None and not message.get("tool_calls"):
            raise ValueError(f"it has a message of {message['role']!r} without content")
    # Columnar formats fill keys that other messages have with None.
    return tuple({key: item for key, item in message.items() if item is not None} for message in value)


class JsonLines(Generic[T]):
    """The records of JSON Lines files, parsed when asked for; every line is checked once, at the start.

    `malformed` names the lines that are left out, as `file:line: reason`.
    """

    def __init__(self, paths: Sequence[Path], parse: Callable[[Record], T], max_malformed: float) -> None:
        places: list[tuple[int, int, int]] = []
        malformed: list[str] = []
        for number, path in enumerate(paths):
            offset = 0
            with path.open("rb") as file:
                for row, line in enumerate(file, start=1):
                    if line.strip():
                        try:
                            _parse_json(line, parse)
                            places.append((number, offset, len(line)))
                        except ValueError as error:
                            malformed.append(f"{path}:{row}: {error}")
                    offset += len(line)
        self._paths = tuple(paths)
        self._parse = parse
        self._places = np.asarray(places, np.int64).reshape(-1, 3)
        self.malformed = tuple(malformed)
        for line in malformed[:5]:
            log.warning("left out a malformed line, %s", line)
        total = len(places) + len(malformed)
        if len(malformed) > max_malformed * total:
            raise ValueError(
                f"{len(malformed)} of {total} lines are malformed and at most {max_malformed:.2%} may be; "
                f"repair the data, the first is {malformed[0]}"
            )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> T:
        number, offset, size = self._places[index]
        with self._paths[number].open("rb") as file:
            file.seek(offset)
            return _parse_json(file.read(size), self._parse)


class Parquet(Generic[T]):
    """The rows of Parquet files. They are held in memory as Arrow columns; a row becomes Python when asked for."""

    malformed: tuple[str, ...] = ()  # a row that cannot be used is an error when asked for

    def __init__(self, paths: Sequence[Path], parse: Callable[[Record], T]) -> None:
        self._table = pyarrow.concat_tables([parquet.read_table(path) for path in paths], promote_options="default")
        self._parse = parse
        self._name = ", ".join(map(str, paths))

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> T:
        (row,) = self._table.slice(index, 1).to_pylist()
        try:
            return self._parse({key: value for key, value in row.items() if value is not None})
        except ValueError as error:
            raise ValueError(f"row {index} of {self._name} cannot be used: {error}") from error


class ArrayRecords(Generic[T]):
    """The records of ArrayRecord files, each a JSON object, read when asked for."""

    malformed: tuple[str, ...] = ()  # a record that cannot be used is an error when asked for

    def __init__(self, paths: Sequence[Path], parse: Callable[[Record], T]) -> None:
        self._source = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
        self._parse = parse
        self._name = ", ".join(map(str, paths))

    def __len__(self) -> int:
        return len(self._source)  # pyright: ignore[reportArgumentType] - its base class comes untyped

    def __getitem__(self, index: int) -> T:
        try:
            return _parse_json(self._source[index], self._parse)
        except ValueError as error:
            raise ValueError(f"record {index} of {self._name} cannot be used: {error}") from error


def read(
    *paths: str | os.PathLike[str], parse: Callable[[Record], T] = conversation, max_malformed: float = 0.01
) -> JsonLines[T] | Parquet[T] | ArrayRecords[T]:
    """Open files of one format, told by their suffix: .jsonl, .parquet, .array_record (or .arrayrecord).

    `parse` turns a record into what training wants, and raises ValueError for one that it cannot use. Malformed
    lines of JSON are left out, named and counted; more than `max_malformed` of them, or no record at all, are an error.
    """
    files = [Path(path) for path in paths]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}; check the path")
    suffixes = {file.suffix for file in files}
    if suffixes == {".jsonl"}:
        records = JsonLines(files, parse, max_malformed)
    elif suffixes == {".parquet"}:
        records = Parquet(files, parse)
    elif suffixes and suffixes <= {".array_record", ".arrayrecord"}:
        records = ArrayRecords(files, parse)
    else:
        raise ValueError(
            f"the files end in {sorted(suffixes)}; give files of one kind: .jsonl, .parquet or .array_record"
        )
    if len(records) == 0:
        raise ValueError(f"there is no record in {', '.join(map(str, files))}; give files with at least one")
    return records


def scan(*paths: str | os.PathLike[str], parse: Callable[[Record], T]) -> Iterator[T]:
    """The records of Parquet or ArrayRecord files one after the other, a few hundred in memory at a time; maybe none.

    `parse` as in `read`.
    """
    for path in map(Path, paths):
        if path.suffix != ".parquet":
            records = ArrayRecords([path], parse)
            yield from (records[index] for index in range(len(records)))
            continue
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield parse({key: value for key, value in row.items() if value is not None})


def _parse_json(text: bytes, parse: Callable[[Record], T]) -> T:
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"it is a {type(record).__name__} and not an object")
    return parse(record)
