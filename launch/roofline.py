"""How long a program takes at least: what it computes and moves, over what the chips can."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..sharding.topology import Topology
from .hlo import Collective

SHARE = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "one-to-one": lambda n: 1,
}
"""Bytes that each of n devices sends per byte that it gives to a collective, by the best algorithm."""


class Work(NamedTuple):
    """What one call of a program does on one device: operations, HBM bytes, seconds of transfer hidden and not."""

    flops: float
    bytes: float
    ici: float
    dcn: float
    exposed: float


class Roofline(NamedTuple):
    """Seconds that one call takes of each kind, and together.

    Computation, HBM and hidden transfers may run beside one another, so the longest counts; `exposed` transfers have
    nothing to run beside and come on top. A bound, not a forecast: nothing is as fast as its peak.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float
    exposed: float

    @property
    def seconds(self) -> float:
        """The least time."""
        return max(self.compute, self.hbm, self.ici, self.dcn) + self.exposed

    @property
    def bound(self) -> str:
        """What takes longest."""
        times = {"compute": self.compute, "HBM": self.hbm, "ICI": self.ici, "DCN": self.dcn}
        if self.exposed > max(times.values()):
            return "exposed transfers"
        return max(times, key=lambda name: times[name])


def seconds(collective: Collective, topology: Topology, coords: Sequence[tuple[int, ...]]) -> float:
    """Least seconds of one transfer, over all its repetitions. `coords` are the chips of the mesh's partitions.

    Raises:
        KeyError: for a kind of transfer that is not known.
    """
    if collective.across_slices:
        members, speed = topology.slices, topology.dcn
    else:
        group = collective.group or range(topology.devices_per_slice)
        members, speed = len(group), topology.ici([coords[partition] for partition in group])
    if members < 2:
        return 0.0
    return collective.times * collective.bytes * SHARE[collective.kind](members) / speed


def work(
    flops: float, bytes: float, collectives: Sequence[Collective], topology: Topology, coords: Sequence[tuple[int, ...]]
) -> Work:
    """Work of a device: `flops` are all devices', `bytes` one's."""
    times = [(one, seconds(one, topology, coords)) for one in collectives]
    return Work(
        flops / topology.devices,
        bytes,
        math.fsum(t for one, t in times if one.hidden and not one.across_slices),
        math.fsum(t for one, t in times if one.hidden and one.across_slices),
        math.fsum(t for one, t in times if not one.hidden),
    )


def roofline(work: Work, topology: Topology) -> Roofline:
    """Seconds of some work on a topology."""
    return Roofline(work.flops / topology.flops, work.bytes / topology.hbm_bandwidth, work.ici, work.dcn, work.exposed)
