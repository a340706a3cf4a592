"""`posttrain eval`: score any model on task sources."""

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import rich.box
import rich.console
from rich.table import Table

from ...data.task import TaskSource
from ...data.tasks import Split
from ...model.processing import Sampling
from ...sharding import hosts
from ...train import evaluate
from ...train.compute import Compute
from .. import cluster, lock, report
from ..tasks import Verifier, source


def main(
    model: str, specs: Sequence[str], out: Path | None, *, held_out: float | None, verifier: Verifier, limit: int,
    sampling: Sampling, seed: int,
) -> None:  # fmt: skip
    """Evaluate, print the scores, and keep them and the answers in `out` if it is given."""
    if not specs:
        raise ValueError("no tasks to evaluate on: give --tasks, such as --tasks arithmetic or --tasks questions.jsonl")
    sources: tuple[TaskSource, ...] = tuple(source(spec, verifier=verifier) for spec in specs)
    names = [one.domain for one in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"the tasks {list(specs)} are of the domains {names}: give each domain once, or eval twice")
    if held_out is not None:
        sources = tuple(Split(source=one, part="held_out", fraction=held_out) for one in sources)
    stage = evaluate.Evaluate(
        model=model, tasks=sources, sampling=sampling, limit=limit, compute=Compute(slots=min(64, limit)), seed=seed
    )
    with cluster.joined(), contextlib.ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "eval"
        if out is not None and hosts.is_first():
            stack.enter_context(lock.held(out))
        stage.train(folder)
        if hosts.is_first():
            rich.console.Console(markup=False).print(table(model, evaluate.read(folder)))


def table(model: str, scores: Mapping[str, evaluate.Score]) -> Table:
    """The scores for the terminal: a row per domain."""
    made = Table(title=model, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("tasks", no_wrap=True)
    made.add_column("score [95% interval]", justify="right", no_wrap=True)
    made.add_column("n", justify="right")
    for domain, score in scores.items():
        made.add_row(domain, report.score_text(score._asdict()), str(score.n))
    return made
