"""`posttrain run`: train a recipe stage by stage, then compare what it made."""

import importlib
import inspect
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import rich.console
import tyro

from ...train import loop
from .. import comparison, funnels, lock, machine, report
from ..comparison import Comparison
from ..recipe import Training

WIDTH = 160  # of tables that go into a file or a pipe


def command(name: str) -> Callable[..., None]:
    """A function that runs a recipe; its parameters are the recipe's own, `out` and `smoke`."""
    module = importlib.import_module(f"..recipes.{name}", __package__)

    def go(
        *,
        out: Annotated[
            Path, tyro.conf.arg(help="The run folder. Run the same command again to go on where a run was stopped.")
        ],
        smoke: Annotated[
            bool, tyro.conf.arg(help="Shrink every stage to a few steps and items, to see it run from end to end.")
        ] = False,
        **options: Any,
    ) -> None:
        train(module.recipe, out, smoke=smoke, options=options)

    return with_options(go, module.recipe)


def with_options(go: Callable[..., None], recipe: Callable[..., Any]) -> Callable[..., None]:
    """`go(*, ..., **options)` as a command whose `options` are the recipe's own; one of both names is the recipe's."""
    theirs = list(inspect.signature(recipe).parameters.values())[1:]
    named = {one.name for one in theirs}
    mine = [one for one in inspect.signature(go).parameters.values() if one.kind != inspect.Parameter.VAR_KEYWORD]
    parameters = [*(one for one in mine if one.name not in named), *theirs]
    described: Any = go
    described.__signature__ = inspect.Signature(parameters)
    described.__annotations__ = {one.name: one.annotation for one in parameters}
    described.__doc__ = inspect.getdoc(recipe)
    return go


def train(recipe: Callable[..., Any], out: Path, *, smoke: bool, options: dict[str, Any]) -> None:
    """Run the recipe to its end, write the report, print the comparison. SIGINT and SIGTERM stop it with all saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, loop.request_stop)
    with lock.held(out):
        _remember_compilations(out)
        try:
            found = recipe(Training(out, smoke=smoke), **options)
        finally:
            machine.record(out)
        if isinstance(found, Comparison):
            comparison.write(found, out)
        show(out)


def _remember_compilations(out: Path) -> None:
    """Keep compiled programs in the run folder: stages of equal shapes, and runs that go on, compile them once."""
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str((out / ".compiled").resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def show(out: Path) -> None:
    """Write the report of a run folder and print its table."""
    summary = report.write(out, report.stored_comparison(out))
    console = rich.console.Console(markup=False)
    if not sys.stdout.isatty():
        console.width = WIDTH
    if summary["rows"]:
        console.print(report.table(summary))
    for one in funnels.read(out, list(summary["funnels"])):
        console.print(report.funnel_table(one))
    for note in summary["notes"]:
        console.print(note, style="dim")
    busiest = sorted(summary["shares"].items(), key=lambda item: -item[1])
    shares = ", ".join(f"{phase} {share:.0%}" for phase, share in busiest if share >= 0.005)
    console.print(f"{report.duration(sum(summary['seconds'].values()))} of wall time: {shares}")
    console.print(f"report: {out / 'report.html'}", soft_wrap=True, highlight=False)
