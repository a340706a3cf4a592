"""Kill a generation at random moments, and compare its data with one that nobody killed, byte for byte.

    python benchmarks/generation_kills.py --kills 20

Once with an endpoint (a chat server in this process, which counts what it is asked) and once with a model on the mesh.
Each kill is a SIGKILL at a random moment after the process has written its first byte.
"""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from posttrain.data import journal
from posttrain.train import answers

sys.path.append(str(Path(__file__).parent.parent / "tests"))
chat_server: Any = importlib.import_module("chat_server")

SEED = 5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`kills` of each kind of teacher; `prompts` of two domains, four samples each, in up to three rounds."""

    kills: int = 20
    prompts: int = 120
    delay: float = 0.2
    seed: int = 0


CHILD = """
import sys
from pathlib import Path
import jax
from posttrain.data.characters import Characters
from posttrain.data.endpoint import Endpoint
from posttrain.model.processing import Sampling
from posttrain.sharding import mesh as meshes
from posttrain.train.answers import Local
from posttrain.train.compute import Compute
from posttrain.train.generate import Generate
teacher, out, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
remote = teacher.startswith("http")
found = Endpoint(url=teacher, model="big", concurrency=8) if remote else Local(model=teacher)
Generate(
    prompts=(Characters(operation="reverse", letters=6), Characters(operation="copy", letters=6)),
    teachers={"*": found}, sampling=Sampling(max_tokens=8), samples=4, rounds=3, limit=limit, block=16,
    compute=Compute(slots=64), seed=int(sys.argv[4]),
).train(out, meshes.make_mesh(devices=jax.devices()[:1]))
"""


def start(teacher: str, out: Path, prompts: int) -> subprocess.Popen[bytes]:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out.parent.parent / "cache"), "JAX_PLATFORMS": "cpu"}
    environment = {**os.environ, **cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-c", CHILD, teacher, str(out), str(prompts), str(SEED)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def size(out: Path) -> int:
    """Bytes in the journals, and 1 for each that is complete."""
    return sum(file.stat().st_size + 1 for file in list((out / "answers").glob("*")) if file.exists())


def killed_after(process: subprocess.Popen[bytes], out: Path, seconds: float) -> bool:
    """Kill so many seconds after the process has written its first byte; False if it was done before."""
    before = size(out)
    while process.poll() is None and size(out) == before:
        time.sleep(0.01)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def recorded(out: Path) -> set[int]:
    """The seeds of the requests whose answers are in the journals."""
    lines = [line for file in (out / "answers").glob("*") for line in journal.read(file)]
    return {answers.request_seed(SEED, line["task"], line["sample"]) for line in lines if "message" in line}


def data(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((out / "rows").iterdir())}


def compare(
    kind: str, teacher: str, folder: Path, settings: Settings, prompts: int, on_kill: Callable[[Path], None]
) -> bool:
    """Print what came of one kind of teacher; whether the data is the same. `on_kill` is called after each."""
    whole, out = folder / kind / "whole" / "data", folder / kind / "killed" / "data"
    took = 0.0
    for _ in range(2):  # the first one compiles
        shutil.rmtree(whole.parent, ignore_errors=True)
        begin = time.monotonic()
        if start(teacher, whole, prompts).wait():
            sys.exit(f"{kind}: the run that nobody killed failed")
        took = time.monotonic() - begin
    kills = 0
    for moment in np.random.default_rng(settings.seed).uniform(0, took / settings.kills, settings.kills):
        if not (out / "rows").exists():
            kills += killed_after(start(teacher, out, prompts), out, moment)
            on_kill(out)
    if start(teacher, out, prompts).wait():
        sys.exit(f"{kind}: the run failed after {kills} kills; look at {out}")
    same = data(out) == data(whole)
    rows = sum(item["rows"] for item in json.loads((out / "rows" / "manifest.json").read_text())["files"].values())
    print(f"{kind}: {kills} kills, {rows} rows, {'byte for byte the same' if same else 'DIFFERENT'}", flush=True)
    return same


def main(settings: Settings) -> None:
    """Print a line per kind of teacher, and how many answers the endpoint was asked for again."""
    folder = Path(tempfile.mkdtemp())
    kills: list[tuple[int, set[int]]] = []
    with chat_server.serving(delay=settings.delay) as server:
        good = compare(
            "endpoint",
            server.url,
            folder,
            settings,
            settings.prompts,
            lambda out: kills.append((len(server.requests), recorded(out))),
        )
    seeds = [request["seed"] for request in server.requests]
    total = Counter(seeds)
    again = sum(count - 3 for count in total.values())  # two runs that nobody killed, and one of pieces
    lost = sum(seed in known for number, known in kills for seed in seeds[number:])
    print(
        f"endpoint: {len(total)} answers; asked for again: {again} that were under way at a kill, {lost} recorded ones"
    )
    also = compare("mesh", "tiny", folder, settings, 8 * settings.prompts, lambda out: None)
    if not (good and also) or lost:
        sys.exit(f"not the same; look at {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
