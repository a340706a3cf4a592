"""A generated row: a prompt, what a teacher answered, what verifiers said of it, and where all of it came from."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from .task import Message

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a row came from, so that it can be made again: everything here is plain JSON.

    `verifiers` holds the version of each verifier and reward model that scored the row, by name; `teacher_fingerprint`
    is a hash of the teacher's weights, or what an API tells of its version.
    """

    prompt_source: str
    teacher: str
    teacher_fingerprint: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    verifiers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One answer to one prompt. `prompt` may hold earlier turns; `response` is what was generated, with tool results.

    `num_tokens` counts the tokens of the response; `score` is the verdict's, None where nothing verified it;
    `pass_rate` is the share of all the prompt's answers that pass; `licences` are those of the prompt's source and of
    the teacher's outputs, SPDX names where there are any. Raises ValueError for values out of range.
    """

    id: str
    prompt_id: str
    domain: str
    prompt: tuple[Message, ...]
    response: tuple[Message, ...]
    finish: Literal["stop", "length", "aborted"]
    num_tokens: int
    provenance: Provenance
    licences: tuple[str, ...] = ()
    score: float | None = None
    reason: str = ""
    pass_rate: float | None = None
    reward: float | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self):
        if not self.prompt or not self.response:
            raise ValueError(f"row {self.id!r} has an empty prompt or response; give each at least one message")
        for name, value in (("score", self.score), ("pass_rate", self.pass_rate)):
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"the {name} of row {self.id!r} is {value}; give a number in [0, 1], or None")
        if self.reward is not None and not math.isfinite(self.reward):
            raise ValueError(f"the reward of row {self.id!r} is {self.reward}; give a finite number, or None")


class Thought(NamedTuple):
    """An assistant's message taken apart: its thinking (None if there is none), its answer, what is wrong with it."""

    thinking: str | None
    answer: str
    fault: str | None


def thought(message: Message) -> Thought:
    """Split thinking from answer: `reasoning_content` (DeepSeek's and Qwen's key), or <think>...</think> in the text.

    Templates that open the thinking in the prompt leave a text that only closes it; that counts as thinking too.
    """
    content = text_of(message)
    if message.get("reasoning_content") is not None:
        fault = "it has marks of thinking outside of its thinking" if OPEN in content or CLOSE in content else None
        return Thought(str(message["reasoning_content"]), content, fault)
    before, closed, answer = content.partition(CLOSE)
    opened = before.lstrip().startswith(OPEN)
    if not closed:
        return Thought(before, "", "its thinking never ends") if OPEN in before else Thought(None, content, None)
    thinking = before.lstrip().removeprefix(OPEN) if opened else before
    doubled = OPEN in thinking or OPEN in answer or CLOSE in answer
    return Thought(thinking, answer, "it opens or closes its thinking more than once" if doubled else None)


def text_of(message: Message) -> str:
    """The text of a message; "" where it only calls tools. Raises ValueError for a content that is not a text."""
    content = message.get("content")
    if content is None:
        return ""
    if not isinstance(content, str):
        raise ValueError(f"a message of {message.get('role')!r} has {content!r:.60} as its content; give one text")
    return content


def written(row: Row) -> str:
    """All that the assistant wrote in the response, thinking included (without its marks), tool results left out."""
    parts = []
    for message in assistant_messages(row):
        content = text_of(message).replace(OPEN, "\n\n").replace(CLOSE, "\n\n")
        parts += [str(message.get("reasoning_content") or ""), content]
    return "\n\n".join(part for part in parts if part)


def answered(row: Row) -> str:
    """What the assistant said in the response, without its thinking."""
    answers = (thought(message).answer.strip() for message in assistant_messages(row))
    return "\n\n".join(answer for answer in answers if answer)


def asked(row: Row) -> str:
    """The texts of the prompt but for its system message, which many prompts share."""
    return "\n\n".join(text_of(message) for message in row.prompt if message["role"] != "system")


def assistant_messages(row: Row) -> tuple[Message, ...]:
    """The response's messages that the assistant wrote."""
    return tuple(message for message in row.response if message["role"] == "assistant")


def with_pass_rates(rows: Iterable[Row], *, passing: float = 1.0) -> list[Row]:
    """The rows with the share of their prompt's rows whose score is at least `passing`.

    Give all answers to each prompt: after a filter the rates would be those of the survivors. Rows without a score
    keep their pass rate.
    """
    rows = list(rows)
    passed: defaultdict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row.score is not None:
            passed[row.prompt_id].append(row.score >= passing)
    rates = {prompt: sum(found) / len(found) for prompt, found in passed.items()}
    return [row if row.score is None else replace(row, pass_rate=rates[row.prompt_id]) for row in rows]
