"""A verifier for SQL: the query's rows against those of the reference query, on SQLite in a sandbox."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..sandbox.level import require
from ..sandbox.run import Outcome, Program, Sandbox
from ..task import Task, Verdict
from .code import SANDBOX
from .extract import block
from .guard import gold, refusal

_FENCES = ("sql", "sqlite", "sqlite3")
_ORDERED = re.compile(r"\border\s+by\b(?![^()]*\))", re.IGNORECASE)  # the last one that is in no subquery
# Runs inside; the only thing there that is not ours is the text of the query.
_RUNNER = """
import json, sqlite3, sys
given = json.load(sys.stdin)
connection = sqlite3.connect(":memory:")
connection.executescript(given["database"])
try:
    rows = [[value.hex() if isinstance(value, bytes) else value for value in row]
            for row in connection.execute(given["query"])]
except (sqlite3.Error, sqlite3.Warning) as error:
    sys.exit(str(error))
print(json.dumps(rows))
"""


@dataclass(frozen=True)
class SqlRows:
    """1 where the response's query gives the rows of the task's answer, a query, on every database; else 0.

    `metadata["databases"]` lists scripts that make a database each (`metadata["database"]` is one): several tell a
    right query from one that fits the data by chance (https://arxiv.org/abs/2010.02840). The order of rows counts
    where the reference query orders them; the names of columns do not.
    """

    sandbox: Sandbox = field(default=SANDBOX)

    def check(self, task: Task) -> None:
        """A ValueError for a task without query or database; a SandboxError where the machine cannot run it safely."""
        gold(task)
        _databases(task)
        require(self.sandbox.required)

    def __call__(self, task: Task, response: str) -> Verdict:
        refused = refusal(task, response)
        query = block(response, _FENCES)
        if refused or not query or not query.strip():
            return refused or Verdict(0.0, "no SQL")
        reference = block(gold(task), _FENCES) or ""
        inputs = [
            json.dumps({"database": database, "query": each.strip()})
            for database in _databases(task)
            for each in (reference, query)
        ]
        outcomes = self.sandbox.run(Program(source=_RUNNER), inputs)
        ordered = _ORDERED.search(reference) is not None
        seen = False
        for expected, found in zip(outcomes[::2], outcomes[1::2], strict=True):
            if not expected.succeeded:
                raise ValueError(f"the reference query of task {task.id} fails: {expected.describe()}")
            rows = _rows(expected)
            if not found.succeeded:
                return Verdict(0.0, f"the query fails: {found.describe()}")
            if not _same(rows, _rows(found), ordered=ordered):
                return Verdict(0.0, f"{len(_rows(found))} rows, other than the {len(rows)} expected")
            seen = seen or bool(rows)
        if not seen:
            raise ValueError(f"the reference query of task {task.id} finds no row: any query without one would pass")
        return Verdict(1.0, "the same rows")


def _databases(task: Task) -> list[str]:
    found = task.metadata.get("databases", [task.metadata.get("database")])
    if not isinstance(found, list | tuple) or not found or not all(isinstance(each, str) for each in found):
        raise ValueError(f'task {task.id} needs "database", a script that makes one, or "databases", a list of them')
    return list(found)


def _rows(outcome: Outcome) -> list[tuple[Any, ...]]:
    return [tuple(map(_rounded, row)) for row in json.loads(outcome.stdout)]


def _rounded(value: Any) -> Any:
    """Numbers to nine digits, so that another order of adding them up makes no difference."""
    if isinstance(value, float) and math.isfinite(value):
        value = float(f"{value:.9g}")
        return int(value) if value.is_integer() else value
    return value


def _same(one: list[tuple], other: list[tuple], *, ordered: bool) -> bool:
    return one == other if ordered else Counter(one) == Counter(other)
