"""A peer in an environment of its own: whether it is there, requests to its side over a pipe, rates beside ours."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Package:
    """A peer: its name, what has to be installed for it, and how one installs that."""

    name: str
    needs: tuple[str, ...]
    install: str

    def missing(self, python: Path | None) -> str | None:
        """Why the peer cannot run with that interpreter, in one sentence, or None."""
        if python is None:
            return f"{self.name} is not compared: no environment with it was named; {self.install}."
        if not python.exists():
            return f"{self.name} is not compared: there is no {python}; {self.install}."
        probe = "import importlib.metadata as m, sys; [m.version(name) for name in sys.argv[1:]]"
        if subprocess.run([python, "-c", probe, *self.needs], capture_output=True, check=False).returncode:
            return f"{self.name} is not compared: {python} does not have it; {self.install}."
        return None


TUNIX = Package(
    name="google-tunix",
    needs=("google-tunix",),
    install="make one with `python3 -m venv tunix-env && tunix-env/bin/pip install google-tunix` and pass "
    "--tunix-python tunix-env/bin/python",
)
TRL = Package(
    name="TRL",
    needs=("trl", "torch"),
    install="make one with `python3 -m venv trl-env && trl-env/bin/pip install trl torch` and pass "
    "--trl-python trl-env/bin/python",
)


class Peer:
    """A peer's side, a script beside this file: a JSON object a line goes in, one comes back. The first is settings."""

    def __init__(self, package: Package, script: str, python: Path, folder: Path, settings: Mapping[str, Any]) -> None:
        self.package, self.errors = package, folder / "errors.txt"
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors.open("w"), text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.versions: dict[str, str] = self.ask({**settings, "folder": str(folder)})

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What the peer answers."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.package.name}'s side ended; its last words: {self.errors.read_text()[-3000:]}")
        return json.loads(answer)

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Our rate over theirs: of the medians, and the extremes over single rounds."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ours) / statistics.median(theirs)
    return {"ratio": ratio, "ratio_min": min(each), "ratio_max": max(each)}


def show(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """The table that people read, and sentences below it; the first column has what is compared."""
    table = Table(title=title, caption_justify="left")
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)


def spread(row: Mapping[str, float]) -> tuple[str, str]:
    """The ratio of a summary's row and that of single rounds, as cells; dashes where there was no peer."""
    if "ratio" not in row:
        return "-", "-"
    return f"{row['ratio']:.2f}", f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"


def shares(seconds: Mapping[str, float]) -> str:
    """Where the time of a step goes, in the order of a step."""
    total = sum(seconds.values())
    return ", ".join(f"{name} {value / total:.0%}" for name, value in seconds.items())
