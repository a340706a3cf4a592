"""The data card of generated rows or pairs: Markdown with the header that dataset hubs read, and nothing that changes
from one writing to the next.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .filters.funnel import Funnel
from .pairs import Pair
from .row import Row


def of_rows(title: str, found: Funnel, settings: Any, format: str = "parquet") -> str:
    """The card of what a funnel kept: rows and tokens by domain, the funnel, teachers, sampling, sources, licences."""
    domains = sorted({step.domain for step in found.steps} | {row.domain for row in found.kept})
    kept = {domain: [row for row in found.kept if row.domain == domain] for domain in domains}
    counts = [[domain, len(rows), sum(row.num_tokens for row in rows)] for domain, rows in kept.items()]
    return "\n".join(
        [
            *_header(title, found.kept, f"rows-*.{format}"),
            f"{len(found.kept)} rows were kept and {len(found.dropped)} dropped. Each row holds its provenance; the "
            f"dropped rows, with filter and reason, are in dropped-*.{format}.",
            "",
            "## Domains",
            *_table(["domain", "rows", "response tokens"], counts),
            "## Funnel",
            *_table(["filter", *domains], funnel_rows(found)),
            *_origins(found.kept),
            "## Filters",
            "```json",
            json.dumps(settings, indent=1, ensure_ascii=False),
            "```",
            "",
        ]
    )


def of_pairs(title: str, pairs: Sequence[Pair]) -> str:
    """The card of preference pairs."""
    counts = Counter(pair.chosen.domain for pair in pairs)
    return "\n".join(
        [
            *_header(title, [row for pair in pairs for row in (pair.chosen, pair.rejected)], "pairs-*.parquet"),
            f"{len(pairs)} pairs of a chosen and a rejected answer.",
            "",
            "## Domains",
            *_table(["domain", "pairs"], sorted(counts.items())),
            "# Chosen",
            "",
            *_origins([pair.chosen for pair in pairs]),
            "# Rejected",
            "",
            *_origins([pair.rejected for pair in pairs]),
        ]
    )


def files(written: Mapping[str, Mapping[str, Any]]) -> str:
    """The part of a card that lists its files with their checksums."""
    rows = [[name, item["rows"], item["bytes"], item["sha256"]] for name, item in written.items()]
    return "\n".join(["## Files", *_table(["file", "rows", "bytes", "sha256"], rows)])


def funnel_rows(found: Funnel) -> list[list[Any]]:
    """The funnel as a table: how many rows of each domain came in, and how many were left after each filter."""
    left: dict[str, dict[str, int]] = {"(generated)": {}}
    for step in found.steps:
        left["(generated)"].setdefault(step.domain, step.rows)
        left.setdefault(step.filter, {})[step.domain] = step.rows - step.dropped
    domains = sorted({step.domain for step in found.steps})
    return [[name, *(counts[domain] for domain in domains)] for name, counts in left.items() if counts]


def _header(title: str, rows: Sequence[Row], files: str) -> list[str]:
    licences = sorted({licence for row in rows for licence in row.licences})
    known = [f"license: {json.dumps(licences)}"] if licences else []
    configs = ["configs:", "- config_name: default", f"  data_files: {files}"]
    return ["---", f"pretty_name: {json.dumps(title, ensure_ascii=False)}", *known, *configs, "---", f"# {title}", ""]


def _origins(rows: Sequence[Row]) -> list[str]:
    parts = [
        (
            "Teachers",
            ["teacher", "fingerprint"],
            ((r.provenance.teacher, r.provenance.teacher_fingerprint) for r in rows),
        ),
        ("Sampling", ["settings"], ((json.dumps(r.provenance.sampling, sort_keys=True),) for r in rows)),
        ("Prompt sources", ["source"], ((r.provenance.prompt_source,) for r in rows)),
        ("Verifiers", ["name", "version"], (item for r in rows for item in r.provenance.verifiers.items())),
        ("Licences", ["licence"], ((licence,) for r in rows for licence in r.licences)),
    ]
    lines = []
    for name, columns, items in parts:
        counted = sorted(Counter(items).items())
        if counted:
            lines += [f"## {name}", *_table([*columns, "rows"], [[*item, count] for item, count in counted])]
    return lines


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    cells = (" | ".join(str(value).replace("|", "\\|").replace("\n", " ") for value in line) for line in lines)
    return ["", *(f"| {line} |" for line in cells), ""]
