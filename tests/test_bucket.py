"""Runs whose folder is in a bucket: on a server on loopback, with the real clients."""

from pathlib import Path

import jax
import numpy as np
import pytest
from fake_bucket import running
from toy import Likes

from posttrain.data.conversations import Demonstrations
from posttrain.launch.commands import run as command
from posttrain.launch.recipe import Training
from posttrain.sharding import mesh as meshes
from posttrain.train import bucket, checkpoint, metrics, sft
from posttrain.train.compute import Compute
from posttrain.train.merge import Linear
from posttrain.train.optimizer import AdamW
from posttrain.train.sft import SFT

STAGE = SFT(
    start="tiny",
    data=Demonstrations(tasks=Likes(domain="north")),
    steps=4,
    batch_size=4,
    optimizer=AdamW(learning_rate=1e-2),
    compute=Compute(row_tokens=48, micro_rows=4, save_every=1),
)
WATCH = command.Watch(profile=range(4, 5))
RUN = "gs://any/runs/one"


def recipe(run):
    first = run("sft", STAGE)
    run("merge", Linear(models=(first, "tiny")))


@pytest.fixture(scope="module")
def server():
    with running() as made, pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment().items():
            patch.setenv(name, value)
        yield made


def go() -> None:
    command.train(recipe, RUN, smoke=False, options={}, watch=WATCH)


def leaves(path: Path | str) -> list[np.ndarray]:
    return [np.asarray(leaf) for _, leaf in checkpoint.leaves(path, meshes.make_mesh(devices=jax.devices()[:1]))]


# gcsfs sends a trace of more than 1 MiB in one piece, of which its HTTP library disapproves.
@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
def test_a_run_in_a_slow_bucket_that_loses_its_machine_goes_on_elsewhere_from_the_last_whole_checkpoint(
    server, tmp_path, monkeypatch
):
    class LostError(Exception):
        pass

    rendered, real = [], sft.example

    def render(*words, **settings):
        rendered.append(1)
        if len(rendered) > 3 * STAGE.batch_size:
            raise LostError
        return real(*words, **settings)

    monkeypatch.setattr(sft, "example", render)
    server.delay = 0.01
    with pytest.raises(LostError):
        go()
    server.delay = 0.0
    newest = [name for name in server.objects if name.startswith("runs/one/sft/checkpoints/3/")]
    assert newest and "runs/one/sft/DONE" not in server.objects
    for name in newest:  # as if the machine had gone before the last of it was written
        if name.endswith("commit_success.txt"):
            del server.objects[name]
    monkeypatch.setattr(sft, "example", real)
    go()
    Training(tmp_path)("sft", STAGE)
    with bucket.working_copy(RUN) as again:
        log = metrics.read(again / "sft" / "metrics.jsonl")
        assert [line["step"] for line in log] == [1, 2, 3, 4]
        assert log[2]["seconds"]["wasted"] > 0 and log[3]["seconds"]["checkpoint"] > 0
        assert all(np.array_equal(a, b) for a, b in zip(leaves(again / "sft"), leaves(tmp_path / "sft"), strict=True))
        assert not list(again.rglob("params")) and len(leaves(again / "merge")) == len(leaves("tiny"))
    names = set(server.objects)
    assert {"runs/one/report.html", "runs/one/report.json", "runs/one/merge/DONE"} <= names
    assert any(name.startswith("runs/one/sft/profile/") and name.endswith(".xplane.pb") for name in names)
    assert not any("/checkpoints/" in name or name.endswith("/.attempt") for name in names)


def test_a_bucket_without_access_is_one_sentence(server):
    server.refusal = 403
    try:
        with pytest.raises(ValueError, match="^gs://any/runs/one cannot be read .*no access.*ask for access$"):
            go()
    finally:
        server.refusal = 0
