"""`posttrain report`: the report of a run folder, made anew."""

from pathlib import Path

from . import run


def main(out: Path) -> None:
    """Write `out`/report.html and report.json, and print the table."""
    run.show(out)
