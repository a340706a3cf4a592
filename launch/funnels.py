"""What filters made of generated rows, for the report: how many rows of each domain were left after each filter."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """The funnel of a stage: steps from "generated" on, and per domain how many rows were left after each."""

    name: str
    steps: tuple[str, ...]
    left: dict[str, tuple[int, ...]]

    @property
    def rows(self) -> list[tuple[str, tuple[int, ...]]]:
        """A line per step: its name, and how many rows of each domain were left."""
        return [(step, tuple(counts[place] for counts in self.left.values())) for place, step in enumerate(self.steps)]


def read(out: Path, names: Sequence[str]) -> list[Stage]:
    """The funnels of those stages of a run that filtered rows."""
    found = []
    for name in names:
        for folder in ("rows", "nothing-kept"):
            file = out / name / folder / "manifest.json"
            steps = json.loads(file.read_text(encoding="utf-8"))["steps"] if file.is_file() else []
            if steps:
                found.append(_funnel(name, steps))
    return found


def _funnel(name: str, steps: Sequence[dict[str, Any]]) -> Stage:
    left: dict[str, list[int]] = {}
    for step in steps:
        counts = left.setdefault(step["domain"], [step["rows"]])
        counts.append(step["rows"] - step["dropped"])
    filters = dict.fromkeys(step["filter"] for step in steps)
    return Stage(name, ("generated", *filters), {domain: tuple(counts) for domain, counts in left.items()})
