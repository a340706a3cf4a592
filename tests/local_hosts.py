"""Hosts of one run as processes of this machine: they find each other on loopback."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import compiled_once

HERE = Path(__file__).parent
SECONDS = 600
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false"
"""Quick to compile, and sums that do not depend on how many threads a process has."""


def free_port() -> int:
    """A port on loopback that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(
    count: int, devices: int, words: Sequence[Sequence[str]], environment: Mapping[str, str] = MappingProxyType({})
) -> list[subprocess.Popen[str]]:
    """`count` processes with as many devices in all, each with its own words."""
    shared = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices // count), **environment}
    if count > 1:
        shared |= compiled_once.ENVIRONMENT | {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
            "JAX_NUM_PROCESSES": str(count),
        }
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
    """Exit code and last words on stderr of each; none outlives the call."""
    try:
        said = [process.communicate(timeout=SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text.strip()) for process, text in zip(processes, said, strict=True)]


def pod(
    out: Path | str,
    events: Sequence[str],
    *,
    script: str = "pod.py",
    devices: int = 2,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[tuple[int, str]]:
    """Run the recipe of a script, by a process for each of the events; a space separates events of one process."""
    quick = {"XLA_FLAGS": XLA_FLAGS, "POSTTRAIN_HEARTBEAT_SECONDS": "10"}
    words = [[script, str(out), *one.split()] for one in events]
    return ends(start(len(events), devices, words, quick | dict(environment)))
