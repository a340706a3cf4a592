"""The whole life of a launch, twice preempted, without a cloud: does it end with the weights of an undisturbed run?

    make pod-rehearsal

The launcher, its gcloud commands, host.sh, the recipe and its four hosts (processes that find each other through
jax.distributed) are real; gcloud, sudo, systemd and uv are those of tests/fake_gcloud.py and tests/fake_host.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

import compiled_once  # noqa: E402  # pyright: ignore[reportMissingImports]
import fake_cloud  # noqa: E402  # pyright: ignore[reportMissingImports]
import local_hosts  # noqa: E402  # pyright: ignore[reportMissingImports]

from posttrain.launch.tpu import record, session  # noqa: E402
from posttrain.launch.tpu.driver import World  # noqa: E402
from posttrain.sharding import mesh as meshes  # noqa: E402
from posttrain.train import checkpoint  # noqa: E402

HOSTS = 4
FASTER = 10.0  # the launcher's clock, against this machine's
STAGES = ("sft", "rl", "merge", "distill", "convert")
PROGRAM = r"""#!/bin/bash
# Plays .venv/bin/posttrain on a host: `run RECIPE --out OUT`, with what is planned for this host in this life.
host=${FAKE_HOST##*-w-}
life=$(sed 's/.*"created": \([0-9]*\).*/\1/' "$FAKE_CLOUD/cloud.json")
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1 JAX_PROCESS_ID=$host JAX_NUM_PROCESSES=@HOSTS@
export JAX_COORDINATOR_ADDRESS=localhost:$(cat "$FAKE_CLOUD/port-$life") POSTTRAIN_HEARTBEAT_SECONDS=20
planned=$(cat "$FAKE_CLOUD/planned-$life-$host" 2>/dev/null)
@PYTHON@ @POD@ "$4" $planned &
child=$! code=0
trap 'kill -TERM $child' TERM
while kill -0 $child 2>/dev/null; do wait $child; done
wait $child || code=$?
if [ -n "$planned" ] && [[ $code =~ ^(75|137)$ ]]; then sleep 3 && touch "$FAKE_CLOUD/taken"; fi
exit $code
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`rollout_check`: at which of its checks host 1 gets SIGTERM. `save`: at which step's save host 0 is killed."""

    rollout_check: int = 9
    save: int = 2
    keep: Path | None = None


def launch(folder: Path, planned: dict[tuple[int, int], str]) -> tuple[record.Record, fake_cloud.FakeCloud]:
    """Launch the recipe in a cloud of its own; `planned` is what happens by (life, host)."""
    folder.mkdir()
    patch = pytest.MonkeyPatch()
    cloud = fake_cloud.FakeCloud(folder, patch).plays(real=True, hosts=HOSTS)
    program = folder / "program"
    program.write_text(
        PROGRAM.replace("@HOSTS@", str(HOSTS))
        .replace("@PYTHON@", sys.executable)
        .replace("@POD@", str(TESTS / "pod.py"))
    )
    program.chmod(0o755)
    patch.setenv("FAKE_POSTTRAIN", str(program))
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder.parent / "compiled"))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    patch.setenv("XLA_FLAGS", local_hosts.XLA_FLAGS)
    for name, value in compiled_once.ENVIRONMENT.items():
        patch.setenv(name, value)
    for life in range(1, 10):
        (folder / f"port-{life}").write_text(str(local_hosts.free_port()))
    for (life, host), event in planned.items():
        (folder / f"planned-{life}-{host}").write_text(event)
    begin = time.time()
    world = World(
        say=lambda text: print(f"{time.time() - begin:5.0f} s  {text}", flush=True),
        log=lambda text: None,
        now=lambda: time.time() * FASTER,
        sleep=lambda seconds: time.sleep(seconds / FASTER),
    )
    try:
        spec = fake_cloud.spec(recipe="pod", words=(), out=str(folder / "shared/first"))
        session.launch(spec, str(folder / "fetched"), world, dirty=True)
    finally:
        one = record.load("first")
        patch.undo()
    return one, cloud


def weights(cloud: fake_cloud.FakeCloud, mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
    """All parameters of all models that the run made."""
    out = cloud.folder / "shared/first"
    return {
        f"{stage}/{name}": np.asarray(leaf) for stage in STAGES for name, leaf in checkpoint.leaves(out / stage, mesh)
    }


def ends(cloud: fake_cloud.FakeCloud) -> dict[str, list[str]]:
    """How the attempts at each stage ended."""
    out = cloud.folder / "shared/first"
    files = {file.parent.name: file.read_text().splitlines() for file in out.glob("*/attempts.jsonl")}
    return {stage: [line for line in lines if line] for stage, lines in files.items()}


def main(settings: Settings) -> None:
    """Print what happens, and end with an error unless all is as it should be."""
    begin, place = time.time(), settings.keep or Path(tempfile.mkdtemp())
    place.mkdir(parents=True, exist_ok=True)
    print("preempted twice:")
    planned = {(1, 1): f"SIGTERM@check:{settings.rollout_check}", (2, 0): f"kill@saving:{settings.save}"}
    disturbed, first = launch(place / "disturbed", planned)
    print("undisturbed:")
    calm, second = launch(place / "undisturbed", {})
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    ours, theirs = weights(first, mesh), weights(second, mesh)
    claims = {
        "both launches are done": (disturbed.state.outcome, calm.state.outcome) == ("done", "done"),
        "two preemptions, three creations": (
            disturbed.state.preemptions,
            len(first.calls("create")),
        )
        == (2, 3),
        "the SIGTERM came in a rollout": '"interrupted"' in "".join(ends(first)["rl"]),
        "the kill ended an attempt": '"killed"' in "".join(line for lines in ends(first).values() for line in lines),
        "nothing is left in the cloud": first.resources == second.resources == {},
        "the report is here": (first.folder / "fetched/report.html").is_file(),
        f"all {len(theirs)} arrays of {len(STAGES)} models are the same, bit for bit": ours.keys() == theirs.keys()
        and all(np.array_equal(ours[name], theirs[name]) for name in theirs),
    }
    for claim, holds in claims.items():
        print(f"{'✓' if holds else '✗'} {claim}")
    for stage, lines in ends(first).items():
        print(f"  attempts at {stage}: {', '.join(json.loads(line).get('end', 'begun') for line in lines)}")
    print(f"{time.time() - begin:.0f} seconds on {os.cpu_count()} cores")
    if not all(claims.values()):
        sys.exit(f"the rehearsal failed; look at {place}")
    if settings.keep is None:
        shutil.rmtree(place)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
