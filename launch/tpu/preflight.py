"""What has to hold before anything is created: gcloud, account, project, hardware, quota, bucket, a free name."""

import json
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from . import bundle, commands, record
from . import spec as specs
from .cloud import Answer
from .commands import Command
from .errors import Problem
from .spec import Spec

Run = Callable[[Command], Answer]


class Check(NamedTuple):
    """A check: what it is about, whether it holds (None: it could not be told), what was found or what to do."""

    about: str
    holds: bool | None
    said: str


def checks(spec: Spec, run: Run) -> Iterator[Check]:
    """All checks of the cloud, one after the other; the first that fails explains those after it."""
    yield _account(spec, run)
    yield _api(spec, run)
    found = [_hardware(spec, zone, run) for zone in spec.zones]
    yield from found
    if spec.capacity != "reserved":
        yield from (_quota(spec, zone, rows) for rows in [_quotas(spec, run)] for zone in spec.zones)
    if not spec.internal_ips and spec.hosts > 8:
        said = (
            f"{spec.hosts} hosts take as many external addresses, 8 a region unless you asked for more: --internal-ips"
        )
        yield Check("addresses", None, said)
    yield _bucket(spec, run)


def _failed(about: str, problem: Problem) -> Check:
    return Check(about, False, str(problem))


def _account(spec: Spec, run: Run) -> Check:
    answer = run(commands.account(spec))
    if answer.problem is not None:
        return _failed("account", answer.problem)
    accounts = answer.stdout.split()
    if not accounts:
        return Check("account", False, "gcloud is not logged in: run `gcloud auth login`")
    return Check("account", True, spec.account or accounts[0])


def _api(spec: Spec, run: Run) -> Check:
    answer = run(commands.enabled(spec))
    if answer.problem is not None:
        return _failed("Cloud TPU API", answer.problem)
    if commands.API not in answer.stdout.split():
        said = (
            f"it is off in project {spec.project}: run `gcloud services enable {commands.API} --project={spec.project}`"
        )
        return Check("Cloud TPU API", False, said)
    return Check("Cloud TPU API", True, f"is on in project {spec.project}")


def _hardware(spec: Spec, zone: str, run: Run) -> Check:
    answer = run(commands.accelerators(spec, zone))
    if answer.problem is not None:
        return _failed(f"hardware in {zone}", answer.problem)
    if not answer.stdout.split():
        kind = spec.topology.generation.accelerator
        said = (
            f"there is no {spec.tpu} in {zone}: see what it has with `gcloud compute tpus accelerator-types list "
            f"--zone={zone} --project={spec.project}`, and which zones have {kind} at "
            "cloud.google.com/tpu/docs/regions-zones"
        )
        return Check(f"hardware in {zone}", False, said)
    return Check(f"hardware in {zone}", True, f"has {spec.tpu}")


def _quotas(spec: Spec, run: Run) -> list[dict]:
    answer = run(commands.quotas(spec))
    return json.loads(answer.stdout or "[]") if answer.code == 0 else []


QUOTA_IDS = {"v4": r"TPUV4s\w*", "v5e": r"TPUV5s\w*Litepod", "v5p": r"TPUV5P\w*", "v6e": r"TPUV6E\w*"}
"""What ids of quotas begin with, as in TPUV6EPreemptiblePerProjectPerZoneForTPUAPI."""


def _quota(spec: Spec, zone: str, rows: list[dict]) -> Check:
    """The project's quota in a zone against the chips that are asked for; quotas of v4 and v5p may count cores."""
    about, kind = f"quota in {zone}", spec.topology.generation.name
    preemptible = spec.capacity in ("spot", "flex")
    for row in rows:
        name = row.get("quotaId", "")
        if not re.match(QUOTA_IDS[kind], name) or ("Preemptible" in name) != preemptible:
            continue
        for info in row.get("dimensionsInfos", []):
            here = info.get("dimensions", {}).get("zone") == zone or zone in info.get("applicableLocations", [])
            value = int(info.get("details", {}).get("value", 0))
            if here and 0 <= value < spec.topology.chips:
                said = (
                    f"{name} is {value} in {zone}, {spec.topology.chips} chips are asked for: ask for more at "
                    f"console.cloud.google.com/iam-admin/quotas?project={spec.project}"
                )
                return Check(about, False, said)
            if here:
                return Check(about, True, f"{name} is {value if value >= 0 else 'unlimited'}")
    return Check(
        about, None, "gcloud does not tell it; a quota that is too small is told when the slices are asked for"
    )


ACCESS = "--uniform-bucket-level-access"


def _bucket(spec: Spec, run: Run) -> Check:
    """Whether the run folder can be read, and holds no other run."""
    if not spec.out.startswith("gs://"):
        return Check("run folder", None, f"{spec.out} has to be a disk that all hosts mount")
    answer = run(commands.settings(spec))
    if answer.problem is None:
        old, new = json.loads(answer.stdout), json.loads(bundle.settings(spec))
        changes = specs.differences(old, new)
        if changes:
            said = f"{spec.out} holds a run with other settings ({'; '.join(changes)}): give another --out"
            return Check("run folder", False, said)
        return Check("run folder", True, f"{spec.out} holds this run: it goes on")
    if answer.problem.kind == "absent" and "matched no objects" in answer.problem.text:
        return Check("run folder", True, f"{spec.out} is new")
    create = f"gcloud storage buckets create gs://{spec.bucket} --project={spec.project} {ACCESS}"
    said = f"gs://{spec.bucket} cannot be read: create it with `{create}`, or ask for access"
    return Check("run folder", False, f"{said}; {answer.problem}")


def name_in_use(spec: Spec) -> Check:
    """Whether this machine knows a launch of this name that is another one."""
    old = record.find(spec.name)
    if old is None:
        return Check("name", True, f"{spec.name} is free")
    before, now = specs.to_json(old.spec), specs.to_json(spec)
    if old.over:  # it may go on elsewhere, on other slices
        before, now = ({key: one[key] for key in ("recipe", "words", "out")} for one in (before, now))
        before, now = (before, now) if before["out"] == now["out"] else ({}, {})
    changes = specs.differences(before, now)
    if not changes:
        return Check("name", True, f"{spec.name} goes on")
    what = "was launched" if old.over else "is launched"
    remedy = "give another --name" if old.over else f"`posttrain stop {spec.name}` it first, or give another --name"
    return Check("name", False, f"{spec.name} {what} with other settings ({'; '.join(changes)}): {remedy}")


def require(found: Iterator[Check], say: Callable[[str], None]) -> None:
    """Show each check, and stop at the first that fails.

    Raises:
        ValueError: what does not hold.
    """
    for one in found:
        if one.holds is False:
            raise ValueError(f"{one.about}: {one.said}")
        say(f"  {'✓' if one.holds else '?'} {one.about}: {one.said}")
