"""How many programs the sandbox runs in a second, beside the bare start of an interpreter, on all cores.

    .venv/bin/python benchmarks/sandbox_throughput.py --rounds 5

The floor is `python -I` with an empty program: a process that nobody walls off, watches or listens to. Sandboxes of
each level run a program that reads a line and prints a number; then unit tests in a second process, and twenty inputs
for one program, as a programming task has. All take turns, a round each, with as many threads as there are cores.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import tyro

from posttrain.data.sandbox.level import Level, interpreter, machine
from posttrain.data.sandbox.run import Program, Sandbox

PROGRAM = Program(source="print(int(input()) + 1)")
INPUTS = 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`rounds` rounds of `runs` processes or sandboxes for every row."""

    rounds: int = 5
    runs: int = 60


def bare(*flags: str) -> Callable[[], int]:
    command = [interpreter(Level.BUBBLEWRAP), *flags, "-c", "pass"]

    def run() -> int:
        subprocess.run(command, env={}, stdin=subprocess.DEVNULL, check=True)
        return 1

    return run


def programs(sandbox: Sandbox, inputs: int) -> Callable[[], int]:
    def run() -> int:
        outcomes = sandbox.run(PROGRAM, ["41"] * inputs)
        assert [outcome.stdout for outcome in outcomes] == ["42\n"] * inputs
        return inputs

    return run


def tests(sandbox: Sandbox) -> Callable[[], int]:
    def run() -> int:
        failures, _ = sandbox.test("def add(a, b): return a + b", ["assert add(2, 3) == 5"] * 3)
        assert failures == [""] * 3
        return 1

    return run


def rate(run: Callable[[], int], runs: int) -> float:
    """Runs in a second, on all cores."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = sum(pool.map(lambda _: run(), range(runs)))
    return done / (time.perf_counter() - begun)


def main(settings: Settings) -> None:
    rows: dict[str, tuple[Callable[[], int], int]] = {"python -I, the floor": (bare("-I"), settings.runs)}
    rows["python -I -S"] = (bare("-I", "-S"), settings.runs)
    for level in (level for level in reversed(Level) if Level.NONE < level <= machine().level):
        sandbox, name = Sandbox(required=Level.PLAIN, level=level), level.name.lower()
        rows[f"{name}: one program"] = (programs(sandbox, 1), settings.runs)
        rows[f"{name}: unit tests"] = (tests(sandbox), settings.runs)
        rows[f"{name}: {INPUTS} inputs, each a process"] = (programs(sandbox, INPUTS), max(2, settings.runs // INPUTS))
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(settings.rounds + 1):  # the first warms up
        for name, (run, runs) in rows.items():
            measured = rate(run, runs)
            if number:
                rates[name].append(measured)
    floor = rates["python -I, the floor"]
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, medians of {settings.rounds} rounds\n")
    print("| | a second | times the floor's time (least, most of a round) |\n|---|---|---|")
    for name, found in rates.items():
        ratios = [base / own for base, own in zip(floor, found, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        print(f"| {name} | {statistics.median(found):.1f} | {spread} |")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
