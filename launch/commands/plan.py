"""`posttrain plan`: compile a recipe for a TPU topology, in a process of its own, and show what it takes."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import rich.console
import tyro

from ...sharding import rules, topology
from .. import compiled, plan_page
from ..plan import Request
from .run import with_options

WIDTH = 220  # of the table in a file or a pipe: no cell is cut


def command(name: str) -> Callable[..., None]:
    """A function that plans a recipe; its parameters are the recipe's own and those of a plan."""
    module = importlib.import_module(f"..recipes.{name}", __package__)

    def go(
        *,
        topology: Annotated[str, tyro.conf.arg(help="Such as v5p:4x4x4, v6e:8x8, v5litepod-64 or v5p-128 (64 chips).")],
        slices: Annotated[int, tyro.conf.arg(help="Slices of that shape, joined by the data-centre network.")] = 1,
        mesh: Annotated[
            str, tyro.conf.arg(help="Such as fsdp=16,tensor=4; data over the slices, fsdp over the rest unless given.")
        ] = "",
        chips_per_host: Annotated[str, tyro.conf.arg(help="Such as 2x2; what the generation has unless given.")] = "",
        remat: Annotated[Literal["none", "dots", "full"] | None, tyro.conf.arg(help="Instead of the recipe's.")] = None,
        micro_rows: Annotated[int | None, tyro.conf.arg(help="Instead of the recipe's.")] = None,
        row_tokens: Annotated[int | None, tyro.conf.arg(help="Instead of the recipe's.")] = None,
        slots: Annotated[int | None, tyro.conf.arg(help="Instead of the recipe's.")] = None,
        suggest: Annotated[
            bool, tyro.conf.arg(help="Search mesh, remat and micro_rows for the fastest that fits.")
        ] = False,
        out: Annotated[Path, tyro.conf.arg(help="Folder for plan.json, plan.html and what was compiled.")] = Path(
            "plan"
        ),
        **options: Any,
    ) -> None:
        compute = {"remat": remat, "micro_rows": micro_rows, "row_tokens": row_tokens, "slots": slots}
        request = Request(
            recipe=name,
            options=options,
            topology=topology,
            slices=slices,
            mesh=axes(mesh),
            chips_per_host=bounds(chips_per_host),
            compute={key: value for key, value in compute.items() if value is not None},
            suggest=suggest,
            cache=str((out / ".compiled").resolve()),
        )
        main(request, out)

    return with_options(go, module.recipe)


def axes(text: str) -> dict[str, int]:
    """Sizes by mesh axis of such as 'fsdp=16,tensor=4'.

    Raises:
        ValueError: for an axis that does not exist, or a size that is no number.
    """
    found: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in rules.MESH_AXES or not size.isdecimal() or not int(size):
            raise ValueError(f"--mesh {text!r}: give AXIS=SIZE,... with axes of {', '.join(rules.MESH_AXES)}")
        found[axis] = int(size)
    return found


def bounds(text: str) -> tuple[int, ...] | None:
    """Numbers of such as '2x2'; None of nothing."""
    if not text:
        return None
    if not all(part.isdecimal() and int(part) for part in text.split("x")) or text.count("x") > 2:
        raise ValueError(f"--chips-per-host {text!r}: give a shape such as 2x2")
    return tuple(map(int, text.split("x")))


def main(request: Request, out: Path) -> None:
    """Plan, write plan.json and plan.html into `out`, print the table.

    Raises:
        ValueError, ImportError: one sentence on what is wrong with the request.
    """
    topology.parse(request.topology, slices=request.slices)
    compiled.check_compiler()
    found = answer(request)
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(found, indent=2) + "\n")
    (out / "plan.html").write_text(plan_page.page(found), encoding="utf-8")
    console = rich.console.Console(markup=False)
    if not sys.stdout.isatty():
        console.width = WIDTH
    plan_page.show(console, found)
    console.print(f"plan: {out / 'plan.html'}", soft_wrap=True, highlight=False)


def answer(request: Request) -> dict[str, Any]:
    """What a process with the TPU compiler's environment makes of the request."""
    with tempfile.TemporaryDirectory() as folder:
        question, reply = Path(folder) / "request.json", Path(folder) / "answer.json"
        question.write_text(json.dumps(_plain(dataclasses.asdict(request))))
        words = [sys.executable, "-P", "-m", "posttrain.launch.plan", str(question), str(reply)]
        path = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(words, env=compiled.environment({**os.environ, "PYTHONPATH": path}), check=False)
        if done.returncode == 2:  # it has said why
            sys.exit(2)
        if done.returncode:
            raise RuntimeError(f"the planning process ended with code {done.returncode}: its messages are above")
        return json.loads(reply.read_text())


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in fields.items()}
