"""The recipes that generate their data run from end to end, and resume from anywhere, with every stage shrunk."""

import json
from pathlib import Path

import jax
import pytest
from chat_server import serving

from posttrain.data import shards
from posttrain.launch import report
from posttrain.launch.recipe import Training
from posttrain.launch.recipes import deepseek_v32, olmo3, rejection
from posttrain.sharding import mesh as meshes
from posttrain.train.stop import Interrupted


class StoppedAfter(Training):
    """A run that is interrupted after so many stages."""

    def __init__(self, out: Path, stages: int) -> None:
        super().__init__(out, smoke=True, mesh=meshes.make_mesh(devices=jax.devices()[:1]))
        self.left = stages

    def __call__(self, name, stage):
        if not self.left:
            raise Interrupted
        self.left -= 1
        return super().__call__(name, stage)


def test_olmo3_learns_from_an_endpoint_at_two_rates_and_averages(tmp_path):
    with serving() as server:
        options = {"endpoint": server.url, "endpoint_model": "big", "seeds": 1}
        with pytest.raises(Interrupted):
            olmo3.recipe(StoppedAfter(tmp_path, 3), **options)
        asked = len(server.requests)
        found = olmo3.recipe(StoppedAfter(tmp_path, 99), **options)
        assert len(server.requests) == asked == 4 * 3 * 8
    assert [entry.name for entry in found.entries] == ["start", "SFT high", "SFT low", "SFT average"]
    assert {row.provenance.teacher for row in shards.read_rows(tmp_path / "kept")} == {"big"}
    summary = report.summarise(tmp_path, found)
    assert [set(row["scores"]) for row in summary["rows"]] == [{"reverse", "rotate", "double"}] * 4
    settings = json.loads((tmp_path / "average-0" / "stage.json").read_text())
    assert settings["models"] == ["OUT/sft-high-0", "OUT/sft-low-0"]


def test_deepseek_v32_has_each_specialist_write_its_domain_and_ends_in_one_mixed_rl_stage(tmp_path):
    with pytest.raises(Interrupted):
        deepseek_v32.recipe(StoppedAfter(tmp_path, 9))
    found = deepseek_v32.recipe(StoppedAfter(tmp_path, 99))
    rows = shards.read_rows(tmp_path / "generated")
    domains = {"reverse", "rotate", "double"}
    assert {(row.domain, row.provenance.teacher) for row in rows} == {(one, f"specialist-{one}") for one in domains}
    assert found.teachers == {domain: f"specialist-{domain}" for domain in domains}
    assert [entry.name for entry in found.entries][-2:] == ["generalist", "generalist after mixed RL"]
    settings = json.loads((tmp_path / "mixed-rl" / "stage.json").read_text())
    assert settings["start"] == "OUT/generalist" and settings["tasks"]["kind"] == "Mixture"


def test_rejection_learns_from_the_winners_of_all_rounds_and_then_from_pairs_of_the_same_answers(tmp_path):
    with pytest.raises(Interrupted):
        rejection.recipe(StoppedAfter(tmp_path, 6), rounds=2)
    found = rejection.recipe(StoppedAfter(tmp_path, 99), rounds=2)
    assert [entry.name for entry in found.entries] == ["start", "round 1", "round 2", "DPO on right and wrong"]
    rounds = [{row.id for row in shards.read_rows(tmp_path / f"generated-{number}")} for number in (1, 2)]
    winners = {row.id for row in shards.read_rows(tmp_path / "winners-2")}
    assert winners == rounds[0] | rounds[1] and not rounds[0] & rounds[1]
    assert 0 < shards.count_rows(tmp_path / "pairs" / "pairs", "pairs") <= 3 * 4
    settings = json.loads((tmp_path / "preferred" / "stage.json").read_text())
    assert settings["start"] == "OUT/model-2" and settings["data"]["folders"] == ["OUT/pairs"]
