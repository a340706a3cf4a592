"""The fake cloud of tests: a `gcloud` on the PATH that plays a scenario, a clock that nobody waits for."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from posttrain.launch.tpu import commands, driver, record
from posttrain.launch.tpu.driver import World
from posttrain.launch.tpu.lifecycle import Action
from posttrain.launch.tpu.record import Record
from posttrain.launch.tpu.spec import Spec

GCLOUD = Path(__file__).parent / "fake_gcloud.py"


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.seconds = 1_000_000.0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class FakeCloud:
    """What tests see of the cloud, and a launch in it."""

    def __init__(self, folder: Path, monkeypatch: Any) -> None:
        self.folder, self.monkeypatch, self.clock, self.said = folder, monkeypatch, Clock(), []
        (folder / "bin").mkdir()
        gcloud = folder / "bin" / "gcloud"
        gcloud.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S {shlex.quote(str(GCLOUD))} "$@"\n')
        gcloud.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
        monkeypatch.setenv("FAKE_CLOUD", str(folder))
        monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))

    @property
    def world(self) -> World:
        """A launcher's world, with nobody at the keyboard."""
        time = {"now": self.clock.now, "sleep": self.clock.sleep, "jitter": lambda: 0.0}
        return World(say=self.said.append, log=self.said.append, **time)

    def world_with(self, word: str, *, after: Action) -> World:
        """One where the user has a wish (interrupt is Ctrl-C, leave a closed terminal) when an action is done."""
        world, perform, wishes = self.world, driver.PERFORM[after], [word]

        def performing(one: Record, given: World) -> Any:
            seen = perform(one, given)
            if given is world and wishes:
                getattr(world.wish, wishes.pop())()
            return seen

        self.monkeypatch.setitem(driver.PERFORM, after, performing)
        return world

    def plays(self, **scenario: Any) -> "FakeCloud":
        (self.folder / "scenario.json").write_text(json.dumps(scenario))
        return self

    def calls(self, verb: str = "") -> list[list[str]]:
        """The calls so far, those with this word in them."""
        file = self.folder / "calls.jsonl"
        words = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [one for one in words if verb in " ".join(one)]

    @property
    def resources(self) -> dict[str, Any]:
        """What exists."""
        file = self.folder / "cloud.json"
        return json.loads(file.read_text())["resources"] if file.exists() else {}

    def launch(self, **fields: Any) -> Record:
        """A launch that has passed its checks and has its bundle."""
        one = record.new(spec(**fields), commit="0123456789ab", fetch=str(self.folder / "fetched"))
        bundle = one.folder / "bundle" / commands.folder(one.spec.name)
        bundle.mkdir(parents=True, exist_ok=True)
        record.save(one)
        return one


def spec(**fields: Any) -> Spec:
    """One v6e-16 slice, four hosts, on spot capacity."""
    first = {
        "name": "first", "recipe": "sft", "words": ("--model", "tiny"), "out": "gs://bucket/runs/first",
        "tpu": "v6e-16", "zones": ("us-east5-b",), "project": "my-project", "capacity": "spot",
    }  # fmt: skip
    return Spec(**{**first, **fields})
