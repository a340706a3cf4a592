"""The recipe runner: stages run once, go on, refuse other settings, shrink; runs are locked and can be moved."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from posttrain.launch import comparison, lock, machine
from posttrain.launch.commands import run as command
from posttrain.launch.comparison import Comparison, Entry
from posttrain.launch.recipe import SettingsChangedError, Training, differences, relative, settings
from posttrain.train.stop import Interrupted


@dataclass(frozen=True)
class Rate:
    """Settings inside settings."""

    value: float


@dataclass(frozen=True, kw_only=True)
class Count:
    """A stage that appends a letter per step to a file; it stops once before the step `stop_at`."""

    steps: int
    rate: Rate = Rate(0.5)
    start: str = ""
    stop_at: int = -1

    def train(self, out: Path, mesh: Any = None) -> None:
        """Go on from the letters that are there."""
        file = out / "letters"
        done = len(file.read_text()) if file.exists() else 0
        for step in range(done, self.steps):
            if step == self.stop_at and not (out / "stopped").exists():
                (out / "stopped").touch()
                raise Interrupted
            with file.open("a") as letters:
                letters.write("x")

    def programs(self, mesh: Any) -> dict[str, Any]:
        """None."""
        return {}

    def result(self) -> None:
        """None."""
        return None


def ends(folder: Path) -> list[str]:
    return [json.loads(line)["end"] for line in (folder / "attempts.jsonl").read_text().splitlines()]


def test_a_part_of_a_recipe_trains_its_stages_alone(tmp_path):
    """Other processes train the others in the same folder; together they have done what one would have done."""

    def recipe(run):
        first = run("one", Count(steps=2))
        return run("two", Count(steps=1, start=first))

    watch = command.Watch()
    for name in ("one", "two"):
        command.train(recipe, tmp_path, smoke=False, options={}, watch=watch, only=(name,))
        assert not (tmp_path / "report.html").exists()
    assert [ends(tmp_path / name) for name in ("one", "two")] == [["done"], ["done"]]
    recipe(Training(tmp_path))
    assert (tmp_path / "one" / "letters").read_text() == "xx"  # the settings are those of one process
    with pytest.raises(ValueError, match="--only 'three': the recipe has no such stage, but one, two"):
        command.train(recipe, tmp_path, smoke=False, options={}, watch=watch, only=("three",))


def test_a_finished_stage_is_skipped(tmp_path):
    folder = Training(tmp_path)("one", Count(steps=3))
    assert Training(tmp_path)("one", Count(steps=3)) == folder == str(tmp_path / "one")
    assert (tmp_path / "one" / "letters").read_text() == "xxx"
    assert ends(tmp_path / "one") == ["done"]


def test_an_interrupted_stage_goes_on_and_every_attempt_is_counted(tmp_path):
    stage = Count(steps=4, stop_at=2)
    with pytest.raises(Interrupted):
        Training(tmp_path)("one", stage)
    assert not (tmp_path / "one" / "DONE").exists()
    Training(tmp_path)("one", stage)
    assert (tmp_path / "one" / "letters").read_text() == "xxxx"
    assert ends(tmp_path / "one") == ["interrupted", "done"]


def test_checkpoints_go_only_once_the_stage_is_done_even_if_a_kill_comes_between(tmp_path, monkeypatch):
    checkpoints = tmp_path / "one" / "checkpoints"
    checkpoints.mkdir(parents=True)

    def killed(*_args: Any, **_settings: Any) -> None:
        assert (tmp_path / "one" / "DONE").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("posttrain.train.bucket.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            Training(tmp_path)("one", Count(steps=2))
    assert checkpoints.exists()
    Training(tmp_path)("one", Count(steps=2))
    assert not checkpoints.exists()
    assert ends(tmp_path / "one") == ["done"]


def test_a_stage_that_fails_is_not_done(tmp_path):
    (tmp_path / "one" / "letters").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        Training(tmp_path)("one", Count(steps=1))
    assert ends(tmp_path / "one") == ["failed"]
    assert not (tmp_path / "one" / "DONE").exists()


def test_other_settings_under_the_same_name_are_refused_with_the_field(tmp_path):
    Training(tmp_path)("one", Count(steps=3))
    with pytest.raises(
        SettingsChangedError, match=r"one was started with other settings \(rate\.value: 0\.5 -> 0\.1\)"
    ):
        Training(tmp_path)("one", Count(steps=3, rate=Rate(0.1)))
    with pytest.raises(SettingsChangedError, match=r"steps: 3 -> 2"):
        Training(tmp_path, smoke=True)("one", Count(steps=3))


def test_smoke_shrinks_but_never_grows(tmp_path):
    run = Training(tmp_path, smoke=True)
    run("long", Count(steps=50))
    run("short", Count(steps=1))
    assert [(tmp_path / name / "letters").read_text() for name in ("long", "short")] == ["xx", "x"]


def test_a_run_that_was_moved_is_still_the_same_run(tmp_path):
    def recipe(out: Path) -> str:
        run = Training(out)
        return run("two", Count(steps=1, start=run("one", Count(steps=1))))

    recipe(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert recipe(tmp_path / "there") == str(tmp_path / "there" / "two")
    assert json.loads((tmp_path / "there" / "two" / "stage.json").read_text())["start"] == "OUT/one"


def test_only_paths_below_the_run_folder_are_made_relative():
    value = {"a": "runs/x", "b": ["runs/other", "my runs/x", "smollm2"], "kind": "runs"}
    assert relative(value, Path("runs")) == {"a": "OUT/x", "b": ["OUT/other", "my runs/x", "smollm2"], "kind": "runs"}


def test_functions_go_by_their_full_name_and_what_json_cannot_hold_is_refused():
    assert settings({"by": differences}) == {"by": "posttrain.launch.recipe.differences"}
    for nameless in (lambda: None, object()):
        with pytest.raises(TypeError, match="hold a (function|object)"):
            settings({"loss": nameless})


def test_differences_name_the_place():
    old, new = {"a": [1, {"b": 2}], "c": 3}, {"a": [1, {"b": 4}], "d": 5}
    assert differences(old, new) == ["a[1].b: 2 -> 4", "c: 3 -> None", "d: None -> 5"]
    assert differences(old, old) == []


def test_a_comparison_survives_writing_and_moving(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()

    def made(out: Path) -> Comparison:
        entries = (Entry("start", str(out / "eval"), ()), Entry("end", "/elsewhere/eval", (str(out / "rl"),)))
        return Comparison(title="t", entries=entries, teachers={"sums": "end"})

    comparison.write(made(here), here)
    here.rename(there)
    assert comparison.read(there) == made(there)


def test_a_lock_excludes_others_until_it_is_let_go(tmp_path):
    again = pytest.raises(lock.LockedError, match=r"another process \(id \d+\) writes to")
    with lock.held(tmp_path / "run"), again, lock.held(tmp_path / "run"):
        pass
    with lock.held(tmp_path / "run"):
        pass


def test_the_memory_peak_of_earlier_runs_is_kept(tmp_path):
    (tmp_path / machine.FILE).write_text('{"peak_rss_gib": 1000.0}')
    machine.record(tmp_path)
    assert machine.read(tmp_path)["peak_rss_gib"] == 1000.0
    (tmp_path / machine.FILE).unlink()
    machine.record(tmp_path)
    assert 0.05 < machine.read(tmp_path)["peak_rss_gib"] < 1000.0
