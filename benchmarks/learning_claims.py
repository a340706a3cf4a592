"""Claims about learning, tried on the tiny model: each against its baseline, over seeds, with intervals.

    python benchmarks/learning_claims.py distill     # on-policy distillation in how many times fewer steps than RL
    python benchmarks/learning_claims.py mismatch    # a noisy sampler, with and without corrections
    python benchmarks/learning_claims.py average     # two SFT runs and the average of their weights

README.md has what each did. The tiny model learns to rearrange letters: a minute or two a seed on two cores.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from posttrain.data.characters import Characters
from posttrain.data.conversations import Demonstrations
from posttrain.data.tasks import Split
from posttrain.launch.recipe import Training
from posttrain.model.processing import Sampling
from posttrain.train import correction, evaluate, metrics, objective
from posttrain.train.compute import Compute
from posttrain.train.distill import Distill
from posttrain.train.evaluate import Evaluate
from posttrain.train.merge import Linear
from posttrain.train.optimizer import AdamW
from posttrain.train.rl import RL
from posttrain.train.sft import SFT
from posttrain.train.teaching import FullVocabulary

TASKS = Characters(operation="reverse")
TRAIN, HELD_OUT = (Split(source=TASKS, part=part, fraction=0.3) for part in ("train", "held_out"))
COMPUTE = Compute(row_tokens=208, micro_rows=2, slots=128, save_every=1000)
SAMPLING = Sampling(max_tokens=8)
SHARED: dict[str, Any] = {"tasks": TRAIN, "sampling": SAMPLING, "compute": COMPUTE}
LESSONS: dict[str, Any] = {
    "start": "tiny",
    "data": Demonstrations(tasks=TRAIN),
    "batch_size": 24,
    "compute": dataclasses.replace(COMPUTE, micro_rows=3),
}

Rows = dict[str, list[dict[str, float]]]
"""What was measured, per way of training and seed."""


@dataclass(frozen=True)
class Args:
    """Try one claim over several seeds."""

    claim: Annotated[Literal["distill", "mismatch", "average"], tyro.conf.Positional]
    """Which claim."""
    seeds: int = 3
    """How many seeds."""
    out: Path | None = None
    """Where the runs are kept, so that an interrupted try goes on; a temporary folder unless given."""
    json: bool = False
    """Print every number as JSON instead of a table."""


def started(run: Training, seed: int, steps: int = 85) -> str:
    """A model that has seen some demonstrations and solves part of the tasks."""
    adam = AdamW(learning_rate=2e-3, warmup_steps=10)
    return run("start", SFT(steps=steps, optimizer=adam, seed=seed, **LESSONS))


def score(run: Training, name: str, model: str) -> float:
    """Share of held-out tasks that greedy answers solve."""
    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    stage = Evaluate(model=model, tasks=(HELD_OUT,), sampling=greedy, limit=256, compute=COMPUTE)
    (found,) = evaluate.read(Path(run(f"eval-{name}", stage))).values()
    return found.mean


def rewards(folder: str) -> np.ndarray:
    """Mean reward of each step's answers, over a window of three steps."""
    found = [line["reward"] for line in metrics.read(Path(folder) / "metrics.jsonl")]
    return np.convolve(found, np.ones(3) / 3, mode="valid")


def first_at(values: np.ndarray, level: float) -> float:
    """Steps until the values reach a level; nan if they never do."""
    reached = np.flatnonzero(values >= level)
    return float(reached[0] + 1) if len(reached) else float("nan")


def distill(run: Training, seed: int) -> dict[str, dict[str, float]]:
    """RL makes a teacher; the same start is distilled from it. Steps until 95% of the gain in sampled reward."""
    start = started(run, seed)
    sizes = {"prompts": 16, "seed": seed, **SHARED}
    plan = objective.olmo(rounds=1)
    learner = RL(start=start, steps=120, group=8, objective=plan, optimizer=AdamW(learning_rate=4e-4), **sizes)
    teacher = run("rl", learner)
    earned = rewards(teacher)
    level = earned[0] + 0.95 * (np.mean(earned[-10:]) - earned[0])
    student = Distill(
        start=start, teachers={TASKS.domain: teacher}, steps=40, samples=8, objective=FullVocabulary(),
        optimizer=AdamW(learning_rate=8e-4), **sizes,
    )  # fmt: skip
    copied = run("distill", student)
    slow, fast = first_at(earned, level), first_at(rewards(copied), level)
    before = score(run, "start", start)
    return {
        "RL, the teacher": {"steps": slow, "before": before, "held out": score(run, "rl", teacher), "times fewer": 1.0},
        "on-policy distillation": {
            "steps": fast, "before": before, "held out": score(run, "distill", copied), "times fewer": slow / fast,
        },
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Noisy(RL):
    """RL whose sampler has other weights than the policy: each matrix off by `noise` of its own deviation."""

    noise: float

    def behavior(self, params: Any, step: int) -> Any:
        """The policy's weights with new noise at every step."""
        return _noisy(params, step, self.noise)


@partial(jax.jit, static_argnums=2)
def _noisy(params: Any, step: int, noise: float) -> Any:
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(step), len(leaves))
    moved = [x + noise * x.std() * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def mismatch(run: Training, seed: int) -> dict[str, dict[str, float]]:
    """RL with a noisy sampler under each correction; and with an exact one."""
    start = started(run, seed)
    plan = dataclasses.replace(objective.olmo(rounds=1), correction=correction.Uncorrected())
    ways: dict[str, tuple[float, Any]] = {
        "exact sampler": (0.0, plan.correction),
        "noisy, uncorrected": (0.25, plan.correction),
        "noisy, TIS at 2": (0.25, correction.Truncated()),
        "noisy, IcePop in [0.5, 2]": (0.25, correction.Masked()),
        "noisy, sequences at 2": (0.25, correction.TruncatedSequence()),
    }
    found, before = {}, score(run, "start", start)
    for name, (noise, way) in ways.items():
        stage = Noisy(
            start=start, noise=noise, steps=60, prompts=16, group=8, seed=seed,
            objective=dataclasses.replace(plan, correction=way), optimizer=AdamW(learning_rate=8e-4), **SHARED,
        )  # fmt: skip
        label = name.replace(" ", "-").replace(",", "")
        folder = run(label, stage)
        lines = metrics.read(Path(folder) / "metrics.jsonl")
        found[name] = {
            "before": before,
            "held out": score(run, label, folder),
            "mismatch": float(np.mean([line["mismatch"] for line in lines if "mismatch" in line])),
            "outside": float(np.mean([line["mismatch_outside"] for line in lines if "mismatch" in line])),
        }
    return found


def average(run: Training, seed: int) -> dict[str, dict[str, float]]:
    """SFT on the same data at a high and a low learning rate, and the mean of the two."""
    start = started(run, seed, steps=20)
    lessons = {**LESSONS, "start": start, "steps": 60, "seed": seed + 100}
    parents = {}
    for name, rate in (("high", 3e-3), ("low", 1e-3)):
        parents[name] = run(name, SFT(optimizer=AdamW(learning_rate=rate, warmup_steps=5), **lessons))
    parents["average"] = run("average", Linear(models=tuple(parents.values())))
    before = score(run, "start", start)
    return {name: {"before": before, "held out": score(run, name, path)} for name, path in parents.items()}


CLAIMS: dict[str, Callable[[Training, int], dict[str, dict[str, float]]]] = {
    "distill": distill,
    "mismatch": mismatch,
    "average": average,
}


def interval(values: Sequence[float]) -> str:
    """Mean and half of Student's 95% interval over seeds."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 2.571)
    half = t * np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.2f} ± {half:.2f}"


def show(claim: str, rows: Mapping[str, list[dict[str, float]]], seeds: int) -> None:
    """The table that people read."""
    table = Table(title=f"{claim}: mean over {seeds} seeds and half of Student's 95% interval")
    names = list(next(iter(rows.values()))[0])
    for heading in ("", *names, "held out, each seed"):
        table.add_column(heading, justify="left" if not heading else "right")
    for way, found in rows.items():
        each = " ".join(f"{one['held out']:.2f}" for one in found)
        table.add_row(way, *(interval([one[name] for one in found]) for name in names), each)
    Console(width=140).print(table)


def main(args: Args) -> None:
    """Run the seeds one after the other."""
    jax.config.update("jax_platforms", "cpu")
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(args.seeds):
            run = Training((args.out or Path(temporary)) / args.claim / str(seed))
            for way, found in CLAIMS[args.claim](run, seed).items():
                rows.setdefault(way, []).append(found)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        show(args.claim, rows, args.seeds)


if __name__ == "__main__":
    main(tyro.cli(Args))
