"""A plan for people: the table in the terminal, and the page plan.html."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import rich.box
import rich.console
from rich.table import Table

from ..sharding.topology import GIB

COLUMNS = ("stage", "program", "calls", "HBM GiB", "TFLOP", "GB moved", "ICI GB", "DCN GB", "compute", "HBM", "ICI",
           "DCN", "step", "bound", "MFU", "tokens/s", "chip-hours")  # fmt: skip


def rows(plan: Mapping[str, Any]) -> Iterator[list[str]]:
    """Cells of every program; stages whose programs and numbers are the same share a row."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for stage in plan["stages"]:
        groups.setdefault(repr(stage["programs"]), []).append(stage)
    for stages in groups.values():
        named = stages[0]["name"] + (f" (x {len(stages)})" if len(stages) > 1 else "")
        if not stages[0]["programs"]:
            continue
        for index, (name, one) in enumerate(stages[0]["programs"].items()):
            yield _cells(named if index == 0 else "", name, one, len(stages) * plan["chips"])


def _cells(stage: str, name: str, one: Mapping[str, Any], chips: int) -> list[str]:
    needed = f"{one['memory']['needed'] / GIB:.1f}" + ("" if one["fits"] else " does not fit")
    sent = {n: sum(c["bytes"] for c in one["collectives"] if c["network"] == n) / 1e9 for n in ("ICI", "DCN")}
    times = one["times"]
    if one["seconds"] is None:
        return [stage, name, f"{one['calls']:,.0f}", needed, f"{one['flops'] / 1e12:.1f}", *[""] * 12]
    shown = {key: seconds(times[key]) for key in ("compute", "hbm", "ici", "dcn")}
    return [
        stage, name, f"{one['calls']:,.0f}", needed, f"{one['flops'] / 1e12:.1f}", f"{one['bytes'] / 1e9:.1f}",
        f"{sent['ICI']:.2f}", f"{sent['DCN']:.2f}", *shown.values(), seconds(one["seconds"]), one["bound"],
        "" if one["mfu"] is None else f"{one['mfu']:.0%}",
        "" if not one["tokens"] else f"{one['tokens_per_second']:,.0f}",
        f"{one['calls'] * one['seconds'] / 3600 * chips:.2f}",
    ]  # fmt: skip


def seconds(value: float) -> str:
    """Such as 12 ms, 1.4 s, 95 s."""
    if value < 1e-4:
        return "0" if value == 0 else "<0.1 ms"
    if value < 1:
        return f"{value * 1e3:.1f} ms" if value < 0.01 else f"{value * 1e3:.0f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def title(plan: Mapping[str, Any]) -> str:
    """What was planned for which chips."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items()) or "one device"
    options = " ".join(f"--{key} {value}" for key, value in plan["options"].items() if value is not None)
    return f"{plan['recipe']} {options} on {plan['topology']} ({plan['chips']:,} chips; {mesh})"


def verdict(plan: Mapping[str, Any]) -> str:
    """The sum in one sentence."""
    if not plan["fits"]:
        names = ", ".join(stage["name"] for stage in plan["stages"] if not stage["fits"])
        return f"does not fit: {names} (a device has {plan['hbm_gib']:.1f} GiB)"
    return (
        f"fits; at least {plan['hours']:.2f} hours, {plan['chip_hours']:.1f} chip-hours, if every chip is at its peak"
    )


def notes(plan: Mapping[str, Any]) -> list[str]:
    """The warnings, each once, with where it was found first."""
    found: dict[str, str] = {}
    for stage in plan["stages"]:
        for name, one in stage["programs"].items():
            for warning in one["warnings"]:
                found.setdefault(warning, f"{stage['name']}, {name}")
    return [f"{where}: {warning}" for warning, where in found.items()]


def show(console: rich.console.Console, plan: Mapping[str, Any]) -> None:
    """Print table, verdict, warnings and suggestion."""
    table = Table(title=title(plan), title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for cells in rows(plan):
        table.add_row(*cells)
    console.print(table)
    console.print(verdict(plan))
    for note in notes(plan):
        console.print(f"- {note}", style="dim")
    for line in plan.get("suggestion", []):
        console.print(line, highlight=False)


def page(plan: Mapping[str, Any]) -> str:
    """The self-contained HTML page of a plan."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"time": seconds}
    return environment.get_template("plan.html").render(
        plan=plan, title=title(plan), verdict=verdict(plan), columns=COLUMNS, rows=list(rows(plan)), notes=notes(plan)
    )
