"""Kill runs at random moments, a hundred times, and compare each with one that nobody killed, bit for bit.

    python benchmarks/random_kills.py --log kills.jsonl

Runs of SFT, RL and distillation take turns; each is started again until it is done, and most starts are ended by
SIGKILL or SIGTERM after a random part of the time that a whole run takes. The suite kills at chosen moments
(tests/test_resume.py, tests/test_processes.py); this finds the ones that nobody chose.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from posttrain.sharding import mesh as meshes
from posttrain.train import attempts, checkpoint, metrics

SCRIPT = Path(__file__).parent.parent / "tests" / "resumable.py"
STAGES = ("sft", "rl", "distill")
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`kills` in all; a line of `log` per start that was ended says when, by what, and what was on disk."""

    kills: int = 100
    seed: int = 0
    log: Path | None = None


class Runs:
    """Starts of the small stages of tests/resumable.py, with one cache of compiled programs."""

    def __init__(self, folder: Path, teacher: Path) -> None:
        cache = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
        self.environment = {**os.environ, **cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.teacher = teacher

    def start(self, stage: str, out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(SCRIPT), stage, str(out), str(self.teacher)]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, env=self.environment, cwd=SCRIPT.parent, stdout=quiet, stderr=quiet)

    def whole(self, stage: str, out: Path) -> float:
        """Run to the end; the seconds it took."""
        begin = time.monotonic()
        if code := self.start(stage, out).wait():
            sys.exit(f"{stage} ended with {code} though nobody killed it; look at {out}")
        return time.monotonic() - begin

    def ended(self, stage: str, out: Path, number: int, seconds: float) -> int | None:
        """Start, and send the signal after some seconds; the exit code, None for a run that had ended before."""
        process = self.start(stage, out)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            code = process.wait()
            if code not in (0, -number, 75 if number == signal.SIGTERM else -number):
                sys.exit(f"{stage} ended with {code} after signal {number}; look at {out}")
            return code
        if process.returncode:
            sys.exit(f"{stage} ended with {process.returncode} though nobody killed it; look at {out}")
        return None


def result(out: Path, mesh: jax.sharding.Mesh) -> tuple[list[np.ndarray], str]:
    """The parameters, and the log without its seconds."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in metrics.read(out / "metrics.jsonl")]
    return [np.asarray(leaf) for _, leaf in checkpoint.leaves(out, mesh)], json.dumps(lines)


def moment(out: Path) -> str:
    """What an ended run had got to."""
    if not (out / "stage.json").is_file():
        return "starting"
    if (out / "model").is_dir():
        return "storing the model"
    lines = metrics.read(out / "metrics.jsonl") if (out / "metrics.jsonl").is_file() else []
    return f"step {len(lines) + 1}"


def main(settings: Settings) -> None:
    """Print a line per finished run, and the sum; exit 1 if any differed."""
    rng, mesh = np.random.default_rng(settings.seed), meshes.make_mesh(devices=jax.devices()[:1])
    folder, teacher = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    model = checkpoint.open_model("tiny", mesh)
    checkpoint.save_model(teacher / "model", model._replace(params=jax.tree.map(lambda x: x * 1.5, model.params)))
    runs, expected, lengths = Runs(folder, teacher), {}, {}
    for stage in STAGES:
        runs.whole(stage, folder / "first" / stage)  # fills the cache
        lengths[stage] = runs.whole(stage, folder / "whole" / stage)
        expected[stage] = result(folder / "whole" / stage, mesh)
    kills, number, different, codes, moments = 0, 0, 0, Counter(), Counter()
    log = settings.log.open("a") if settings.log else None
    while kills < settings.kills:
        stage, out, own = STAGES[number % len(STAGES)], folder / f"{number}" / STAGES[number % len(STAGES)], 0
        while not (out / "DONE").exists():
            by = SIGNALS[int(rng.integers(2))]
            after = float(rng.uniform(0.0, lengths[stage]))
            code = runs.ended(stage, out, by, after)
            if code not in (0, None):
                own, where = own + 1, moment(out)
                codes[f"{signal.Signals(by).name} -> {code}"] += 1
                moments[where] += 1
                if log:
                    line = {"run": number, "stage": stage, "signal": by, "seconds": round(after, 3)}
                    log.write(json.dumps({**line, "code": code, "at": where}) + "\n")
                    log.flush()
        params, lines = result(out, mesh)
        noted = Counter(one["end"] for one in attempts.read(out))
        same = all(np.array_equal(a, b) for a, b in zip(params, expected[stage][0], strict=True))
        same, kills, number = same and lines == expected[stage][1], kills + own, number + 1
        different += not same
        said = "bit for bit the same" if same else f"DIFFERENT, look at {out}"
        print(f"{stage:8} run {number}: ended {own} times ({dict(noted)}), {said}; {kills} so far", flush=True)
        if same:
            shutil.rmtree(out.parent)
    print(
        f"{kills} kills in {number} runs, {different} ended otherwise; by exit code {dict(codes)}, at {dict(moments)}"
    )
    if different:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(tyro.cli(Settings))
