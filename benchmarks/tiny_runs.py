"""What the benchmarks of learning share: a start for the tiny model, scores on held-out tasks, seeds, intervals."""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
HELD_OUT = "held out"

Measured = Mapping[str, Mapping[str, float]]
"""Numbers by way of training and by name; all ways have the same names, the first of them `HELD_OUT`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Try a claim with several seeds and print a Markdown table."""

    out: Path
    """Where the runs are kept; what is there is not repeated, so that an interrupted try goes on."""
    seeds: int = 3
    """How many seeds, up to five."""
    json: bool = False
    """Print every number as JSON instead of the table."""


def split(source: Characters) -> tuple[Split, Split]:
    """The tasks to train on, and 30% to ask."""
    train, held_out = (Split(source=source, part=part, fraction=0.3) for part in ("train", "held_out"))
    return train, held_out


def demonstrated(
    tasks: Split, *, steps: int, seed: int, start: str = "tiny", learning_rate: float = 2e-3, batch_size: int = 24
) -> SFT:
    """A model that has seen some demonstrations; its skill is a matter of `steps`."""
    return SFT(
        start=start,
        data=Demonstrations(tasks=tasks),
        steps=steps,
        batch_size=batch_size,
        optimizer=AdamW(learning_rate=learning_rate, warmup_steps=10),
        compute=dataclasses.replace(COMPUTE, micro_rows=3),
        seed=seed,
    )


def accuracy(run: Training, name: str, model: str, tasks: Split, *, max_tokens: int) -> float:
    """The share of held-out tasks that a model does right when it takes the likeliest tokens."""
    greedy = Sampling(max_tokens=max_tokens, temperature=0.0)
    asked = Evaluate(model=model, tasks=(tasks,), sampling=greedy, limit=256, compute=COMPUTE)
    folder = run("eval-" + name.replace(" ", "-").replace(",", ""), asked)
    (score,) = evaluate.read(Path(folder)).values()
    return score.mean


T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for a 95% interval, by the number of runs."""


def interval(values: Sequence[float], *, percent: bool) -> str:
    """Mean of some runs with its 95% interval."""
    say = (lambda x: f"{x:.1%}") if percent else (lambda x: f"{x:.3g}")
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return say(mean)
    return f"{say(mean)} ± {say(T95[count] * statistics.stdev(values) / math.sqrt(count))}"


def seeds(one: Callable[[Training, int], Measured], settings: Settings, *, against: str) -> None:
    """Run an experiment with several seeds and print each seed's held-out score, means, and gains over `against`."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str((settings.out / ".compiled").resolve()))
    found = [one(Training(settings.out / f"seed-{seed}"), seed) for seed in range(settings.seeds)]
    if settings.json:
        print(json.dumps(found, indent=2))
        return
    further = [name for name in found[0][against] if name != HELD_OUT]
    heads = [*(f"seed {seed}" for seed in range(settings.seeds)), HELD_OUT, f"minus {against}, pairwise", *further]
    print(f"\n| | {' | '.join(heads)} |\n|---|" + "---|" * len(heads))
    for way in found[0]:
        own = [scores[way][HELD_OUT] for scores in found]
        gains = [scores[way][HELD_OUT] - scores[against][HELD_OUT] for scores in found]
        cells = [f"{x:.1%}" for x in own] + [interval(own, percent=True), interval(gains, percent=True)]
        cells += [interval([scores[way][name] for scores in found], percent=False) for name in further]
        print(f"| {way} | {' | '.join(cells)} |")
