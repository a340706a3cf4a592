"""Runs gcloud and reads its answers: the only module of the launcher that starts a process."""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ...train.stop import RUN_AGAIN
from .commands import LABEL, Command
from .errors import Problem, classify
from .lifecycle import Host, Resource
from .spec import Spec

TICK = 0.05
PIECE = 65536  # bytes of a log that a look brings at most; host.sh has the same number


class Answer(NamedTuple):
    """How a command ended. `code` is None if it was cut off because the user asked to stop."""

    code: int | None
    stdout: str
    stderr: str

    @property
    def problem(self) -> Problem | None:
        """What went wrong, if anything did."""
        return (
            None if self.code == 0 else classify("\n".join(filter(None, [self.stderr.strip(), _refusals(self.stdout)])))
        )


def _refusals(stdout: str) -> str:
    return "\n".join(line for line in stdout.splitlines() if line.startswith("posttrain-refused:"))


def run(command: Command, stopped: Callable[[], bool] = lambda: False) -> Answer:
    """Run a command to its end, its time limit, or, unless it has to finish, until the user asks to stop.

    It gets a process group of its own: Ctrl-C in the terminal reaches the launcher, which decides what that means.

    Raises:
        FileNotFoundError: if the program is not installed.
    """
    if shutil.which(command.argv[0]) is None:
        raise FileNotFoundError(
            f"{command.argv[0]} is not on the PATH: install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)"
        )
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command.argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        deadline, late, cut = time.monotonic() + command.seconds, False, False
        try:
            while process.poll() is None and not late and not cut:
                try:
                    process.wait(TICK)
                except subprocess.TimeoutExpired:
                    late = time.monotonic() > deadline
                    cut = stopped() and not command.finishes
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        texts = [_read(file) for file in (out, err)]
    if late:
        texts[1] += f"\n{command.argv[0]} took longer than {command.seconds:g} seconds"
    return Answer(None if cut else 1 if late else process.returncode, texts[0], texts[1])


def _read(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def resource(stdout: str, launch: str) -> Resource:
    """What `queued-resources describe --format=json` says.

    Raises:
        ValueError: if it is not JSON.
    """
    found = json.loads(stdout)
    state = found.get("state", {})
    error = state.get("failedData", {}).get("error", {})
    labels = [spec.get("node", {}).get("labels", {}) for spec in found.get("tpu", {}).get("nodeSpec", [])]
    said = f"code {error.get('code')}: {error.get('message')}" if error else ""
    return Resource(
        state=state.get("state", "UNKNOWN"),
        initiator=state.get("stateInitiator", ""),
        error=said,
        ours=any(one.get(LABEL) == launch for one in labels),
    )


def node_states(stdout: str, spec: Spec) -> tuple[tuple[str, ...], int]:
    """States of the launch's slices in `tpu-vm list --format=json`, and how many hosts those have together."""
    listed = {node["name"].rpartition("/")[2]: node for node in json.loads(stdout or "[]")}
    states = tuple(listed.get(name, {}).get("state", "NOT_FOUND") for name in spec.node_names)
    hosts = sum(len(listed.get(name, {}).get("networkEndpoints", [])) for name in spec.node_names)
    return states, hosts or spec.hosts


HOST_LINE = re.compile(r"^posttrain-host (\S+) (running|ended|absent) (\d+) (\d+)$", re.MULTILINE)


def hosts(stdout: str) -> tuple[Host, ...]:
    """What host.sh says of each host that answered."""
    return tuple(Host(name, state, int(code), int(size)) for name, state, code, size in HOST_LINE.findall(stdout))


def ended_badly(stdout: str) -> bool:
    """Whether a host's program ended, and neither well nor to be started again."""
    return any(host.state == "ended" and host.code not in (0, RUN_AGAIN) for host in hosts(stdout))


def log_part(stdout: str) -> str:
    """The piece of a log that follows the line of its host."""
    found = HOST_LINE.search(stdout)
    return stdout[found.end() + 1 :] if found else ""


def for_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns, aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
