"""Writes launch_commands.txt: every command of a launch, for each generation and kind of capacity."""

import sys
from pathlib import Path

from posttrain.launch.tpu import sequence, spec
from posttrain.launch.tpu.spec import Spec

SHARED = {"name": "first", "recipe": "rl", "words": ("--model", "a b"), "out": "gs://my-bucket/runs/first"}
CASES = {
    "v6e, spot": {"tpu": "v6e-16", "zones": ("us-east5-b", "europe-west4-a"), "capacity": "spot"},
    "v4, on demand": {"tpu": "v4-8", "zones": ("us-central2-b",)},
    "v5e, two slices": {"tpu": "v5litepod-16", "zones": ("us-west4-a",), "slices": 2},
    "v5p, a reservation": {"tpu": "v5p-128", "zones": ("us-east5-a",), "capacity": "reserved", "reservation": "ours"},
    "v6e, flex-start": {"tpu": "v6e-8", "zones": ("us-east5-b",), "capacity": "flex", "hours": 4.0},
    "a shape without a name, a closed network, a mounted disk": {
        "tpu": "v5p:4x4x12", "zones": ("us-east5-a",), "out": "/mnt/shared/first", "account": "me@example.com",
        "network": "lab", "subnetwork": "lab-east", "internal_ips": True, "service_account": "sa@example.com",
    },
    "logging in through a proxy": {"tpu": "v6e-4", "zones": ("us-east5-b",), "iap": True},
}  # fmt: skip


def text() -> str:
    """What the golden file holds."""
    blocks = []
    for title, fields in CASES.items():
        one = Spec(**{**SHARED, "project": "my-project", **fields})
        spec.check(one)
        parts = sequence.parts(one, launch="0123456789ab", folder="/state/first", fetch="runs/first")
        blocks.append(f"== {title}\n{sequence.text(parts)}\n")
    return "\n".join(blocks)


if __name__ == "__main__":
    (Path(sys.argv[0]).parent / "launch_commands.txt").write_text(text())
