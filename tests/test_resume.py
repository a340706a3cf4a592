"""A run that dies goes on as if it had not: the same parameters bit for bit, each step in the log once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import resumable

from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint, loop, metrics, state
from posttrain.train.checkpoint import CheckpointError, Checkpoints
from posttrain.train.compute import Compute
from posttrain.train.optimizer import AdamW

ROOT = Path(__file__).parent


def start(out: Path, stage: str, teacher: Path, *events: str) -> subprocess.Popen[str]:
    """A run of a stage in a process of its own; for `events` see `resumable`."""
    command = [sys.executable, str(ROOT / "resumable.py"), stage, str(out), str(teacher), *events]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def finish(process: subprocess.Popen[str], expected: int) -> str:
    """What it printed; a failing disk has libraries write tracebacks of theirs beside it."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == expected, output + errors
    return output


def parameters(out: Path | str) -> list[np.ndarray]:
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    return [np.asarray(leaf) for _, leaf in checkpoint.leaves(out, mesh)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A model that is not the tiny one that the stages start from."""
    folder = tmp_path_factory.mktemp("teacher")
    model = checkpoint.open_model("tiny", meshes.make_mesh(devices=jax.devices()[:1]))
    checkpoint.save_model(folder / "model", model._replace(params=jax.tree.map(lambda x: x * 1.5, model.params)))
    return folder


KILLED, INTERRUPTED, FAILED = -signal.SIGKILL, 75, 1
CHAINS = {
    "sft": [
        ("kill@saved:2", KILLED),
        ("full@saving:3", FAILED),
        ("SIGTERM@line:2", INTERRUPTED),
        ("kill@done", KILLED),
    ],
    "rl": [("kill@rollouts:1", KILLED), ("SIGINT@rollouts:2", INTERRUPTED)],
    "distill": [("kill@saving:2", KILLED), ("kill@model", KILLED)],
}
SAYS = {
    KILLED: "",
    INTERRUPTED: "\nInterrupted",
    FAILED: "\nCheckpointError: the disk that holds .*checkpoints is full, .*: free some space and run the same "
    "command again; the last complete checkpoint is untouched",
}


@pytest.mark.parametrize("stage", CHAINS)
def test_a_run_that_ends_again_and_again_reaches_bit_for_bit_what_an_uninterrupted_one_does(stage, tmp_path, teacher):
    out, whole, reached = tmp_path / "ended" / stage, tmp_path / "whole" / stage, [0]
    uninterrupted = start(whole, stage, teacher)
    for event, code in CHAINS[stage]:
        output = finish(start(out, stage, teacher, event), code)
        assert re.search(f"{SAYS[code]}$", output.rstrip()), output
        assert not (out / "DONE").exists()
        if (out / "checkpoints").exists():
            reached.append(Checkpoints(out / "checkpoints").latest() or 0)
            assert len(list((out / "checkpoints").glob("[0-9]"))) <= 3
        if code == INTERRUPTED:
            assert [line["step"] for line in resumable.logged(out)] == list(range(1, reached[-1] + 1))
    assert reached == sorted(reached) and 0 < reached[-1] < resumable.STEPS
    finish(start(out, stage, teacher), 0)
    finish(uninterrupted, 0)
    expected, log = parameters(whole), resumable.logged(out)
    assert all(np.any(leaf != begin) for leaf, begin in zip(expected, parameters("tiny"), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(parameters(out), expected, strict=True))
    assert [line["step"] for line in log] == list(range(1, resumable.STEPS + 1))
    assert log == resumable.logged(whole)


def test_a_checkpoint_of_one_mesh_restores_onto_another(tmp_path):
    optimizer = AdamW(learning_rate=1e-3).build(1)

    def made(**split):
        mesh = meshes.make_mesh(**split)
        model = checkpoint.open_model("tiny", mesh)
        return state.create(model.params, optimizer, mesh), state.abstract(model.config, optimizer, mesh)

    first, _ = made(fsdp=8)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(7, first, {"iteration": 7, "next_task": 40})
    checkpoints.wait()
    _, abstract = made(data=2, fsdp=2, tensor=2)
    second, cursor = Checkpoints(tmp_path / "checkpoints").restore(7, abstract)
    assert cursor == {"iteration": 7, "next_task": 40}
    for old, new, planned in zip(*(jax.tree.leaves(tree) for tree in (first, second, abstract)), strict=True):
        assert new.sharding == planned.sharding
        np.testing.assert_array_equal(np.asarray(old), np.asarray(new))


def test_checkpoints_are_kept_by_policy_and_the_time_that_saving_takes_is_in_the_log(tmp_path, monkeypatch):
    mesh, real = meshes.make_mesh(devices=jax.devices()[:1]), Checkpoints.save

    def slow(*words) -> None:
        time.sleep(0.2)
        real(*words)

    monkeypatch.setattr(Checkpoints, "save", slow)
    zero = jax.device_put(np.float32(0), meshes.replicated(mesh))
    like = jax.ShapeDtypeStruct((), np.float32, sharding=meshes.replicated(mesh))
    trained = loop.Trained(create=lambda: zero, abstract=lambda: like, store=lambda out, state: None)
    compute = Compute(save_every=2, keep=2, keep_every=3)
    loop.train(
        tmp_path, trained, steps=15, compute=compute, iterate=lambda x, cursor, log: (x + 1, cursor, {"loss": x})
    )
    assert sorted(int(step.name) for step in (tmp_path / "checkpoints").iterdir()) == [6, 12, 14]
    seconds = {line["step"]: line["seconds"] for line in metrics.read(tmp_path / "metrics.jsonl")}
    blocked = [step for step in seconds if seconds[step].get("checkpoint", 0.0) >= 0.2]
    assert blocked == [3, 5, 7, 9, 11, 13, 15]  # it delays the step that comes after


def test_a_log_that_was_torn_in_the_middle_of_a_line_goes_on_behind_the_last_whole_one(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.5, "seconds": {"train": 2.0}}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    with metrics.Log(tmp_path, title="", total=4, start=2) as log:
        log.write(3, {"loss": 0.5})
    found = metrics.read(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in found] == [(1, 1.5), (2, 1.5), (3, 0.5)]
    assert found[-1]["seconds"]["wasted"] == 2.0  # of the step that is done again


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(ValueError, match="^shapes differ$"), checkpoint._explained(tmp_path):
        raise ValueError("shapes differ")
    with pytest.raises(CheckpointError, match="full"), checkpoint._explained(tmp_path):
        raise OSError(28, os.strerror(28))
