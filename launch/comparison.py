"""What a recipe that compares models returns: which models, where their scores are, who taught what."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """A model in a comparison.

    `evaluation` is the folder of its Evaluate stage, `stages` the folders of the stages that made it from the start.
    """

    name: str
    evaluation: str
    stages: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Models to compare. The first entry is the start; `teachers` names, per domain, the entry that taught it.

    Recovery of an entry in a domain = (its score - start) / (teacher - start); of an entry, the mean over domains.
    """

    title: str
    entries: tuple[Entry, ...]
    teachers: Mapping[str, str]


def write(comparison: Comparison, out: Path) -> None:
    """Store as `out`/comparison.json; folders below `out` are written relative to it, so that it may be moved."""

    def inside(folder: str) -> str:
        path = Path(folder)
        return str(path.relative_to(out)) if path.is_relative_to(out) else str(path.resolve())

    content = {
        "title": comparison.title,
        "entries": [
            {"name": entry.name, "evaluation": inside(entry.evaluation), "stages": [inside(s) for s in entry.stages]}
            for entry in comparison.entries
        ],
        "teachers": dict(comparison.teachers),
    }
    (out / "comparison.json").write_text(json.dumps(content, indent=2) + "\n")


def read(out: Path) -> Comparison:
    """What `write` stored, with the folders where they are now."""
    content = json.loads((out / "comparison.json").read_text())
    entries = tuple(
        Entry(entry["name"], str(out / entry["evaluation"]), tuple(str(out / stage) for stage in entry["stages"]))
        for entry in content["entries"]
    )
    return Comparison(title=content["title"], entries=entries, teachers=content["teachers"])
