"""What is launched: a recipe, the slices that it runs on, where they are asked for. What cannot be is told here."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...sharding import topology
from ...sharding.topology import Topology

Capacity = Literal["on-demand", "spot", "reserved", "flex"]

NAME = r"[a-z]([a-z0-9-]*[a-z0-9])?"
LONGEST = 63  # characters of a name in Google Cloud
FLEX_HOURS = 7 * 24  # longest life of flex-start capacity


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A launch. `words` follow `posttrain run`; `out` is the run folder that all hosts write.

    `zones` are tried in turn when one is out of capacity; `hours` is how long to wait for capacity, and with flex-start
    also how long it then lasts at most. `env_file` holds KEY=VALUE lines for the hosts; no command shows their values.
    `only` are the stages that this launch trains, of a recipe that is fanned out; all if empty. `packages` go onto
    the hosts beside posttrain, without what they need themselves.
    """

    name: str
    recipe: str
    words: tuple[str, ...]
    out: str
    tpu: str
    zones: tuple[str, ...]
    project: str
    account: str = ""
    slices: int = 1
    capacity: Capacity = "on-demand"
    reservation: str = ""
    hours: float = 24.0
    service_account: str = ""
    network: str = ""
    subnetwork: str = ""
    internal_ips: bool = False
    iap: bool = False
    env_file: str = ""
    only: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    @property
    def topology(self) -> Topology:
        """The slices."""
        return topology.parse(self.tpu, slices=self.slices)

    @property
    def bucket(self) -> str:
        """The bucket that holds the run folder; empty for a disk that the hosts mount."""
        return self.out.removeprefix("gs://").partition("/")[0] if self.out.startswith("gs://") else ""

    @property
    def node_names(self) -> tuple[str, ...]:
        """One node is one slice; that of a single slice has the name of its queued resource."""
        return (self.name,) if self.slices == 1 else tuple(f"{self.name}-{i}" for i in range(self.slices))

    @property
    def hosts(self) -> int:
        """Virtual machines of all slices."""
        return self.topology.hosts_per_slice * self.slices


def to_json(spec: Spec) -> dict[str, Any]:
    """Plain JSON of it."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(spec).items()}


def from_json(fields: Mapping[str, Any]) -> Spec:
    """The launch that `to_json` described."""
    plain: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in fields.items()}
    return Spec(**plain)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Where two descriptions differ, as `field: old -> new`."""
    return [f"{key}: {old.get(key)!r} -> {new[key]!r}" for key in new if old.get(key) != new[key]]


def check(spec: Spec) -> None:
    """Refuse what Google Cloud would refuse, before anything is asked of it.

    Raises:
        ValueError: one sentence with the value, and what to give instead.
    """
    check_tpu(spec.tpu, spec.slices)
    check_name(spec.name, longest=LONGEST - len(f"-{spec.slices - 1}") * (spec.slices > 1))
    if not spec.zones:
        raise ValueError("--zone is missing: name the zones to try, such as --zone us-east5-b")
    for zone in spec.zones:
        if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", zone):
            raise ValueError(f"--zone {zone!r} is not the name of a zone: give one such as us-east5-b (not a region)")
    if not re.fullmatch(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", spec.project):
        raise ValueError(f"--project {spec.project!r} is not the id of a project: see `gcloud projects list`")
    _check_capacity(spec)
    _check_out(spec.out)
    for word in spec.words:
        if word.startswith("gs://") and not word.startswith(f"gs://{spec.bucket}/"):
            raise ValueError(f"{word!r} is not in the bucket of --out {spec.out!r}, the only one that the hosts mount")


def check_tpu(tpu: str, slices: int) -> None:
    """Refuse accelerators that the Cloud TPU API does not have."""
    kind = re.split(r"[-:]", tpu)[0]
    if kind in ("tpu7x", "v7x", "tpu7", "ironwood"):
        raise ValueError(
            f"--tpu {tpu!r}: tpu7x (Ironwood) is not in the Cloud TPU API, only in Google Kubernetes Engine and "
            "Compute Engine: write a specification for it with --emit jobset or --emit xpk, and --tpu tpu7x:4x4x4"
        )
    if kind in ("v2", "v3"):
        joined = f"{kind} slices cannot be joined to --slices {slices} (v4 and later can), and " if slices > 1 else ""
        raise ValueError(f"--tpu {tpu!r}: {joined}posttrain runs on v4, v5e, v5p and v6e")
    if (kind == "v5e" and "-" in tpu) or kind == "v5lite":
        number = tpu.partition("-")[2]
        raise ValueError(f"--tpu {tpu!r}: the Cloud TPU API spells v5e as v5litepod: give --tpu v5litepod-{number}")
    topology.parse(tpu, slices=slices)


def check_name(name: str, *, longest: int = LONGEST) -> None:
    """Refuse names that Google Cloud refuses."""
    if not re.fullmatch(NAME, name):
        raise ValueError(
            f"the name {name!r} would be refused by Google Cloud: give --name with lower-case letters, digits and "
            "hyphens, beginning with a letter and not ending with a hyphen"
        )
    if len(name) > longest:
        raise ValueError(f"the name {name!r} has {len(name)} characters, at most {longest} are allowed: shorten --name")


def _check_capacity(spec: Spec) -> None:
    if spec.reservation and spec.capacity != "reserved":
        raise ValueError(f"--reservation {spec.reservation!r} goes with --reserved, not with {spec.capacity} capacity")
    if spec.hours <= 0:
        raise ValueError(f"--hours {spec.hours:g}: give how many hours to wait for capacity, above 0")
    if spec.capacity == "flex" and not 1 <= spec.hours <= FLEX_HOURS:
        raise ValueError(f"--hours {spec.hours:g}: flex-start capacity lasts from 1 to {FLEX_HOURS} hours")


def _check_out(out: str) -> None:
    if out.startswith("gs://"):
        bucket, _, path = out.removeprefix("gs://").partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", bucket) or not path.strip("/"):
            raise ValueError(f"--out {out!r}: give a folder in a bucket, such as gs://my-bucket/runs/first")
    elif not out.startswith("/"):
        raise ValueError(
            f"--out {out!r} is a folder of this machine: give one that all hosts share and that outlives them, in a "
            "bucket (gs://my-bucket/runs/first) or on a disk that they mount (/mnt/shared/first)"
        )
