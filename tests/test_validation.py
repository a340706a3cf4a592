"""Validation during training: what is scored when, the best model kept, an early end, all of it resumable."""

import json
import signal

import jax
import numpy as np
import pytest
from toy import Likes

from posttrain.data.conversations import Demonstrations
from posttrain.data.task import Verdict
from posttrain.model.processing import Sampling
from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint, metrics, stop
from posttrain.train.compute import Compute
from posttrain.train.optimizer import AdamW
from posttrain.train.sft import SFT
from posttrain.train.validation import Validation

TASKS = Likes(domain="north", size=8)


def one_device():
    return meshes.make_mesh(devices=jax.devices()[:1])


def stage(patience: int) -> SFT:
    greedy = Sampling(max_tokens=5, temperature=0.0)
    compute = Compute(row_tokens=64, micro_rows=4, slots=8, save_every=1)
    return SFT(
        start="tiny", data=Demonstrations(tasks=TASKS), steps=5, batch_size=4, compute=compute,
        optimizer=AdamW(learning_rate=3e-3, ema=0.5),
        validation=Validation(tasks=TASKS, sampling=greedy, every=2, limit=4, patience=patience),
    )  # fmt: skip


def weights(out):
    return np.concatenate([np.ravel(np.asarray(leaf)) for _, leaf in checkpoint.leaves(out, one_device())])


def scripted(monkeypatch, rewards):
    """Judges give these rewards, one for each validation, whatever was answered."""
    given = iter(rewards)

    def judge(self, tasks, texts):
        value = next(given)
        return [Verdict(value, "") for _ in texts]

    monkeypatch.setattr("posttrain.data.verify.pool.VerifierPool.judge", judge)


def test_the_best_model_is_kept_beside_the_last_and_their_average(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.5, 0.4, 0.5])
    stage(patience=0).train(tmp_path / "whole", one_device())
    scores = json.loads((tmp_path / "whole" / "validation.json").read_text())
    assert scores == [{"step": s, "score": v} for s, v in ((0, 0.1), (2, 0.5), (4, 0.4), (5, 0.5))]
    assert len(metrics.read(tmp_path / "whole" / "metrics.jsonl")) == 5
    last, best, average = (weights(tmp_path / "whole" / name) for name in (".", "best", "ema"))
    assert np.any(last != best) and np.any(last != average)
    # The model of step 2, found again by ending there: patience 1, and a worse score at step 4, end at 4.
    scripted(monkeypatch, [0.1, 0.5, 0.4])
    stage(patience=1).train(tmp_path / "early", one_device())
    assert len(metrics.read(tmp_path / "early" / "metrics.jsonl")) == 4
    np.testing.assert_array_equal(weights(tmp_path / "early" / "best"), best)


def test_an_interrupted_run_validates_and_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.5, 0.4, 0.5])
    stage(patience=0).train(tmp_path / "whole", one_device())
    scripted(monkeypatch, [0.1, 0.5])
    write = metrics.Log.write

    def interrupted(self, step, *args):
        write(self, step, *args)
        if step == 3:
            stop.request_stop(signal.SIGTERM, None)

    monkeypatch.setattr(metrics.Log, "write", interrupted)
    try:
        with pytest.raises(stop.Interrupted):
            stage(patience=0).train(tmp_path / "cut", one_device())
    finally:
        stop._asked.clear()
    monkeypatch.setattr(metrics.Log, "write", write)
    scripted(monkeypatch, [0.4, 0.5])
    stage(patience=0).train(tmp_path / "cut", one_device())
    cut, whole = ((tmp_path / name / "validation.json").read_text() for name in ("cut", "whole"))
    assert cut == whole
    for name in (".", "best", "ema"):
        np.testing.assert_array_equal(weights(tmp_path / "cut" / name), weights(tmp_path / "whole" / name))


def test_validating_never_or_nothing_is_refused():
    with pytest.raises(ValueError, match="every 0 steps on 64 examples"):
        Validation(tasks=TASKS, sampling=Sampling(max_tokens=1), every=0)
