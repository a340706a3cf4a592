"""`posttrain sandbox`: what stands between model-written code and this machine."""

import sys

import rich.box
import rich.console
from rich.table import Table

from ...data.sandbox import probes
from ...data.sandbox.level import Level, machine, require
from ...data.sandbox.run import Sandbox

FAILED = 1


def main(name: str | None) -> None:
    """Print the level and the findings of every attack; exit with 1 where one got through that should not have."""
    console = rich.console.Console(markup=False, highlight=False)
    found = machine()
    level = found.level if name is None else Level[name.upper()]
    require(max(level, Level.PLAIN))
    console.print(f"level {found.level} ({found.level.name.lower()}) is reached{_why(found.reason)}")
    console.print(f"Landlock version {found.landlock}, seccomp {'yes' if found.seccomp else 'no'}, ", end="")
    console.print("a user of its own for every sandbox" if found.is_root else "sandboxes run as this user")
    findings = probes.check(Sandbox(required=Level.PLAIN, level=level))
    console.print(table(level, findings))
    if probes.got_through(findings, level):
        sys.exit(FAILED)


def table(level: Level, findings: list[probes.Finding]) -> Table:
    """A row per attack."""
    made = Table(
        title=f"attacks at level {level} ({level.name.lower()})",
        title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for name in ("attack", "withstood", "what got through"):
        made.add_column(name)
    for finding in findings:
        expected = "" if finding.held or finding.needed <= level else f" (needs {finding.needed.name.lower()})"
        made.add_row(finding.name, "yes" if finding.held else "NO", f"{finding.detail}{expected}")
    return made


def _why(reason: str) -> str:
    return f"; no higher, as {reason}" if reason else ""
