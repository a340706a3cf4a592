"""The data card of generated rows or pairs: Markdown with the header that dataset hubs read, and nothing that changes
from one writing to the next.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .filters.funnel import Step
from .row import Row

_ORIGINS = {
    "Teachers": ("teacher", "fingerprint"),
    "Sampling": ("settings",),
    "Prompt sources": ("source",),
    "Verifiers": ("name", "version"),
    "Licences": ("licence",),
}


class Counts:
    """What a card tells of rows, counted as they are written."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()  # by domain, as tokens
        self.tokens: Counter[str] = Counter()
        self.dropped = 0
        self.origins: dict[str, Counter[tuple[str, ...]]] = {name: Counter() for name in _ORIGINS}

    @property
    def licences(self) -> set[str]:
        """All licences of the rows."""
        return {licence for (licence,) in self.origins["Licences"]}

    def add(self, row: Row) -> None:
        """Count a row."""
        came = row.provenance
        self.rows[row.domain] += 1
        self.tokens[row.domain] += row.num_tokens
        self.origins["Teachers"][came.teacher, came.teacher_fingerprint] += 1
        self.origins["Sampling"][(json.dumps(came.sampling, sort_keys=True),)] += 1
        self.origins["Prompt sources"][(came.prompt_source,)] += 1
        self.origins["Verifiers"].update(came.verifiers.items())
        self.origins["Licences"].update((licence,) for licence in row.licences)


def of_rows(title: str, kept: Counts, steps: Sequence[Step], settings: Any, format: str = "parquet") -> str:
    """The card of what filters kept: rows and tokens by domain, the funnel, teachers, sampling, sources, licences."""
    domains = sorted({step.domain for step in steps} | set(kept.rows))
    counts = [[domain, kept.rows[domain], kept.tokens[domain]] for domain in domains]
    return "\n".join(
        [
            *_header(title, kept.licences, f"rows-*.{format}"),
            f"{kept.rows.total()} rows were kept and {kept.dropped} dropped. Each row holds its provenance; the "
            f"dropped rows, with filter and reason, are in dropped-*.{format}.",
            "",
            "## Domains",
            *_table(["domain", "rows", "response tokens"], counts),
            "## Funnel",
            *_table(["filter", *domains], funnel_rows(steps)),
            *_origins(kept),
            "## Filters",
            "```json",
            json.dumps(settings, indent=1, ensure_ascii=False),
            "```",
            "",
        ]
    )


def of_pairs(title: str, chosen: Counts, rejected: Counts) -> str:
    """The card of preference pairs, from the counts of their two sides."""
    return "\n".join(
        [
            *_header(title, chosen.licences | rejected.licences, "pairs-*.parquet"),
            f"{chosen.rows.total()} pairs of a chosen and a rejected answer.",
            "",
            "## Domains",
            *_table(["domain", "pairs"], sorted(chosen.rows.items())),
            "# Chosen",
            "",
            *_origins(chosen),
            "# Rejected",
            "",
            *_origins(rejected),
        ]
    )


def files(written: Mapping[str, Mapping[str, Any]]) -> str:
    """The part of a card that lists its files with their checksums."""
    rows = [[name, item["rows"], item["bytes"], item["sha256"]] for name, item in written.items()]
    return "\n".join(["## Files", *_table(["file", "rows", "bytes", "sha256"], rows)])


def funnel_rows(steps: Sequence[Step]) -> list[list[Any]]:
    """The funnel as a table: how many rows of each domain came in, and how many were left after each filter."""
    left: dict[str, dict[str, int]] = {"(generated)": {}}
    for step in steps:
        left["(generated)"].setdefault(step.domain, step.rows)
        left.setdefault(step.filter, {})[step.domain] = step.rows - step.dropped
    domains = sorted({step.domain for step in steps})
    return [[name, *(counts[domain] for domain in domains)] for name, counts in left.items() if counts]


def _header(title: str, licences: Iterable[str], files: str) -> list[str]:
    known = [f"license: {json.dumps(sorted(licences))}"] if licences else []
    configs = ["configs:", "- config_name: default", f"  data_files: {files}"]
    return ["---", f"pretty_name: {json.dumps(title, ensure_ascii=False)}", *known, *configs, "---", f"# {title}", ""]


def _origins(counts: Counts) -> list[str]:
    lines = []
    for name, columns in _ORIGINS.items():
        counted = sorted(counts.origins[name].items())
        if counted:
            lines += [f"## {name}", *_table([*columns, "rows"], [[*item, count] for item, count in counted])]
    return lines


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    cells = (" | ".join(str(value).replace("|", "\\|").replace("\n", " ") for value in line) for line in lines)
    return ["", *(f"| {line} |" for line in cells), ""]
