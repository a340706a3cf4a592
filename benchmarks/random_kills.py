"""Kill runs at random moments until they are done, and compare each with one that nobody killed, bit for bit.

    python benchmarks/random_kills.py --rounds 5

The suite kills at chosen moments (tests/test_resume.py); this finds the ones that nobody chose.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from posttrain.sharding import mesh as meshes
from posttrain.train import checkpoint, metrics

SCRIPT = Path(__file__).parent.parent / "tests" / "resumable.py"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`rounds` runs of every stage, each killed up to `kills` times, at most `longest` seconds after a start."""

    rounds: int = 3
    kills: int = 6
    longest: float = 15.0
    seed: int = 0


def start(stage: str, out: Path, teacher: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), stage, str(out), str(teacher)]
    cache = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(out.parent.parent / "cache")}
    environment = {**os.environ, **cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(command, env=environment, cwd=SCRIPT.parent, stdout=subprocess.DEVNULL)


def result(out: Path, mesh: jax.sharding.Mesh) -> tuple[list[np.ndarray], str]:
    """The parameters, and the log without its seconds."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in metrics.read(out / "metrics.jsonl")]
    return [np.asarray(leaf) for _, leaf in checkpoint.leaves(out, mesh)], json.dumps(lines)


def survive(stage: str, out: Path, teacher: Path, kills: list[float]) -> int:
    """Run until done, killed after each of these numbers of seconds; returns how often a kill came in time."""
    killed = 0
    while not (out / "DONE").exists():
        process = start(stage, out, teacher)
        try:
            process.wait(kills.pop() if kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        if process.wait() not in (0, -signal.SIGKILL):
            sys.exit(f"{stage}: the run ended with {process.returncode} after {killed} kills; look at {out}")
    return killed


def main(settings: Settings) -> None:
    """Print one line a run: how often it was killed, and whether it ended like the one that was not."""
    rng, mesh = np.random.default_rng(settings.seed), meshes.make_mesh(devices=jax.devices()[:1])
    folder, failures = Path(tempfile.mkdtemp()), 0
    model, teacher = checkpoint.open_model("tiny", mesh), folder / "teacher"
    checkpoint.save_model(teacher / "model", model._replace(params=jax.tree.map(lambda x: x * 1.5, model.params)))
    for stage in ("sft", "rl", "distill"):
        whole = folder / "whole" / stage
        survive(stage, whole, teacher, [])
        expected, expected_log = result(whole, mesh)
        for number in range(settings.rounds):
            out = folder / f"{number}" / stage
            killed = survive(stage, out, teacher, rng.uniform(0, settings.longest, settings.kills).tolist())
            params, log = result(out, mesh)
            same = all(np.array_equal(a, b) for a, b in zip(params, expected, strict=True)) and log == expected_log
            failures += not same
            print(f"{stage:8} run {number}: {killed} kills, {'bit for bit the same' if same else 'DIFFERENT'}")
    if failures:
        sys.exit(f"{failures} runs ended otherwise; look at {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(tyro.cli(Settings))
