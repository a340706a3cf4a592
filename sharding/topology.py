"""TPU generations and slices of them: chips, memory, speeds, and how fast a group of devices can talk.

Numbers per chip are those of Google's system-architecture pages and https://jax-ml.github.io/scaling-book/tpus; the HBM
of a JAX device is what the TPU compiler of libtpu 0.0.42 lets a program use.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

GIB = 2**30
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A kind of TPU chip. Speeds are per chip and per second, `hbm` is bytes per JAX device.

    `link` is one ICI link in one direction; a chip has two links along each of the `dims` axes of its torus. An axis is
    closed to a ring if its size is a multiple of `ring`, at least. `cores` is how many TensorCores a chip counts for in
    accelerator names such as v5p-128. `accelerator` begins those names in the Cloud TPU API, `runtime` is the image of
    its virtual machines there (https://cloud.google.com/tpu/docs/runtimes); both are empty for what it does not offer.
    `gke` is the accelerator label of nodes in Google Kubernetes Engine.
    """

    name: str
    flops: float
    hbm: float
    hbm_bandwidth: float
    link: float
    dims: int
    ring: int
    dcn: float
    gke: str
    accelerator: str = ""
    runtime: str = ""
    devices_per_chip: int = 1
    cores: int = 1


GENERATIONS: dict[str, Generation] = {
    one.name: one
    for one in (
        Generation(
            name="v4", flops=275e12, hbm=30.75 * GIB, hbm_bandwidth=1200 * GB, link=45 * GB, dims=3, ring=4,
            dcn=6.25 * GB, cores=2, accelerator="v4", runtime="tpu-ubuntu2204-base", gke="tpu-v4-podslice",
        ),
        Generation(
            name="v5e", flops=197e12, hbm=15.75 * GIB, hbm_bandwidth=819 * GB, link=45 * GB, dims=2, ring=16,
            dcn=3.125 * GB, accelerator="v5litepod", runtime="v2-alpha-tpuv5-lite", gke="tpu-v5-lite-podslice",
        ),
        Generation(
            name="v5p", flops=459e12, hbm=95.73 * GIB, hbm_bandwidth=2765 * GB, link=90 * GB, dims=3, ring=4,
            dcn=6.25 * GB, cores=2, accelerator="v5p", runtime="v2-alpha-tpuv5", gke="tpu-v5p-slice",
        ),
        Generation(
            name="v6e", flops=918e12, hbm=31.24 * GIB, hbm_bandwidth=1638 * GB, link=90 * GB, dims=2, ring=16,
            dcn=12.5 * GB, accelerator="v6e", runtime="v2-alpha-tpuv6e", gke="tpu-v6e-slice",
        ),
        Generation(
            name="tpu7x", flops=2307e12, hbm=94.74 * GIB, hbm_bandwidth=7380 * GB, link=90 * GB, dims=3, ring=4,
            dcn=12.5 * GB, devices_per_chip=2, gke="tpu7x",
        ),
    )
}  # fmt: skip

FLAT = {
    1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16),
}  # fmt: skip
CUBIC = {
    4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8),
    512: (8, 8, 8),
}  # fmt: skip
"""Shape of a slice by its chips, where a name such as v6e-64 or v5p-128 stands for one."""

NAMES = {"v5e": "v5e"} | {one.accelerator: one.name for one in GENERATIONS.values() if one.accelerator}
"""Generation by the first part of an accelerator name; tpu7x has none."""


@dataclass(frozen=True)
class Topology:
    """`slices` slices of one shape, joined by the data-centre network. Devices are JAX's."""

    generation: Generation
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices in all slices; a tpu7x chip is two."""
        return self.chips * self.generation.devices_per_chip

    @property
    def devices_per_slice(self) -> int:
        """JAX devices in one slice."""
        return self.devices // self.slices

    @property
    def hosts_per_slice(self) -> int:
        """Hosts of one slice in the Cloud TPU API: four chips each, but a flat slice of up to eight is one host."""
        chips = self.chips // self.slices
        return 1 if self.generation.dims == 2 and chips <= 8 else max(1, chips // 4)

    @property
    def accelerator_type(self) -> str:
        """Name of one slice in the Cloud TPU API, such as v5litepod-16; empty for a shape that no name stands for."""
        shapes, chips = (FLAT if self.generation.dims == 2 else CUBIC), self.chips // self.slices
        named = self.generation.accelerator and shapes.get(chips) == self.shape
        return f"{self.generation.accelerator}-{chips * self.generation.cores}" if named else ""

    @property
    def flops(self) -> float:
        """Peak bfloat16 FLOP/s of a device."""
        return self.generation.flops / self.generation.devices_per_chip

    @property
    def hbm_bandwidth(self) -> float:
        """HBM bytes/s of a device."""
        return self.generation.hbm_bandwidth / self.generation.devices_per_chip

    @property
    def dcn(self) -> float:
        """Bytes/s of a device over the data-centre network, one way."""
        return self.generation.dcn / self.generation.devices_per_chip

    @property
    def slice_name(self) -> str:
        """Such as v5p:4x4x4, as the TPU compiler spells one slice."""
        return f"{self.generation.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.slice_name if self.slices == 1 else f"{self.slices} x {self.slice_name}"

    def ici(self, coords: Sequence[tuple[int, ...]]) -> float:
        """Bytes/s that each device of a group in one slice can send round it, both ways along every axis it spans.

        A closed axis gives two links; a group that covers only part of one, or an open one, has a line: one link's
        worth. Devices of one chip share its links, and talk to one another at HBM's speed.
        """
        total = 0.0
        for axis, size in enumerate(self.shape):
            spanned = len({place[axis] for place in coords})
            if spanned > 1:
                closed = spanned == size and size % self.generation.ring == 0
                total += self.generation.link * (2 if closed else 1)
        return total / self.generation.devices_per_chip if total else self.hbm_bandwidth


def parse(text: str, *, slices: int = 1) -> Topology:
    """The topology that 'v5p:4x4x4' or an accelerator name ('v6e-64', 'v5litepod-16', 'v5p-128') stands for.

    In names of v4 and v5p the number counts TensorCores, two a chip.

    Raises:
        ValueError: for a generation, a shape or a name that does not exist, or fewer than one slice.
    """
    if slices < 1:
        raise ValueError(f"--slices {slices}: a topology has at least one slice")
    shaped = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if shaped:
        generation, sizes = GENERATIONS.get(shaped[1]), tuple(map(int, shaped[2].split("x")))
        if generation and len(sizes) == generation.dims and min(sizes) > 0:
            return Topology(generation, sizes, slices)
        if generation:
            example = "4x4" if generation.dims == 2 else "4x4x4"
            raise ValueError(
                f"topology {text!r}: a {generation.name} slice has {generation.dims} sizes of at least 1, such as "
                f"{generation.name}:{example}"
            )
    named = re.fullmatch(r"(\w+)-(\d+)", text)
    if named and named[1] in NAMES:
        return _named(text, GENERATIONS[NAMES[named[1]]], int(named[2]), slices)
    raise ValueError(
        f"unknown topology {text!r}: give a generation ({', '.join(GENERATIONS)}) with a shape, such as v5p:4x4x4 or "
        "v6e:8x8, or an accelerator name such as v6e-64 or v5p-128"
    )


def _named(text: str, generation: Generation, number: int, slices: int) -> Topology:
    shapes = FLAT if generation.dims == 2 else CUBIC
    shape = shapes.get(number // generation.cores)
    if shape is None or number % generation.cores:
        known = ", ".join(f"{text.split('-')[0]}-{chips * generation.cores}" for chips in shapes)
        raise ValueError(f"there is no accelerator {text!r}: choose one of {known}, or give a shape")
    return Topology(generation, shape, slices)
