"""`posttrain eval`: score any model on task sources."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import rich.box
import rich.console
from rich.table import Table

from ...data.arithmetic import Arithmetic
from ...data.characters import Characters
from ...data.instruction_tasks import ALL_KINDS, Instructions
from ...data.jsonl_tasks import JsonlTasks
from ...data.task import TaskSource
from ...data.tasks import Split
from ...data.verify.choice import Choice
from ...data.verify.maths import FinalNumber
from ...data.verify.text import ExactText
from ...model.processing import Sampling
from ...train import evaluate
from ...train.compute import Compute
from .. import lock, report

Verifier = Literal["number", "text", "choice"]
VERIFIERS = {"number": FinalNumber, "text": ExactText, "choice": Choice}


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
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            stage.train(Path(folder) / "eval")
            scores = evaluate.read(Path(folder) / "eval")
    else:
        with lock.held(out):
            stage.train(out)
            scores = evaluate.read(out)
    rich.console.Console(markup=False).print(table(model, scores))


def source(spec: str, *, verifier: Verifier = "number") -> TaskSource:
    """The tasks that a word on the command line stands for.

    Raises:
        ValueError, FileNotFoundError: with what may be given instead.
    """
    name, _, rest = spec.partition(":")
    if spec.endswith(".jsonl"):
        found = JsonlTasks(path=spec, verifier=VERIFIERS[verifier](), name=Path(spec).stem)
        len(found)  # reads the file: what is wrong with it is said before a model is loaded
        return found
    if name == "arithmetic" and (not rest or rest.isdecimal()):
        return Arithmetic(digits=int(rest or 1))
    if name == "instructions":
        return Instructions(kinds=(rest,) if rest else ALL_KINDS)
    if name == "characters" and rest:
        return Characters(operation=rest)  # pyright: ignore[reportArgumentType]  # checked by Characters
    if name == "reasoning-gym" and rest:
        from ...data.reasoning_gym import ReasoningGym  # an optional dependency

        return ReasoningGym(name=rest, size=1000)
    raise ValueError(
        f"no tasks {spec!r}: give FILE.jsonl, arithmetic, arithmetic:DIGITS, instructions, instructions:KIND, "
        "characters:OPERATION or reasoning-gym:NAME"
    )


def table(model: str, scores: Mapping[str, evaluate.Score]) -> Table:
    """The scores for the terminal: a row per domain."""
    made = Table(title=model, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("tasks", no_wrap=True)
    made.add_column("score [95% interval]", justify="right", no_wrap=True)
    made.add_column("n", justify="right")
    for domain, score in scores.items():
        made.add_row(domain, report.score_text(score._asdict()), str(score.n))
    return made
