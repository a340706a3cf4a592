"""Plans a recipe: a `run` that compiles each stage's own programs for a TPU topology instead of training.

python -m posttrain.launch.plan REQUEST ANSWER     (JSON files; `posttrain plan` calls it with the right environment)
"""

import dataclasses
import importlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.progress

from ..model import config as configs
from ..sharding import topology as topologies
from ..sharding.topology import GIB, Topology
from ..train.programs import Program
from . import advice, compiled, cost, roofline, suggest
from .recipe import Stage


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to plan: a recipe with its options, a topology, a mesh (sizes by axis), fields of `Compute` to replace."""

    recipe: str
    options: Mapping[str, Any]
    topology: str
    slices: int = 1
    chips_per_host: tuple[int, ...] | None = None
    mesh: Mapping[str, int] = field(default_factory=dict)
    compute: Mapping[str, Any] = field(default_factory=dict)
    cache: str = ".compiled"
    suggest: bool = False


class Planning:
    """The `run` that plans: it notes every stage and hands on a model folder that holds only the model's shape."""

    def __init__(self, folder: Path, compute: Mapping[str, Any]) -> None:
        self.folder, self.compute = folder, compute
        self.stages: list[tuple[str, Stage]] = []

    def __call__(self, name: str, stage: Stage) -> str:
        """Note the stage; its programs are compiled when the recipe has ended."""
        stage = configured(stage, self.compute)
        self.stages.append((name, stage))
        folder, config = self.folder / name, stage.result()
        (folder / "model").mkdir(parents=True)
        if config is not None:
            (folder / "model" / "model.json").write_text(configs.to_json(config))
        return str(folder)


def configured(stage: Any, changes: Mapping[str, Any]) -> Any:
    """The stage as it computes on TPUs: bfloat16 unless it says otherwise, and with these settings of `Compute`."""
    if "compute" not in {one.name for one in dataclasses.fields(stage)}:
        return stage
    dtype = stage.compute.dtype or "bfloat16"
    return dataclasses.replace(stage, compute=dataclasses.replace(stage.compute, **{"dtype": dtype, **changes}))


def plan(request: Request) -> dict[str, Any]:
    """Compile every program of a recipe; what plan.json holds (see `summary`).

    Raises:
        ValueError, OSError: one sentence on what is wrong with the request.
    """
    compiled.check_compiler()
    topology = topologies.parse(request.topology, slices=request.slices)
    mesh = compiled.make_mesh(topology, request.mesh, request.chips_per_host)
    with tempfile.TemporaryDirectory() as folder:
        run = Planning(Path(folder), request.compute)
        importlib.import_module(f".recipes.{request.recipe}", __package__).recipe(run, **request.options)
        stages = [(name, stage, stage.programs(mesh)) for name, stage in run.stages]
        with jax.set_mesh(mesh):
            planned = _each(stages, lambda one: program(one, topology, mesh, Path(request.cache)))
        found = summary(request, topology, mesh, planned)
        if request.suggest:
            found["suggestion"] = suggestion(request, topology, run.stages, found)
    return found


def suggestion(
    request: Request, topology: Topology, stages: Sequence[tuple[str, Stage]], found: Mapping[str, Any]
) -> list[str]:
    """Better settings for the stage that trains longest, as `suggest.search` says them.

    Raises:
        ValueError: for a recipe that trains nothing, or a model that no mesh of these chips holds.
    """
    training = [i for i, one in enumerate(found["stages"]) if "gradients" in one["programs"]]
    if not training:
        raise ValueError(f"the recipe {request.recipe!r} trains nothing: there is no step to suggest settings for")
    longest = max(training, key=lambda i: found["stages"][i]["programs"]["gradients"]["flops"])
    (name, stage), config = stages[longest], stages[longest][1].result()
    assert config is not None
    settings: Any = stage
    ranked = suggest.candidates(config, settings.compute.row_tokens, topology)
    if not ranked:
        raise ValueError(
            f"no mesh of {topology} holds the {config.num_params / 1e9:.1f}B parameters of {name} and their optimizer "
            f"({suggest.STATE_BYTES * config.num_params / 1e9:,.0f} GB): take more chips"
        )

    def step(one: suggest.Candidate) -> dict[str, Any]:
        mesh = compiled.make_mesh(topology, one.mesh, request.chips_per_host)
        changed = configured(stage, {**request.compute, "remat": one.remat, "micro_rows": one.micro_rows})
        gradients = changed.programs(mesh)["gradients"]
        with jax.set_mesh(mesh):
            return program(gradients, topology, mesh, Path(request.cache))

    return [f"{name}, gradients:", *suggest.search(ranked, step, found["stages"][longest]["programs"]["gradients"])]


def _each(stages: Sequence[tuple[str, Stage, Mapping[str, Program]]], work: Callable[[Program], Any]) -> list[Any]:
    """Plan the programs of all stages, with a progress bar on stderr."""
    columns = (
        "[progress.description]{task.description}",
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
    )
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, rich.progress.TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=sum(len(programs) for _, _, programs in stages))
        found = []
        for name, stage, programs in stages:
            rows = {}
            for key, one in programs.items():
                bar.update(task, description=f"{name}: {key}")
                rows[key] = work(one)
                bar.advance(task)
            found.append((name, type(stage).__name__, rows))
    return found


def program(one: Program, topology: Topology, mesh: jax.sharding.Mesh, cache: Path) -> dict[str, Any]:
    """What one program takes: memory, work, the roofline's times, what is wrong with it."""
    traced = one.trace()
    found = compiled.analyse(traced, trips=one.trips, topology=topology, cache=cache)
    flops = cost.matmul_flops(traced.jaxpr, trips=one.trips)
    model_flops = flops
    if one.forward is not None:
        model_flops = 3 * cost.matmul_flops(jax.make_jaxpr(one.forward)(*one.arguments[1:]))
    coords = [(*device.coords,) for device in mesh.devices.flat]
    work = roofline.work(flops, found.accessed, found.collectives, topology, coords)
    times = roofline.roofline(work, topology)
    seconds = times.seconds if found.fits else math.nan
    resident = cost.array_bytes(one.resident)
    return {
        "calls": one.calls,
        "tokens": one.tokens,
        "fits": found.fits and found.needed + resident <= topology.generation.hbm,
        "memory": {
            "needed": found.needed + resident,
            "arguments": found.arguments,
            "temporaries": found.temporaries,
            "resident": resident,
            "available": topology.generation.hbm,
        },
        "flops": work.flops,
        "model_flops": model_flops / topology.devices,
        "bytes": found.accessed,
        "collectives": _collectives(found.collectives, topology, coords),
        "times": times._asdict(),
        "bound": times.bound if found.fits else "memory",
        "seconds": _number(seconds),
        "mfu": _number(model_flops / topology.devices / topology.flops / seconds if model_flops else math.nan),
        "tokens_per_second": _number(one.tokens / seconds),
        "warnings": advice.warnings(one, found, topology, mesh),
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _collectives(found: Sequence[Any], topology: Topology, coords: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
    """Transfers of a call by kind, network and whether they are hidden: number, bytes given by a device, seconds."""
    rows: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for one in found:
        network = "DCN" if one.across_slices else "ICI"
        row = rows.setdefault(
            (one.kind, network, one.hidden),
            {"kind": one.kind, "network": network, "hidden": one.hidden, "times": 0.0, "bytes": 0.0, "seconds": 0.0},
        )
        row["times"] += one.times
        row["bytes"] += one.times * one.bytes
        row["seconds"] += roofline.seconds(one, topology, coords)
    return sorted(rows.values(), key=lambda row: -row["seconds"])


def summary(
    request: Request, topology: Topology, mesh: jax.sharding.Mesh, planned: Sequence[tuple[str, str, dict[str, Any]]]
) -> dict[str, Any]:
    """Stages with their programs and chip-hours, and the recipe's sum; None where something does not fit."""
    stages = []
    for name, kind, programs in planned:
        parts = [one["calls"] * one["seconds"] if one["seconds"] is not None else math.nan for one in programs.values()]
        hours = math.fsum(parts) / 3600
        stages.append({
            "name": name, "kind": kind, "programs": programs, "hours": _number(hours),
            "chip_hours": _number(hours * topology.chips), "fits": all(one["fits"] for one in programs.values()),
        })  # fmt: skip
    total = math.fsum(stage["hours"] if stage["hours"] is not None else math.nan for stage in stages)
    return {
        "recipe": request.recipe,
        "options": dict(request.options),
        "topology": str(topology),
        "chips": topology.chips,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "compute": dict(request.compute),
        "hbm_gib": topology.generation.hbm / GIB,
        "stages": stages,
        "fits": all(stage["fits"] for stage in stages),
        "hours": _number(total),
        "chip_hours": _number(total * topology.chips),
    }


def main() -> None:
    """Plan what the request file says and write the answer file; a wrong request is one sentence and exit code 2."""
    request, answer = (Path(word) for word in sys.argv[1:])
    fields = json.loads(request.read_text())
    bounds = fields.pop("chips_per_host")
    try:
        found = plan(Request(**fields, chips_per_host=tuple(bounds) if bounds else None))
    except (ValueError, OSError, ImportError) as error:
        print(f"posttrain: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    answer.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
