"""What the benchmarks of learning share: a start for the tiny model, scores on held-out tasks, seeds, intervals."""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from posttrain.data.characters import Characters
from posttrain.data.conversations import Demonstrations
from posttrain.data.task import TaskSource
from posttrain.data.tasks import Mixture, Split, parts
from posttrain.launch.recipe import Training
from posttrain.model.processing import Sampling
from posttrain.train import evaluate
from posttrain.train.compute import Compute
from posttrain.train.evaluate import Evaluate
from posttrain.train.optimizer import AdamW
from posttrain.train.sft import SFT

COMPUTE = Compute(row_tokens=208, micro_rows=2, slots=128, save_every=1000)
HELD_OUT = "held out"
PRETRAINED = 200  # steps
OTHERS = tuple(Characters(operation=name) for name in ("copy", "rotate", "double", "sort"))

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


def split(source: Characters, fraction: float = 0.3) -> tuple[Split, Split]:
    """The tasks to train on, and a fraction of them to ask."""
    (train,), (held_out,) = parts(source, held_out=fraction)
    return train, held_out


def demonstrated(tasks: TaskSource, *, start: str, steps: int, seed: int, optimizer: AdamW | None = None) -> SFT:
    """A model that has seen some demonstrations; its skill is a matter of `steps`."""
    return SFT(
        start=start,
        data=Demonstrations(tasks=tasks),
        steps=steps,
        batch_size=24,
        optimizer=optimizer or AdamW(learning_rate=1e-3, warmup_steps=5),
        compute=dataclasses.replace(COMPUTE, micro_rows=3),
        seed=seed,
    )


def pretrained(run: Training, seed: int) -> str:
    """A model that does other things with letters, and so learns a new one as a pretrained one does: gradually."""
    sources = tuple(split(other)[0] for other in OTHERS)
    others = Mixture(sources=sources, weights=(1.0,) * len(sources), size=4096)
    adam = AdamW(learning_rate=2e-3, warmup_steps=10)
    return run("pretrained", demonstrated(others, start="tiny", steps=PRETRAINED, seed=seed, optimizer=adam))


def accuracy(
    run: Training, name: str, model: str, tasks: Split, *, max_tokens: int = 8, temperature: float = 0.0
) -> float:
    """The share of held-out tasks that a model does right: the likeliest answers, or four that are drawn."""
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    times = 4 if temperature else 1
    asked = Evaluate(model=model, tasks=(tasks,) * times, sampling=sampling, limit=256, compute=COMPUTE)
    folder = run(f"eval-{temperature:g}-{slug(name)}", asked)
    (score,) = evaluate.read(Path(folder)).values()
    return score.mean


def slug(name: str) -> str:
    """A way of training as the name of a stage."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)


def taught(run: Training, start: str, tasks: tuple[Split, Split], *, levels: Mapping[str, float], seed: int) -> dict:
    """Models by name that do ever more of the tasks: two steps of demonstrations at a time until a level is reached.

    A level is the share of drawn answers to the held-out tasks, the second of `tasks`, that are right.
    """
    found: dict[str, str] = {}
    model, now, turn = start, 0.0, 0
    for name, level in levels.items():
        while now < level and turn < 120:
            turn += 1
            model = run(f"lesson-{turn}", demonstrated(tasks[0], start=model, steps=2, seed=100 * seed + turn))
            now = accuracy(run, f"lesson-{turn}", model, tasks[1], temperature=1.0)
        found[name] = model
    return found


T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for a 95% interval, by the number of runs."""


def interval(values: Sequence[float], *, percent: bool) -> str:
    """Mean of some runs with its 95% interval; of those that have the number, if some have not (nan)."""
    say = (lambda x: f"{x:.1%}") if percent else (lambda x: f"{x:.3g}")
    known = [x for x in values if not math.isnan(x)]
    if not known:
        return "-"
    half = f" ± {say(T95[len(known)] * statistics.stdev(known) / math.sqrt(len(known)))}" if len(known) > 1 else ""
    return f"{say(statistics.fmean(known))}{half}" + (f" ({len(known)} runs)" if len(known) < len(values) else "")


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
