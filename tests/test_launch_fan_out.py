"""Stages that do not need each other run side by side: which those are, and that the launches of them are joined."""

import json

import fake_cloud
import pytest

from posttrain.launch.commands import launch
from posttrain.launch.recipes import mopd, sft
from posttrain.launch.tpu import bundle, record, session
from posttrain.launch.tpu.fan_out import Noted, rounds

MOPD = {"base": "tiny", "objective": "full", "outcome": 0.0}


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "commit", lambda dirty: "0123456789ab")
    monkeypatch.setattr(bundle, "wheel", lambda commit, target: target.mkdir())
    return fake_cloud.FakeCloud(tmp_path, monkeypatch)


def test_specialists_are_trained_side_by_side_and_joined_by_the_student():
    assert launch.lanes(mopd.recipe, MOPD) == [
        [("start",)],
        [
            ("eval-start", "specialist-reverse", "eval-reverse"),
            ("specialist-rotate", "eval-rotate"),
            ("specialist-double", "eval-double"),
        ],
        [("merge-mean", "eval-mean", "merge-ties", "eval-ties", "mopd-full", "eval-mopd-full")],
    ]


def test_a_recipe_of_one_line_is_not_fanned_out():
    options = {"model": "tiny", "data": (), "steps": 2}
    with pytest.raises(ValueError, match="every stage of this recipe needs the one before it"):
        launch.lanes(sft.recipe, options)


def test_every_stage_comes_once_and_after_what_it_needs():
    needs = {"a": "", "b": "", "c": "a", "d": "ab", "e": "c", "f": "d", "g": "d", "h": "efg", "i": ""}
    stages = {name: Noted(frozenset(them), name != "i") for name, them in needs.items()}
    found = rounds(stages)
    assert sorted(name for lanes in found for lane in lanes for name in lane) == sorted(stages)
    done = set()
    for lanes in found:
        for lane in lanes:
            seen = set()
            for name in lane:
                assert stages[name].needs <= done | seen, f"{name} in {lane} after {done}"
                seen.add(name)
        done |= {name for lane in lanes for name in lane}
    assert found[0] == [("a", "c", "e", "i"), ("b",)]


def test_lanes_have_slices_of_their_own_and_the_next_round_waits_for_all(cloud):
    cloud.plays(lives=[{"states": ["ACTIVE"], "looks": ["running 0", "ended 0"]}])
    spec = fake_cloud.spec(recipe="mopd", words=("--base", "tiny"))
    session.fan_out(spec, launch.lanes(mopd.recipe, MOPD), "runs/first", cloud.world, dirty=False)
    words = [call[3:5] for call in cloud.calls("queued-resources") if call[3] in ("create", "delete")]
    names = [name for verb, name in words if verb == "create"]
    assert sorted(names) == ["first", "first-1-1", "first-2-1", "first-2-2", "first-2-3"]
    for later, earlier in (("first-2-1", "first-1-1"), ("first", "first-2-3"), ("first", "first-2-2")):
        assert words.index(["create", later]) > words.index(["delete", earlier])
    assert words.index(["create", "first-2-3"]) < min(words.index(["delete", f"first-2-{i}"]) for i in (1, 2, 3))
    script = (record.home() / "first-2-2/bundle/posttrain-first-2-2/run.sh").read_text()
    assert script.endswith("--base tiny --only specialist-rotate --only eval-rotate\n")
    assert (record.home() / "first/bundle/posttrain-first/run.sh").read_text().endswith("first --base tiny\n")
    kept = cloud.folder / "bucket/bucket/runs/first/launch.json"
    assert json.loads(kept.read_text())["words"] == ["--base", "tiny"]  # one run, whatever its lanes
    calls = len(cloud.calls("create"))
    session.fan_out(spec, launch.lanes(mopd.recipe, MOPD), "runs/first", cloud.world, dirty=False)
    assert (len(cloud.calls("create")), cloud.resources) == (calls, {})  # all lanes are done


def test_a_lane_that_fails_keeps_the_next_round_from_starting(cloud):
    good, bad = ({"states": ["ACTIVE"], "looks": [code]} for code in ("ended 0", "ended 1"))
    cloud.plays(lives=[good, bad])
    with pytest.raises(SystemExit) as raised:
        session.fan_out(
            fake_cloud.spec(recipe="mopd"), launch.lanes(mopd.recipe, MOPD), "runs/first", cloud.world, dirty=False
        )
    assert (raised.value.code, len(cloud.calls("create")), cloud.resources) == (1, 4, {})
