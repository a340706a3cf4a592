"""What may happen to the hosts of a run, one trial after the other, with real processes: each goes on to the same end.

    python benchmarks/host_trials.py

Hosts are processes of this machine that run the recipes of tests/pod.py and tests/pod_feedback.py; buckets are on
loopback. A trial is a row: what happened, how the hosts left and what they said, what they went on with, and whether
the models, the logs and the data are those of a run that nothing happened to.
"""

import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from posttrain.sharding import mesh as meshes
from posttrain.train import bucket, checkpoint

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import chat_server  # pyright: ignore[reportMissingImports]
import fake_bucket  # pyright: ignore[reportMissingImports]
import local_hosts  # pyright: ignore[reportMissingImports]
import resumable  # pyright: ignore[reportMissingImports]

AGAIN, KILLED, FAILED, TOLD = 75, -signal.SIGKILL, 2, 1
BOTH = ("", "")
TOLERANCE = 1e-3
"""Of weights, against the largest of an array, where another number of devices adds up in another order: AdamW's first
steps make much of gradients that are nearly 0."""


class Life(NamedTuple):
    """A start of all hosts: what happens to each, how each ends, and what one of them says at least.

    With `both` it happens to both, and either may be the first.
    """

    events: tuple[str, ...]
    codes: tuple[int, ...]
    says: str = ""
    devices: int = 2
    stuck_after: int = 600
    both: bool = False


DONE = Life(BOTH, (0, 0))
STOPPED = "stopped; what was done is saved"


class Trial(NamedTuple):
    """Lives of a run. `server` sets up the bucket before each of them, by its number; None for a local folder."""

    what: str
    lives: tuple[Life, ...]
    script: str = "pod.py"
    server: Callable[[Any, int], None] | None = None
    close: bool = False


def fill(server: Any, number: int) -> None:
    """A bucket that takes no large object any more, in the first life."""
    server.full = 30_000 if number == 0 else 2**62


def slow(server: Any, number: int) -> None:
    """A bucket that takes its time."""
    server.delay = 0.1


TRIALS = (
    Trial("SIGTERM while a program compiles", (Life(("", "SIGTERM@compile:40"), (AGAIN, AGAIN)), DONE)),
    Trial("SIGTERM in a rollout", (Life(("", "SIGTERM@check:9"), (AGAIN, AGAIN), STOPPED), DONE)),
    Trial("SIGTERM in an evaluation", (Life(("SIGTERM@eval/rollouts:0", ""), (AGAIN, AGAIN), STOPPED), DONE)),
    Trial(
        "SIGTERM while answers are generated",
        (Life(("", "SIGTERM@check:3"), (AGAIN, AGAIN), STOPPED), DONE),
        "pod_feedback.py",
    ),
    Trial("the first host is killed", (Life(("kill@line:6", ""), (KILLED, AGAIN), "lost touch"), DONE)),
    Trial("another host is killed", (Life(("", "kill@check:9"), (AGAIN, KILLED), "lost touch"), DONE)),
    Trial("kill -9 in the middle of a save", (Life(("kill@saving:3", ""), (KILLED, AGAIN), "lost touch"), DONE)),
    Trial("kill -9 between DONE and clean-up", (Life(("kill@rl/cleaning", ""), (KILLED, AGAIN), "lost touch"), DONE)),
    Trial("a host hangs", (Life(("", "hang@check:4"), (AGAIN, AGAIN), "is stuck", stuck_after=6), DONE)),
    Trial("the first host's disk is full", (Life(("full@saving:3", ""), (FAILED, TOLD), "disk that holds"), DONE)),
    Trial("another host's disk is full", (Life(("", "full@check:3"), (TOLD, FAILED), "disk that holds"), DONE)),
    Trial(
        "from two hosts to one",
        (Life(("", "SIGTERM@check:9"), (AGAIN, AGAIN), STOPPED), Life(("",), (0,), devices=1)),
        close=True,
    ),
    Trial(
        "from one host to two", (Life(("SIGTERM@check:9",), (AGAIN,), STOPPED, devices=1), DONE), close=True
    ),
    Trial("a slow bucket, SIGTERM", (Life(("", "SIGTERM@check:9"), (AGAIN, AGAIN), STOPPED), DONE), server=slow),
    Trial("a slow bucket, the first host is killed", (Life(("kill@line:6", ""), (KILLED, AGAIN)), DONE), server=slow),
    Trial("a bucket that is full", (Life(BOTH, (FAILED, TOLD), "quota", both=True), DONE), server=fill),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`only` runs the trials whose name holds this text; `keep` is a folder for all runs and compiled programs."""

    only: str = ""
    keep: Path | None = None


class Found(NamedTuple):
    """What a run made: parameters by stage and name, logs without seconds, and data files."""

    arrays: dict[str, np.ndarray]
    logs: dict[str, list[dict]]
    data: dict[str, bytes]


def read(out: Path | str) -> Found:
    """The results of a run, wherever its folder is."""
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    with bucket.working_copy(out) as folder:
        stages = sorted(file.parent for file in folder.glob("*/DONE"))
        arrays = {
            f"{stage.name}/{name}": np.asarray(leaf)
            for stage in stages
            if (stage / "model").exists()
            for name, leaf in checkpoint.leaves(stage, mesh)
        }
        logs = {stage.name: resumable.logged(stage) for stage in stages if (stage / "metrics.jsonl").exists()}
        data = {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("*/rows/*")}
    return Found(arrays, logs, data)


def difference(ours: Found, theirs: Found, *, close: bool) -> str:
    """How two runs compare, in words."""
    if ours.arrays.keys() != theirs.arrays.keys():
        return "OTHER STAGES"
    if not close:
        same = all(np.array_equal(ours.arrays[name], theirs.arrays[name]) for name in theirs.arrays)
        return "bit for bit the same" if same and ours[1:] == theirs[1:] else "DIFFERENT"
    worst = max(
        float(np.max(np.abs(ours.arrays[name] - of)) / max(1e-3, float(np.max(np.abs(of)))))
        for name, of in theirs.arrays.items()
    )
    return f"weights within {worst:.0e}" if worst < TOLERANCE else f"DIFFERENT by {worst:.0e}"


def lived(trial: Trial, out: Path | str, environment: dict[str, str], server: Any) -> Iterator[str]:
    """Start the hosts again and again as the trial says; how each life ended."""
    for number, life in enumerate(trial.lives):
        if trial.server is not None:
            trial.server(server, number)
        of = {**environment, "STUCK_AFTER": str(life.stuck_after)}
        begin = time.monotonic()
        found = local_hosts.pod(out, life.events, script=trial.script, devices=life.devices, environment=of)
        codes, said = tuple(code for code, _ in found), [text.splitlines()[-1:] for _, text in found]
        right = (codes == life.codes or (life.both and codes == life.codes[::-1])) and any(
            re.search(life.says, text) for _, text in found
        )
        print(f"    {codes} after {time.monotonic() - begin:.0f} s: {said}", flush=True)
        yield f"{codes}" if right else f"{codes} BUT EXPECTED {life.codes} AND {life.says!r}"


def main(settings: Settings) -> None:
    """Print a row per trial; exit 1 if anything was not as it should be."""
    place = settings.keep or Path(tempfile.mkdtemp())
    place.mkdir(parents=True, exist_ok=True)
    compiled = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(place / "compiled")}
    expected: dict[str, Found] = {}
    rows = []
    with chat_server.serving(reply=chat_server.judged_or_answered) as chat, fake_bucket.running() as server:
        os.environ.update(server.environment())
        environment = {**compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "ENDPOINT": chat.url}
        for number, trial in enumerate(TRIALS):
            if settings.only not in trial.what:
                continue
            print(trial.what, flush=True)
            if trial.script not in expected:
                whole = place / f"whole-{trial.script}"
                local_hosts.pod(whole, BOTH, script=trial.script, environment=environment)
                expected[trial.script] = read(whole)
            out = f"gs://any/runs/{number}" if trial.server is not None else place / f"trial-{number}"
            lives = list(lived(trial, out, environment, server))
            same = difference(read(out), expected[trial.script], close=trial.close)
            on = f"{len(trial.lives[-1].events)} process{'es' if len(trial.lives[-1].events) > 1 else ''}"
            rows.append(f"| {trial.what} | {lives[0]} | {on} | {lives[-1]} | {same} |")
            print(f"    {same}", flush=True)
    print("\n| what happens | exit codes | goes on with | exit codes | result |\n|---|---|---|---|---|")
    print("\n".join(rows))
    if any(word in row for row in rows for word in ("DIFFERENT", "OTHER", "BUT")):
        sys.exit(f"not all is as it should be; look at {place}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
