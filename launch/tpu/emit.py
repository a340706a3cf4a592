"""Specifications for others to run: xpk and JobSet on Google Kubernetes Engine, where tpu7x is, and SkyPilot."""

import shlex
from typing import Literal

import jinja2

from ...sharding import topology
from . import spec as specs
from .spec import Spec

Kind = Literal["jobset", "xpk", "skypilot"]

RESTARTS = 100
MOUNT = "/bucket"


def emit(spec: Spec, kind: Kind, *, image: str, cluster: str) -> str:
    """The text of the specification, or for xpk the command.

    Raises:
        ValueError: for hardware that does not exist there, or without an image, a cluster or a bucket it needs.
    """
    specs.check_name(spec.name, longest=40)  # Kubernetes appends the names of jobs and pods
    found = topology.parse(spec.tpu, slices=spec.slices)
    if not spec.bucket:
        raise ValueError(f"--out {spec.out!r}: give a folder in a bucket, which --emit {kind} mounts at {MOUNT}")
    if kind != "skypilot" and not image:
        raise ValueError(f"--emit {kind} needs --image, a container image with posttrain[tpu,gcs]")
    if kind == "xpk":
        return _xpk(spec, found, image, cluster)
    if kind == "skypilot" and (not found.accelerator_type or spec.slices > 1):
        raise ValueError(
            f"--tpu {spec.tpu!r}: SkyPilot runs on one slice of v4, v5e, v5p or v6e with a name such as v6e-16"
        )
    words = program(spec)
    fields = {
        "name": spec.name, "words": words, "command": shlex.join(words), "out": spec.out, "bucket": spec.bucket,
        "slices": spec.slices, "hosts": gke_hosts(found), "chips": found.chips // spec.slices // gke_hosts(found),
        "shape": "x".join(map(str, found.shape)), "accelerator": found.generation.gke,
        "accelerator_type": found.accelerator_type, "runtime": found.generation.runtime, "image": image,
        "spot": spec.capacity == "spot", "zone": spec.zones[0] if spec.zones else "", "restarts": RESTARTS,
        "service_account": spec.service_account or "default",
    }  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("posttrain.launch"), undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
        autoescape=False,
    )  # fmt: skip
    return environment.get_template(f"{kind}.yaml").render(fields)


def program(spec: Spec) -> list[str]:
    """The program and its arguments, where the bucket is mounted."""
    prefix = f"gs://{spec.bucket}/"
    given = [f"{MOUNT}/{word.removeprefix(prefix)}" if word.startswith(prefix) else word for word in spec.words]
    return ["posttrain", "run", spec.recipe, "--out", spec.out, *given]


def gke_hosts(found: topology.Topology) -> int:
    """Nodes of a slice in Kubernetes: four chips each, and none has eight."""
    return max(1, found.chips // found.slices // 4)


def _xpk(spec: Spec, found: topology.Topology, image: str, cluster: str) -> str:
    if not cluster:
        raise ValueError("--emit xpk needs --cluster, the cluster that `xpk cluster create` made")
    generation, shape = found.generation.name, "x".join(map(str, found.shape))
    kind = found.accelerator_type or f"{generation}-{shape}"
    if generation == "tpu7x":  # its names count JAX devices, two a chip
        kind = f"tpu7x-{found.devices_per_slice}"
    words = ["xpk", "workload", "create", "--cluster", cluster, "--workload", spec.name, f"--tpu-type={kind}"]
    words += [f"--num-slices={spec.slices}", "--docker-image", image, f"--max-restarts={RESTARTS}"]
    where = [f"--zone={spec.zones[0]}"] if spec.zones else []
    return shlex.join([*words, *where, f"--project={spec.project}", "--command", shlex.join(program(spec))]) + "\n"
