"""`posttrain run`: train a recipe stage by stage, then compare what it made."""

import contextlib
import importlib
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import rich.console
import tyro

from ...sharding import hosts
from ...train import bucket, profile, stop, trackers, watchdog
from .. import cluster, comparison, funnels, lock, machine, report
from .. import flags as presets
from ..comparison import Comparison
from ..recipe import Training

WIDTH = 160  # of tables that go into a file or a pipe


def command(name: str) -> Callable[..., None]:
    """A function that runs a recipe; its parameters are the recipe's own, `out` and `smoke`."""
    module = importlib.import_module(f"..recipes.{name}", __package__)

    def go(
        *,
        out: Annotated[
            str,
            tyro.conf.arg(
                help="The run folder, or gs://BUCKET/PATH. Run the same command again to go on where a run was stopped."
            ),
        ],
        smoke: Annotated[
            bool, tyro.conf.arg(help="Shrink every stage to a few steps and items, to see it run from end to end.")
        ] = False,
        profile: Annotated[
            str,
            tyro.conf.arg(metavar="A:B", help="Trace these steps of every training stage, for xprof."),
        ] = "",
        grace: Annotated[
            float, tyro.conf.arg(help="Seconds that SIGTERM leaves to reach a place where everything can be saved.")
        ] = 25.0,
        stuck_after: Annotated[
            float, tyro.conf.arg(help="Leave, with all stacks written down, when nothing moves for this many seconds.")
        ] = 600.0,
        only: tyro.conf.UseAppendAction[
            Annotated[
                tuple[str, ...],
                tyro.conf.arg(
                    metavar="STAGE", help="Run this stage alone; what it needs is there. Repeat it for more."
                ),
            ]
        ] = (),
        flags: Annotated[
            str, tyro.conf.arg(metavar="PRESET", help="Flags of the TPU compiler, a preset of launch/flags.py by name.")
        ] = "",
        tensorboard: Annotated[
            bool, tyro.conf.arg(help="Write TensorBoard event files beside metrics.jsonl, in STAGE/tensorboard.")
        ] = False,
        wandb: Annotated[
            str, tyro.conf.arg(metavar="PROJECT", help="Log to this project of Weights & Biases too, a run per stage.")
        ] = "",
        **options: Any,
    ) -> None:
        trackers.request(trackers.Wanted(tensorboard, wandb))
        if flags:
            presets.use(flags)
        watch = Watch(profile=steps(profile), grace=grace, stuck_after=stuck_after)
        train(module.recipe, out, smoke=smoke, options=options, watch=watch, only=only)

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


class Watch(NamedTuple):
    """Beside the recipe: steps to trace, seconds that SIGTERM leaves, seconds that nothing may move."""

    profile: range = range(0)
    grace: float = 25.0
    stuck_after: float = 600.0


def steps(text: str) -> range:
    """The steps that such as '10:12' stands for, both included; none for nothing.

    Raises:
        ValueError: for anything else.
    """
    first, _, last = text.partition(":")
    if not text:
        return range(0)
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"--profile {text!r}: give the first and the last step to trace, such as 10:12")
    return range(int(first), int(last) + 1)


def train(
    recipe: Callable[..., Any],
    where: str | Path,
    *,
    smoke: bool,
    options: dict[str, Any],
    watch: Watch,
    only: Sequence[str] = (),
) -> None:
    """Run the recipe to its end, write the report, print the comparison. SIGINT and SIGTERM stop it with all saved.

    On several hosts all of them run this; the first writes the report. With `only`, these stages alone are trained, and
    there is no report: other processes may train others in the same folder.

    Raises:
        ValueError: for a stage to train that the recipe does not have.
    """
    started = time.time() - time.process_time()
    profile.request(watch.profile)
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.listening(watch.grace))
        stack.enter_context(cluster.joined())
        out = stack.enter_context(bucket.working_copy(where))
        if hosts.is_first():
            for folder in [out / name for name in only] or [out]:
                stack.enter_context(lock.held(folder))
        stack.enter_context(watchdog.watching(out / "stacks", seconds=watch.stuck_after))
        _remember_compilations(out)
        run = Training(out, smoke=smoke, started=started, only=only)
        try:
            found = recipe(run, **options)
        finally:
            if hosts.is_first():
                machine.record(out)
        missing = sorted(set(only) - set(run.names))
        if missing:
            raise ValueError(f"--only {missing[0]!r}: the recipe has no such stage, but {', '.join(run.names)}")
        if hosts.is_first() and not only:
            if isinstance(found, Comparison):
                comparison.write(found, out)
            show(out)


def _remember_compilations(out: Path) -> None:
    """Keep compiled programs in the run folder: stages of equal shapes, and runs that go on, compile them once."""
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(bucket.place(out / ".compiled")))
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
