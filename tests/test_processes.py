"""Several hosts do together what one does: here processes on one machine, which see each other's devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROCESS = Path(__file__).parent / "process.py"
SECONDS = 300


def run(folder, count):
    """What each of `count` processes, with four devices in all, says came out."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(4 // count)}
    files = [folder / f"{index}-of-{count}.json" for index in range(count)]
    words = [[sys.executable, str(PROCESS), str(file), str(i), str(count), str(port)] for i, file in enumerate(files)]
    running = [
        subprocess.Popen(one, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for one in words
    ]
    try:
        for process in running:
            _, said = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, said
    finally:
        for process in running:
            process.kill()
    return [json.loads(file.read_text()) for file in files]


def test_two_processes_generate_and_train_as_one_does(tmp_path):
    (alone,), together = run(tmp_path, 1), run(tmp_path, 2)
    assert together[0] == together[1]
    assert together[0]["answers"] == alone["answers"]
    assert together[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert together[0]["weights"] == pytest.approx(alone["weights"], rel=1e-4)
    assert len(set(map(str, alone["answers"]))) == 4  # four prompts, four different sets of answers
