"""Every command of a launch, as a list of arguments: no shell reads them, so nothing in them can be anything else.

What runs on a host is one word of `ssh`, quoted with shlex: the script that `bundle` has put there, and its argument.
"""

import shlex
from typing import NamedTuple

from .spec import Spec

API = "tpu.googleapis.com"
LABEL = "posttrain-launch"
"""A label with the id of the launch on everything that it creates; nothing without it is ever deleted."""
BATCH = 8
"""Hosts that gcloud connects to at a time: sshd drops connections beyond ten that have not logged in."""


class Command(NamedTuple):
    """Arguments, the longest that it may take, and whether it is let finish when the user asks to stop."""

    argv: list[str]
    seconds: float
    finishes: bool = False

    def __str__(self) -> str:
        return shlex.join(self.argv)


def folder(name: str) -> str:
    """Folder of a launch on its hosts, in the home folder of the user that gcloud logs in."""
    return f"posttrain-{name}"


def create(spec: Spec, zone: str, launch: str) -> Command:
    """Ask for the slices. Only flex-start and named reservations need the alpha commands."""
    alpha = ["alpha"] if spec.capacity == "flex" or spec.reservation else []
    name = ["--node-id", spec.name] if spec.slices == 1 else [f"--node-count={spec.slices}", "--node-prefix", spec.name]
    accelerator = spec.topology.accelerator_type
    shape = "x".join(map(str, spec.topology.shape))
    hardware = (
        [f"--accelerator-type={accelerator}"]
        if accelerator
        else [f"--type={spec.topology.generation.accelerator}", f"--topology={shape}"]
    )
    capacity = {
        "on-demand": [],
        "spot": ["--spot"],
        "reserved": ["--reserved"],
        "flex": ["--provisioning-model=flex-start", f"--max-run-duration={int(spec.hours)}h"],
    }[spec.capacity]
    reservation = spec.reservation
    if reservation and "/" not in reservation:
        reservation = f"projects/{spec.project}/locations/{zone}/reservations/{reservation}"
    options = {
        "--reservation": reservation,
        "--service-account": spec.service_account,
        "--network": spec.network,
        "--subnetwork": spec.subnetwork,
    }
    chosen = [f"{key}={value}" for key, value in options.items() if value]
    chosen += ["--internal-ips"] if spec.internal_ips else []
    words = ["gcloud", *alpha, "compute", "tpus", "queued-resources", "create", spec.name, *name, *hardware]
    words += [f"--runtime-version={spec.topology.generation.runtime}", *capacity, *chosen]
    words += [f"--labels={LABEL}={launch},posttrain-run={spec.name}", "--async"]
    return Command([*words, *_where(spec, zone)], 300, finishes=True)


def describe(spec: Spec, zone: str) -> Command:
    """The queued resource: its state, and why it failed."""
    return Command([*_queued("describe", spec), *_where(spec, zone), "--format=json"], 120)


def nodes(spec: Spec, zone: str) -> Command:
    """All nodes of the zone, those of the launch among them: their states and addresses."""
    return Command(["gcloud", "compute", "tpus", "tpu-vm", "list", *_where(spec, zone), "--format=json"], 120)


def delete(spec: Spec, zone: str) -> Command:
    """Delete the queued resource with its nodes; the caller has seen our label on it."""
    return Command([*_queued("delete", spec), "--force", *_where(spec, zone)], 1200, finishes=True)


def copy(spec: Spec, zone: str, bundle: str) -> Command:
    """Copy the folder with the wheel and the scripts to every host."""
    words = ["gcloud", "compute", "tpus", "queued-resources", "scp", "--recurse", bundle, f"{spec.name}:"]
    return Command([*words, *_workers(spec), *_where(spec, zone)], 1800)


def on_hosts(spec: Spec, zone: str, verb: str, *arguments: str, worker: str = "all", seconds: float = 300) -> Command:
    """Run a verb of host.sh (bootstrap, start, look, stop) on all hosts, or on one: 'NODE/WORKER'."""
    remote = shlex.join(["bash", f"{folder(spec.name)}/host.sh", verb, *arguments])
    words = [*_queued("ssh", spec), f"--command={remote}", *_workers(spec, worker), *_where(spec, zone)]
    return Command(words, seconds)


def fetch(spec: Spec, zone: str, target: str) -> Command:
    """Copy the report here: from the bucket, or from a disk that the first host sees."""
    files = [f"{spec.out.rstrip('/')}/{name}" for name in ("report.html", "report.json")]
    if spec.out.startswith("gs://"):
        return Command(["gcloud", "storage", "cp", *files, f"{target}/", *_who(spec)], 600)
    words = ["gcloud", "compute", "tpus", "queued-resources", "scp", *(f"{spec.name}:{file}" for file in files)]
    return Command([*words, f"{target}/", *_workers(spec, "0/0"), *_where(spec, zone)], 600)


def account(spec: Spec) -> Command:
    """Who gcloud is logged in as."""
    return Command(["gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"], 60)


def enabled(spec: Spec) -> Command:
    """Whether the project has the Cloud TPU API."""
    words = ["gcloud", "services", "list", "--enabled", f"--filter=config.name:{API}", "--format=value(config.name)"]
    return Command([*words, *_who(spec)], 120)


def accelerators(spec: Spec, zone: str) -> Command:
    """Whether the zone has the hardware: what it lists counts, not the documentation."""
    wanted = spec.topology.accelerator_type or f"{spec.topology.generation.accelerator}-*"
    words = [
        "gcloud",
        "compute",
        "tpus",
        "accelerator-types",
        "list",
        f"--filter=type={wanted}",
        "--format=value(type)",
    ]
    return Command([*words, *_where(spec, zone)], 120)


def quotas(spec: Spec) -> Command:
    """How many chips of the API's quotas the project may have, by zone."""
    words = ["gcloud", "beta", "quotas", "info", "list", f"--service={API}", "--filter=quotaId~PerProjectPerZone"]
    return Command([*words, *_who(spec), "--format=json"], 120)


def settings(spec: Spec) -> Command:
    """What an earlier launch into this run folder was."""
    return Command(["gcloud", "storage", "cat", f"{spec.out.rstrip('/')}/launch.json", *_who(spec)], 120)


def remember(spec: Spec, file: str) -> Command:
    """Write down what this launch is, in its run folder; shows also that the bucket can be written."""
    return Command(["gcloud", "storage", "cp", file, f"{spec.out.rstrip('/')}/launch.json", *_who(spec)], 120)


def default_project() -> Command:
    """The project that gcloud is set to."""
    return Command(["gcloud", "config", "get-value", "project", "--quiet"], 60)


def _queued(verb: str, spec: Spec) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, spec.name]


def _workers(spec: Spec, worker: str = "all") -> list[str]:
    node, _, number = worker.partition("/")
    through = ["--tunnel-through-iap"] if spec.iap else ["--internal-ip"] if spec.internal_ips else []
    batch = [f"--batch-size={BATCH}"] if worker == "all" else []
    return [f"--node={node}", f"--worker={number or 'all'}", *batch, *through]


def _where(spec: Spec, zone: str) -> list[str]:
    return [f"--zone={zone}", *_who(spec)]


def _who(spec: Spec) -> list[str]:
    return [f"--project={spec.project}", *([f"--account={spec.account}"] if spec.account else []), "--quiet"]
