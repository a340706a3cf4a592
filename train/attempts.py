"""Attempts at a stage: when each began and how it ended, also one that was killed and could not say so.

`attempts.jsonl` has a line per attempt: started (Unix time), seconds, end (done, interrupted, failed or killed), and
phases: seconds that no line of metrics.jsonl holds. An attempt that goes on is in `.attempt`, a file that is touched as
long as the process lives.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE, OPEN = "attempts.jsonl", ".attempt"
ALIVE_SECONDS = 1.0
_seen = 0.0


def begin(folder: Path, started: float) -> None:
    """Note that an attempt has begun, at this Unix time. One that never ended was killed."""
    if (folder / OPEN).is_file():
        _append(folder, *_killed(folder))
    _write(folder, {"started": started, "phases": {}})


def alive(folder: Path) -> None:
    """Note that the attempt is going on; a call may be soon after the last, the disk may be a bucket."""
    global _seen
    if time.monotonic() - _seen > ALIVE_SECONDS and (folder / OPEN).is_file():
        os.utime(folder / OPEN)
        _seen = time.monotonic()


def started(folder: Path) -> float | None:
    """When the attempt that is going on began."""
    found = _open(folder)
    return found["started"] if found else None


def note(folder: Path, phases: Mapping[str, float]) -> None:
    """Add seconds that will be in no line of the log."""
    found = _open(folder)
    if found and phases:
        names = dict.fromkeys([*found["phases"], *phases])
        found["phases"] = {name: found["phases"].get(name, 0.0) + phases.get(name, 0.0) for name in names}
        _write(folder, found)


def end(folder: Path, how: str) -> None:
    """Note that the attempt has ended."""
    found = _open(folder)
    if found:
        _append(folder, found, time.time() - found["started"], how)


def read(folder: Path) -> list[dict[str, Any]]:
    """The attempts that have ended, and the one that was killed and not yet noted."""
    file = folder / FILE
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [*lines, _line(*_killed(folder))] if (folder / OPEN).is_file() else lines


def _killed(folder: Path) -> tuple[dict[str, Any], float, str]:
    """An attempt that did not end: it lived until it last said so, and what it did after its last line is wasted."""
    found = _open(folder) or {"started": (folder / OPEN).stat().st_mtime, "phases": {}}
    seen, log = (folder / OPEN).stat().st_mtime, folder / "metrics.jsonl"
    logged = max(found["started"], log.stat().st_mtime if log.is_file() else 0.0)
    wasted = found["phases"].get("wasted", 0.0) + max(0.0, seen - logged)
    return {**found, "phases": {**found["phases"], "wasted": wasted}}, max(0.0, seen - found["started"]), "killed"


def _append(folder: Path, found: Mapping[str, Any], seconds: float, how: str) -> None:
    with (folder / FILE).open("a") as file:
        file.write(json.dumps(_line(found, seconds, how)) + "\n")
    (folder / OPEN).unlink()


def _line(found: Mapping[str, Any], seconds: float, how: str) -> dict[str, Any]:
    phases = {name: round(value, 3) for name, value in found["phases"].items()}
    return {"started": round(found["started"], 1), "seconds": round(seconds, 3), "end": how, "phases": phases}


def _open(folder: Path) -> dict[str, Any] | None:
    if not (folder / OPEN).is_file():
        return None
    try:
        return json.loads((folder / OPEN).read_text())
    except json.JSONDecodeError:  # torn by a kill
        return None


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    (folder / OPEN).write_text(json.dumps(content))
