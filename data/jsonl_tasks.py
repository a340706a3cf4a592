"""Tasks from a file of JSON lines: questions with answers, code with tests, prompts with instructions to follow."""

import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from .task import Message, Task, Verdict
from .tasks import build_task, check_index, prompt_messages
from .verify.maths import FinalNumber

ROLES = ("system", "user", "assistant", "tool")
FREE_LINES = 3  # malformed lines that even a small file may have
SHOWN = 5  # malformed lines that an error names


@runtime_checkable
class Checking(Protocol):
    """A verifier that says before any work whether it can judge a task: a ValueError where it cannot."""

    def check(self, task: Task) -> None: ...


@dataclass(frozen=True, kw_only=True)
class JsonlTasks:
    """One task per line: {"prompt": text} or {"messages": [...]}, with "answer", and "domain" and "id" if you like.

    `verifier` judges all of them; `name` is the domain of lines that name none. Other fields are the task's metadata;
    a verifier that reads them ("tests", "schema", ...) has a method `check`, which is asked about every line, and then
    "answer" may be left out or be any JSON. A malformed line is skipped and recorded in `malformed` as "file:line:
    what is wrong"; more than `malformed_share` of the lines (and more than three) are an error, and so is a file
    without a single task. The file is read at first use.
    """

    path: str
    verifier: Callable[[Task, str], Verdict] = field(default_factory=FinalNumber)
    name: str = "jsonl"
    system: str | None = None
    malformed_share: float = 0.01

    @property
    def domain(self) -> str:
        return self.name

    @property
    def malformed(self) -> tuple[str, ...]:
        """The lines that were skipped, each with its place and what is wrong with it."""
        return self._read[1]

    def __len__(self) -> int:
        return len(self._read[0])

    def __getitem__(self, index: int) -> Task:
        return self._read[0][check_index(index, len(self))]

    @cached_property
    def _read(self) -> tuple[list[Task], tuple[str, ...]]:
        path = Path(self.path)
        if not path.is_file():
            raise FileNotFoundError(f"no task file {self.path}: give the path of a file of JSON lines")
        tasks: list[Task] = []
        malformed: list[str] = []
        num_lines = 0
        lines_by_id: dict[str, int] = {}
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                num_lines += 1
                try:
                    task = self._task(line)
                    if lines_by_id.setdefault(task.id, number) != number:
                        raise ValueError(f"repeats the task or id of line {lines_by_id[task.id]}")
                    tasks.append(task)
                except (ValueError, RecursionError) as error:
                    malformed.append(f"{self.path}:{number}: {error}")
        self._refuse(len(tasks), num_lines, malformed)
        return tasks, tuple(malformed)

    def _refuse(self, num_tasks: int, num_lines: int, malformed: list[str]) -> None:
        shown = "; ".join(malformed[:SHOWN]) + ("; ..." if len(malformed) > SHOWN else "")
        if len(malformed) > max(FREE_LINES, self.malformed_share * num_lines):
            raise ValueError(
                f"{len(malformed)} of {num_lines} lines are malformed, more than {self.malformed_share:.1%}: {shown}. "
                "Repair the file, or raise malformed_share to skip them"
            )
        if num_tasks == 0:
            raise ValueError(f"{self.path} holds no task{': ' if shown else ''}{shown}")

    def _task(self, line: bytes) -> Task:
        row = json.loads(line)  # undecodable bytes are a ValueError too
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, got {type(row).__name__}")
        for name in ("domain", "id"):
            if not isinstance(row.get(name, ""), str):
                raise ValueError(f'"{name}" must be text, got {row[name]!r}')
        task = build_task(
            row.get("domain") or self.name,
            self._messages(row),
            self.verifier,
            answer=_any_answer(row) if isinstance(self.verifier, Checking) else _answer(row),
            metadata={key: value for key, value in row.items() if key not in _OWN},
            id=row.get("id"),
        )
        if isinstance(self.verifier, Checking):
            self.verifier.check(task)
        return task

    def _messages(self, row: dict[str, Any]) -> tuple[Message, ...]:
        if ("prompt" in row) == ("messages" in row):
            raise ValueError('needs either "prompt" or "messages"')
        if "prompt" in row:
            if not isinstance(row["prompt"], str) or not row["prompt"].strip():
                raise ValueError(f'"prompt" must be text that is not blank, got {reprlib.repr(row["prompt"])}')
            return prompt_messages(row["prompt"], self.system)
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise ValueError(f'"messages" must be a list that is not empty, got {reprlib.repr(messages)}')
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                raise ValueError(
                    f'a message must be an object with "role" and text as "content", got {reprlib.repr(message)}'
                )
            if message.get("role") not in ROLES:
                raise ValueError(f"a message has the role {message.get('role')!r}, not one of {', '.join(ROLES)}")
        if messages[-1]["role"] == "assistant":
            raise ValueError("the last message is the assistant's: there is nothing left to answer")
        if self.system is None or messages[0]["role"] == "system":
            return tuple(messages)
        return ({"role": "system", "content": self.system}, *messages)


_OWN = ("prompt", "messages", "answer", "domain", "id")


def _any_answer(row: dict[str, Any]) -> str | None:
    """None, text, or other JSON as text."""
    answer = row.get("answer")
    return answer if answer is None or isinstance(answer, str) else json.dumps(answer)


def _answer(row: dict[str, Any]) -> str:
    answer = row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
        return str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f'"answer" must be a number or text that is not blank, got {reprlib.repr(answer)}')
    return answer
