"""TensorBoard and Weights & Biases show the numbers of metrics.jsonl, also of a run that goes on."""

import struct
import sys
from pathlib import Path

import pytest

from posttrain.train import metrics, trackers
from posttrain.train.metrics import Log
from posttrain.train.trackers import Wanted


@pytest.fixture(autouse=True)
def none_afterwards():
    yield
    trackers.request(Wanted())


def events(folder: Path) -> list:
    """The events of a folder in the order in which they were written: length, checksum, message, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        assert content, path
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def log_steps(folder: Path, steps: range) -> None:
    with Log(folder, title="test", total=4, start=steps[0] - 1) as log:
        for step in steps:
            with log.phase("train"):
                pass
            log.write(step, {"loss": 1.0 / step, "note": "words are no numbers"})


def test_tensorboard_shows_every_number_and_drops_what_a_resumed_run_does_again(tmp_path):
    trackers.request(Wanted(tensorboard=True))
    log_steps(tmp_path, range(1, 4))
    log_steps(tmp_path, range(3, 5))
    found = events(tmp_path / "tensorboard")
    losses = [(e.step, v.simple_value) for e in found for v in e.summary.value if v.tag == "loss"]
    assert [(step, round(loss, 3)) for step, loss in losses] == [(1, 1.0), (2, 0.5), (3, 0.333), (3, 0.333), (4, 0.25)]
    assert [e.step for e in found if e.session_log.status == 1] == [3]  # START: viewers forget steps from here on
    tags = {v.tag for e in found for v in e.summary.value}
    assert {"loss", "seconds/train"} <= tags and "note" not in tags
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_weights_and_biases_keeps_a_run_of_the_stage_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.request(Wanted(wandb="tests"))
    log_steps(tmp_path / "rl", range(1, 3))
    assert list(tmp_path.glob("rl/wandb/offline-run-*/*.wandb"))


def test_nothing_is_written_unless_asked_for(tmp_path):
    log_steps(tmp_path, range(1, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "wanted, package", [(Wanted(tensorboard=True), "tensorboardX"), (Wanted(wandb="p"), "wandb")], ids=["tb", "wandb"]
)
def test_a_missing_package_is_said_before_anything_runs(wanted, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"the package {package} is not installed: run `pip install 'posttrain"):
        trackers.request(wanted)
