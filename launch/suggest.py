"""Searches mesh, remat and micro-batch of a training step: by arithmetic first, then the best few by the compiler."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..model.config import ModelConfig
from ..sharding.topology import GIB, Topology

TRIES = 6
"""Candidates that are compiled."""
TENSOR = (1, 2, 4, 8)
ROWS = (1, 2, 4, 8)
REMAT = {"none": (0.0, 24.0), "dots": (0.1, 10.0), "full": (1.0, 1.0)}
"""Share of the forward pass that is computed again, and what is kept per layer, in residual streams."""
STATE_BYTES = 16
"""Per parameter, in float32: itself, two moments, its gradient's sum."""


class Candidate(NamedTuple):
    """Sizes of a mesh, remat policy, rows per device and micro-batch, and what arithmetic says of them."""

    mesh: Mapping[str, int]
    remat: str
    rows: int
    seconds_per_token: float
    bytes: float

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch over all devices."""
        return self.rows * self.mesh["data"] * self.mesh["fsdp"]

    def __str__(self) -> str:
        axes = ",".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1) or "fsdp=1"
        return f"--mesh {axes} --remat {self.remat} --micro-rows {self.micro_rows}"


def candidates(config: ModelConfig, row_tokens: int, topology: Topology) -> list[Candidate]:
    """All that may fit, the fastest by arithmetic first."""
    found = [
        estimate(config, row_tokens, topology, {"data": data, "fsdp": rest // tensor, "tensor": tensor}, remat, rows)
        for data in _multiples(topology)
        for rest in [topology.devices // data]
        for tensor in TENSOR
        if rest % tensor == 0 and config.num_kv_heads % tensor == 0
        for remat, rows in itertools.product(REMAT, ROWS)
    ]
    fitting = [one for one in found if one.bytes <= topology.generation.hbm]
    return sorted(fitting, key=lambda one: (one.seconds_per_token, one.bytes))


def _multiples(topology: Topology) -> list[int]:
    """Sizes of the data axis: the slices, times powers of two that divide a slice."""
    return [topology.slices * 2**n for n in range(topology.devices_per_slice.bit_length()) if
            topology.devices_per_slice % 2**n == 0]  # fmt: skip


def estimate(
    config: ModelConfig, row_tokens: int, topology: Topology, mesh: Mapping[str, int], remat: str, rows: int
) -> Candidate:
    """Time per token and bytes of a step on one device, in a few multiplications.

    Weights are gathered in bfloat16 for the forward, the backward and a recomputed pass, gradients scattered; a tensor
    axis sums two streams a layer each way. An fsdp axis that leaves less than 128 numbers of a dimension gathers by
    summing, at twice the price.
    """
    again, kept = REMAT[remat]
    tokens, stream = rows * row_tokens, 2.0 * config.embed_dim
    share = config.num_params / mesh["tensor"]
    compute = 2 * (3 + again) * config.num_active_params / mesh["tensor"] * tokens / topology.flops
    link = 2 * topology.generation.link / topology.generation.devices_per_chip
    passes = (3 + (again > 0)) * (2 if config.embed_dim / mesh["fsdp"] < 128 else 1)
    gather = passes * 2 * share * (1 - 1 / mesh["fsdp"]) / (link * topology.generation.dims)
    streams = (4 + 2 * (again > 0)) * config.num_layers * 2 * stream * tokens * (1 - 1 / mesh["tensor"]) / link
    replicas = mesh["data"]
    summed = 4 * config.num_params / (mesh["fsdp"] * mesh["tensor"]) * 2 * (1 - 1 / replicas)
    between = summed / (topology.dcn if topology.slices > 1 else link)
    seconds = max(compute, gather) + streams + between
    held = STATE_BYTES * config.num_params / (mesh["fsdp"] * mesh["tensor"])
    held += kept * stream * tokens * config.num_layers / mesh["tensor"] + 2 * config.num_params / config.num_layers
    parts = topology.devices // mesh["tensor"]
    return Candidate(mesh, remat, rows, seconds / (tokens * parts), held)


def search(
    found: Sequence[Candidate], compile: Callable[[Candidate], Mapping[str, Any]], now: Mapping[str, Any]
) -> list[str]:
    """Compile the best few and say, line by line, which won and why.

    Args:
        found: candidates, the best first.
        compile: plans the training step of one.
        now: the training step as the recipe has it.
    """
    tried = [(one, compile(one)) for one in found[:TRIES]]
    fitting = [(one, plan) for one, plan in tried if plan["fits"]]
    lines = [f"{one}: {_said(plan)}" for one, plan in tried]
    if not fitting:
        return [*lines, "none of these fits: take more chips"]
    best, plan = max(fitting, key=lambda pair: pair[1]["tokens_per_second"])
    before = now["tokens_per_second"] if now["fits"] else None
    gain = (
        f"{plan['tokens_per_second'] / before:.2f} times the recipe's tokens/s"
        if before
        else "the recipe's does not fit"
    )
    return [*lines, f"suggested: {best} ({gain}; bound by {plan['bound']})"]


def _said(plan: Mapping[str, Any]) -> str:
    needed = f"{plan['memory']['needed'] / GIB:.1f} GiB"
    if not plan["fits"]:
        return f"does not fit ({needed})"
    times = ", ".join(f"{name} {value:.2f} s" for name, value in plan["times"].items())
    return f"{plan['tokens_per_second']:,.0f} tokens/s, MFU {plan['mfu']:.0%}, {needed}; {times}"
