"""What was launched from this machine: a folder for each launch, written before anything is created.

    STATE/posttrain/launches/NAME/{launch.json, bundle/, log, .lock}

STATE is $XDG_STATE_HOME, or ~/.local/state. A launch may be left at any moment, by Ctrl-C or a crash of this machine:
its record says what may exist, and `ls`, `status`, `attach` and `stop` work from it.
"""

import dataclasses
import json
import os
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import spec as specs
from .lifecycle import Action, State
from .spec import Spec


@dataclass(frozen=True, kw_only=True)
class Record:
    """A launch: what was asked for, the id on its label, the commit that it runs, where it is, who made it when."""

    spec: Spec
    launch: str
    commit: str
    fetch: str
    state: State = field(default_factory=State)

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return home() / self.spec.name

    @property
    def zone(self) -> str:
        """The zone that it is in, or tries next."""
        return self.spec.zones[self.state.zone % len(self.spec.zones)]

    @property
    def over(self) -> bool:
        """Nothing is left to do, and nothing is left that costs money."""
        return self.state.next == Action.QUIT and bool(self.state.outcome) and not self.state.exists


def home() -> Path:
    """The folder with a folder for each launch."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "posttrain" / "launches"


def new(spec: Spec, *, commit: str, fetch: str) -> Record:
    """A launch that has not begun, with an id of its own."""
    return Record(spec=spec, launch=secrets.token_hex(6), commit=commit, fetch=fetch)


def save(record: Record) -> None:
    """Write it, whole or not at all."""
    content = {
        "spec": specs.to_json(record.spec),
        "launch": record.launch,
        "commit": record.commit,
        "fetch": record.fetch,
        "zone": record.zone,
        "state": dataclasses.asdict(record.state),
    }
    record.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = record.folder / "launch.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(record.folder / "launch.json")


def load(name: str) -> Record:
    """The launch of that name.

    Raises:
        ValueError: if this machine knows none; the message lists those it knows.
    """
    file = home() / name / "launch.json"
    if not file.is_file():
        known = ", ".join(one.spec.name for one in every()) or "none"
        raise ValueError(f"no launch {name!r} was made from this machine (there are: {known}; kept in {home()})")
    return _parse(json.loads(file.read_text()))


def find(name: str) -> Record | None:
    """The launch of that name, if there is one."""
    return load(name) if (home() / name / "launch.json").is_file() else None


def every() -> list[Record]:
    """All launches of this machine, by name."""
    return [_parse(json.loads(file.read_text())) for file in sorted(home().glob("*/launch.json"))]


def forget(record: Record) -> None:
    """Remove the record of a launch that left nothing."""
    shutil.rmtree(record.folder)


def _parse(content: dict[str, Any]) -> Record:
    state = content["state"]
    state |= {key: Action(state[key]) for key in ("next", "then")}
    fields = {key: content[key] for key in ("launch", "commit", "fetch")}
    return Record(spec=specs.from_json(content["spec"]), state=State(**state), **fields)
