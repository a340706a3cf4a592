"""Several hosts do together what one does: here processes on one machine, which see each other's devices."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint, metrics

HERE = Path(__file__).parent
SECONDS = 600


def start(count: int, devices: int, words: list[list[str]], **environment: str) -> list[subprocess.Popen[str]]:
    """`count` processes with as many devices in all, each with its own words; they find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices // count), **environment}
    if count > 1:
        shared |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, one)],
            env={**shared, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HERE,
        )
        for index, one in enumerate(words)
    ]


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and last line on stderr of each; none outlives the test."""
    try:
        said = [process.communicate(timeout=SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text.strip()) for process, text in zip(processes, said, strict=True)]


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
CHAIN = [
    # what happens to the first and to the second host, how they end, and what each says last
    (("", "SIGTERM@check:9"), (AGAIN, AGAIN), ("stopped; what was done is saved",) * 2),
    (("kill@saving:3", ""), (KILLED, AGAIN), ("", "host 1 .* lost touch with the others")),
    (("", "hang@check:4"), (AGAIN, AGAIN), (r"host \d .* is stuck: nothing has moved for .* stacks are in",) * 2),
    (("", ""), (0, 0), ("", "")),
]


def pod(out: Path, events: tuple[str, ...], **environment: str) -> list[tuple[int, str]]:
    """Run the recipe of pod.py, by a process for each of the events."""
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "POSTTRAIN_HEARTBEAT_SECONDS": "10", **environment}
    return ends(start(len(events), 2, [["pod.py", str(out), *filter(None, [one])] for one in events], **quick))


def lines(folder: Path) -> list[dict]:
    """The log of a stage without what the clock says."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics.read(folder / "metrics.jsonl")]


def test_two_hosts_that_are_stopped_killed_and_stuck_end_with_what_one_undisturbed_process_makes(tmp_path):
    whole, out, mesh = tmp_path / "whole", tmp_path / "out", meshes.make_mesh(devices=jax.devices()[:1])
    assert [code for code, _ in pod(whole, ("",))] == [0]
    for events, codes, sentences in CHAIN:
        found = pod(out, events, STUCK_AFTER="6" if "hang" in events[1] else "600")
        assert tuple(code for code, _ in found) == codes, found
        assert all(re.search(one, said) for one, (_, said) in zip(sentences, found, strict=True)), found
        if codes == (AGAIN, AGAIN) and "SIGTERM" in events[1]:
            steps = [line["step"] for line in lines(out / "rl")]  # how many depends on how far ahead the other host was
            assert steps == list(range(1, len(steps) + 1)) and len(steps) < 4, steps
    assert "in check" in (out / "stacks" / "host-1.txt").read_text()
    for stage in ("sft", "rl", "merge", "distill", "convert"):
        pairs = zip(checkpoint.leaves(out / stage, mesh), checkpoint.leaves(whole / stage, mesh), strict=True)
        assert all(np.array_equal(ours, theirs) for (_, ours), (_, theirs) in pairs), stage
    for stage in ("sft", "rl", "merge", "eval", "distill"):
        assert lines(out / stage) == lines(whole / stage)
    assert (out / "eval" / "scores.json").read_text() == (whole / "eval" / "scores.json").read_text()
    report = json.loads((out / "report.json").read_text())
    assert report["restarts"] == {"interrupted": 1, "killed": 2, "failed": 0}
    assert min(report["seconds"][phase] for phase in ("init", "sync", "recovery", "checkpoint", "wasted")) > 0
