"""Several hosts do together what one does: here processes on one machine, which see each other's devices."""

import json
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from chat_server import judged_or_answered, serving
from fake_bucket import running
from local_hosts import ends, pod, start
from resumable import logged

from posttrain.sharding import mesh as meshes
from posttrain.train import bucket, checkpoint


def together(folder: Path, count: int) -> list[dict]:
    """What each of `count` processes, with four devices in all, says came out."""
    files = [folder / f"{index}-of-{count}.json" for index in range(count)]
    found = ends(start(count, 4, [["process.py", str(file)] for file in files]))
    assert [code for code, _ in found] == [0] * count, found
    return [json.loads(file.read_text()) for file in files]


def test_two_processes_generate_and_train_as_one_does(tmp_path):
    (alone,), both = together(tmp_path, 1), together(tmp_path, 2)
    assert both[0] == both[1]
    assert both[0]["answers"] == alone["answers"]
    assert both[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert both[0]["weights"] == pytest.approx(alone["weights"], rel=1e-4)
    assert len(set(map(str, alone["answers"]))) == 4  # four prompts, four different sets of answers


KILLED, AGAIN = -signal.SIGKILL, 75
STOPPED, LEFT = "stopped; what was done is saved", "stopped in the middle of a step: run the same command again"
LOST = "host 1 .* lost touch with the others"
CHAIN = [
    # what happens to the first and to the second host, how they end, and what each says last
    (
        ("", "SIGTERM@compile:12"),
        (AGAIN, AGAIN),
        ("stopped in the middle of a step|lost touch", "in the middle of a step"),
    ),
    (("", "full@check:3"), (1, 2), ("host 1 .* failed: CheckpointError: the disk that holds", "the disk that holds")),
    (("", "SIGTERM@check:9"), (AGAIN, AGAIN), (STOPPED,) * 2),
    (("kill@saving:3", ""), (KILLED, AGAIN), ("", LOST)),
    (("", "hang@check:4"), (AGAIN, AGAIN), (r"host \d .* is stuck: nothing has moved for .* stacks are in",) * 2),
    (("SIGTERM@eval/rollouts:0", ""), (AGAIN, AGAIN), (STOPPED,) * 2),
    (("kill@distill/cleaning", ""), (KILLED, AGAIN), ("", LOST)),
    (("", ""), (0, 0), ("", "")),
]


def test_two_hosts_that_are_stopped_killed_and_stuck_anywhere_end_with_what_one_undisturbed_process_makes(tmp_path):
    whole, out, mesh = tmp_path / "whole", tmp_path / "out", meshes.make_mesh(devices=jax.devices()[:1])
    found = pod(whole, ("",))
    assert [code for code, _ in found] == [0], found
    for events, codes, sentences in CHAIN:
        found = pod(out, events, environment={"STUCK_AFTER": "6" if "hang" in events[1] else "600"})
        assert tuple(code for code, _ in found) == codes, found
        assert all(re.search(one, said) for one, (_, said) in zip(sentences, found, strict=True)), found
        if "check" in events[1] and "SIGTERM" in events[1]:
            steps = [line["step"] for line in logged(out / "rl")]  # how many is up to how far ahead the other was
            assert steps == list(range(1, len(steps) + 1)) and len(steps) < 4, steps
    assert "in check" in (out / "stacks" / "host-1.txt").read_text()
    for stage in ("sft", "rl", "merge", "distill", "convert"):
        pairs = zip(checkpoint.leaves(out / stage, mesh), checkpoint.leaves(whole / stage, mesh), strict=True)
        assert all(np.array_equal(ours, theirs) for (_, ours), (_, theirs) in pairs), stage
    for stage in ("sft", "rl", "merge", "eval", "distill"):
        assert logged(out / stage) == logged(whole / stage)
    assert (out / "eval" / "scores.json").read_text() == (whole / "eval" / "scores.json").read_text()
    paces = [json.loads(line) for line in (out / "rl" / "paces.jsonl").read_text().splitlines()]
    assert [one["host"][:6] for one in paces[-1]["hosts"]] == ["host 0", "host 1"]
    report = json.loads((out / "report.json").read_text())
    restarts = report["restarts"]  # what the first host's attempt is called when another fails is up to who is faster
    assert (restarts["interrupted"], restarts["killed"] + restarts["failed"]) == (2, 4)
    assert min(report["seconds"][phase] for phase in ("init", "sync", "recovery", "checkpoint", "wasted")) > 0


def files(folder: Path) -> dict[str, bytes]:
    """All files of a folder, byte by byte."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# gcsfs sends a file of more than 1 MiB in one piece, of which its HTTP library disapproves.
@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
def test_two_hosts_write_judge_compare_and_learn_from_answers_as_one_does_in_a_bucket_that_was_full(
    tmp_path, monkeypatch
):
    mesh, whole, out = meshes.make_mesh(devices=jax.devices()[:1]), tmp_path / "whole", "gs://any/runs/two"
    with serving(reply=judged_or_answered) as server, running() as place:
        for name, value in place.environment().items():
            monkeypatch.setenv(name, value)
        of = {"script": "pod_feedback.py", "environment": {"ENDPOINT": server.url}}
        found = pod(whole, ("",), **of)
        assert [code for code, _ in found] == [0], found
        server.requests.clear()
        place.full = 30_000
        full = pod(out, ("", ""), **of)
        assert {2} <= {code for code, _ in full} <= {1, 2}, full  # 1 is that of a host that was told before it tried
        assert all("the bucket says 'The quota has been exceeded: storage': see to" in said for _, said in full), full
        place.full = 2**62
        found = pod(out, ("", ""), **of)
        assert [code for code, _ in found] == [0, 0], found
        asked = [f"{one['messages'][-1]['content']} {one['seed']}" for one in server.requests if "seed" in one]
        assert asked and len(asked) == len(set(asked))
        with bucket.working_copy(out) as again:
            for data in ("generate/rows", "kept/rows", "compare/parts"):
                assert files(again / data) == files(whole / data), data
            for stage in ("prefer", "reward", "ppo", "ppo/critic"):
                pairs = zip(checkpoint.leaves(again / stage, mesh), checkpoint.leaves(whole / stage, mesh), strict=True)
                assert all(np.array_equal(ours, theirs) for (_, ours), (_, theirs) in pairs), stage
            for stage in ("generate", "prefer", "reward", "kept", "ppo"):
                assert logged(again / stage) == logged(whole / stage), stage
