"""What a run ran on and how much memory it took, kept over restarts."""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import jax

from . import flags

FILE = "machine.json"


def record(out: Path) -> None:
    """Write `out`/machine.json; the peak is the largest of this process, its children and earlier runs."""
    peak = max(peak_rss_gib(), read(out).get("peak_rss_gib", 0.0))
    devices = jax.devices()
    content = {
        "peak_rss_gib": round(peak, 3),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "cpu_cores": os.cpu_count(),
        "jax": jax.__version__,
        **flags.effective(),
    }
    (out / FILE).write_text(json.dumps(content, indent=2) + "\n")


def read(out: Path) -> dict[str, Any]:
    """What `record` wrote; nothing for a run that it has not seen."""
    return json.loads((out / FILE).read_text()) if (out / FILE).is_file() else {}


def peak_rss_gib() -> float:
    """Most memory that this process, or one of its ended children, ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    usages = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(usages) * unit / 2**30
