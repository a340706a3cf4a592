"""What the benchmarks of learning share: a start for the tiny model, scores on held-out tasks, seeds, intervals."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from posttrain.data.characters import Characters
from posttrain.data.conversations import Demonstrations
from posttrain.data.tasks import Split
from posttrain.launch.recipe import Training
from posttrain.model.processing import Sampling
from posttrain.train import evaluate
from posttrain.train.compute import Compute
from posttrain.train.evaluate import Evaluate
from posttrain.train.optimizer import AdamW
from posttrain.train.sft import SFT

COMPUTE = Compute(row_tokens=208, micro_rows=2, slots=128, save_every=1000)


def split(source: Characters) -> tuple[Split, Split]:
    """The tasks to train on, and 30% to ask."""
    train, held_out = (Split(source=source, part=part, fraction=0.3) for part in ("train", "held_out"))
    return train, held_out


def demonstrated(tasks: Split, *, steps: int, seed: int, start: str = "tiny") -> SFT:
    """A model that has seen some demonstrations; its skill is a matter of `steps`."""
    return SFT(
        start=start,
        data=Demonstrations(tasks=tasks),
        steps=steps,
        batch_size=24,
        optimizer=AdamW(learning_rate=2e-3, warmup_steps=10),
        compute=dataclasses.replace(COMPUTE, micro_rows=3),
        seed=seed,
    )


def accuracy(run: Training, name: str, model: str, tasks: Split, *, max_tokens: int) -> float:
    """The share of held-out tasks that a model does right when it takes the likeliest tokens."""
    greedy = Sampling(max_tokens=max_tokens, temperature=0.0)
    asked = Evaluate(model=model, tasks=(tasks,), sampling=greedy, limit=256, compute=COMPUTE)
    (score,) = evaluate.read(Path(run(f"eval-{name}", asked))).values()
    return score.mean


T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for a 95% interval, by the number of runs."""


def interval(values: Sequence[float]) -> str:
    """Mean of some runs with its 95% interval."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return f"{mean:.1%}"
    half = T95[count] * statistics.stdev(values) / math.sqrt(count)
    return f"{mean:.1%} ± {half:.1%}"


def seeds(one: Callable[[Training, int], Mapping[str, float]], out: Path, count: int, *, against: str) -> None:
    """Run an experiment with several seeds and print a Markdown table: each seed, the mean, the gain over `against`."""
    jax.config.update("jax_compilation_cache_dir", str((out / ".compiled").resolve()))
    found = [one(Training(out / f"seed-{seed}"), seed) for seed in range(count)]
    print(f"\n| model | {' | '.join(f'seed {seed}' for seed in range(count))} | mean | minus {against}, pairwise |")
    print("|---|" + "---|" * (count + 2))
    for name in found[0]:
        own = [scores[name] for scores in found]
        gains = [scores[name] - scores[against] for scores in found]
        print(f"| {name} | {' | '.join(f'{x:.1%}' for x in own)} | {interval(own)} | {interval(gains)} |")
