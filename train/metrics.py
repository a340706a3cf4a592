"""What a stage writes down while it runs: metrics.jsonl, where the time went, and a progress bar."""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import rich.progress

from ..sharding import hosts
from . import attempts, trackers, watchdog

_COMPILE_EVENTS = ("/jax/core/compile/backend_compile_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")
_running: list["Log"] = []


def _on_duration(event: str, duration: float, **_: Any) -> None:
    if _running and event in _COMPILE_EVENTS:
        _running[-1].add_compile(duration)
        watchdog.beat("compile")


jax.monitoring.register_event_duration_secs_listener(_on_duration)  # pyright: ignore[reportArgumentType]


class Log:
    """The record of one stage. A context manager: compilations that happen inside are charged to it.

    metrics.jsonl has one line per step: the step, the stage's numbers, and `seconds` by phase since the line before.
    When a run goes on from step n, lines past n are dropped first, so no step is counted twice, and their seconds are
    charged to "wasted". Of several hosts the first writes; `own` sums up the seconds of each.
    """

    def __init__(self, folder: Path, *, title: str, total: int, start: int = 0) -> None:
        self.folder, self.path, self.writes = folder, folder / "metrics.jsonl", hosts.is_first()
        self.seconds: dict[str, float] = defaultdict(float)
        self.own: dict[str, float] = defaultdict(float)
        self.title, self._start, self._nested = title, start, 0.0
        self._trackers: list[trackers.Tracker] = []
        if self.writes:
            folder.mkdir(parents=True, exist_ok=True)
            self._keep_until(start)
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:<24}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("eta"),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
            disable=not self.writes,
        )
        self._task = self._progress.add_task(title, total=total, completed=start, note="")

    def __enter__(self) -> "Log":
        if self.writes:
            self._trackers = trackers.opened(self.folder, start=self._start)
        _running.append(self)
        self._progress.start()
        begun = attempts.started(self.folder) if self.writes else None
        if begun is not None:
            self.seconds[self.opening] += max(0.0, time.time() - begun)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        _running.remove(self)
        for tracker in self._trackers:
            tracker.close()
        if self.writes:
            attempts.note(self.folder, self.lap())

    @property
    def opening(self) -> str:
        """The phase before the first step: "init", or "recovery" where a run goes on."""
        return "recovery" if self._start else "init"

    def waste(self) -> None:
        """What was done since the last line is thrown away."""
        lost = sum(self.seconds.values())
        self.seconds.clear()
        self.seconds["wasted"] = lost

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the wall time inside to `name`, less what phases and compilations inside it take."""
        watchdog.beat(f"{self.title}: {name}")
        outer, self._nested = self._nested, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self._charge(name, max(took - self._nested, 0.0))
            self._nested = outer + took

    def add_compile(self, duration: float) -> None:
        """Charge a compilation."""
        self._charge("compile", duration)
        self._nested += duration

    def _charge(self, name: str, seconds: float) -> None:
        self.seconds[name] += seconds
        self.own[name] += seconds
        if self.writes:
            attempts.alive(self.folder)

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap."""
        seconds = {name: round(value, 4) for name, value in self.seconds.items()}
        self.seconds.clear()
        return seconds

    def write(self, step: int, values: Mapping[str, Any], seconds: Mapping[str, float] | None = None) -> None:
        """Append the line of a step, with the seconds of a lap (now unless given), and move the bar to it."""
        numbers = {name: _plain(value) for name, value in values.items()}
        line = {"step": step, **numbers, "seconds": dict(self.lap() if seconds is None else seconds)}
        watchdog.beat(f"{self.title}: step {step}")
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        for tracker in self._trackers:
            tracker.write(step, trackers.flat(line))
        shown = [name for name in ("reward", "kl", "loss") if name in numbers][:2]
        note = "  ".join(f"{name} {numbers[name]:.3f}" for name in shown)
        self._progress.update(self._task, completed=step, note=note)

    def tick(self, completed: float, *, note: str = "") -> None:
        """Move the bar without writing a line."""
        self._progress.update(self._task, completed=completed, note=note)

    def _keep_until(self, step: int) -> None:
        if self.path.exists():
            lines = read(self.path)
            kept = [line for line in lines if line["step"] <= step]
            lost = sum(sum(line["seconds"].values()) for line in lines[len(kept) :])
            if lost:
                self.seconds["wasted"] += lost
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            partial.rename(self.path)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line torn by a kill is left out."""
    lines = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def _plain(value: Any) -> Any:
    return float(value) if hasattr(value, "dtype") else value
