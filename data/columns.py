"""Rows and pairs as records of Arrow columns, and back: what the columns cannot hold as it is, they hold as JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow

from . import chat, source
from .filters.funnel import Dropped
from .pairs import Pair
from .row import Provenance, Row, text_of
from .source import Record
from .task import Message

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


def of_row(item: Row) -> dict[str, Any]:
    """A row as a record of `ROWS`. Raises ValueError for a message that the columns cannot hold."""
    return {"prompt": of_messages(item.prompt), "response": of_messages(item.response), **_shared(item)}


def of_dropped(item: Dropped) -> dict[str, Any]:
    """A dropped row as a record of `DROPPED`."""
    return {**of_row(item.row), "filter": item.filter, "dropped_because": item.reason}


def of_pair(pair: Pair) -> dict[str, Any]:
    """A pair as a record of `PAIRS`."""
    return {
        "prompt": of_messages(pair.chosen.prompt),
        "chosen": of_messages(pair.chosen.response),
        "rejected": of_messages(pair.rejected.response),
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
        "tools": [to_json(tool) for tool in item.tools],
        "prompt_source": provenance.prompt_source,
        "teacher": provenance.teacher,
        "teacher_fingerprint": provenance.teacher_fingerprint,
        "sampling": to_json(provenance.sampling),
        "verifiers": to_json(provenance.verifiers),
    }


def of_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the columns hold them. Raises ValueError for keys or contents that they cannot."""
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
    return {**call, "function": {"name": function.get("name"), "arguments": to_json(function["arguments"])}}


def _message(message: Mapping[str, Any]) -> Message:
    """The message as it was before Parquet: without the keys it did not have."""
    found = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in found:
        found["tool_calls"] = [_call(call) for call in found["tool_calls"]]
    return found


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}
    return {**{key: value for key, value in call.items() if value is not None}, "function": function}


def to_json(value: Any) -> str:
    """JSON that is the same for the same value."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
