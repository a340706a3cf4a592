"""Does it pay to verify and filter? One model fine-tuned on kept rows, the same on as many unfiltered ones.

    python benchmarks/kept_rows.py --base tiny --out runs/kept-tiny

The start answers each prompt several times. One arm learns from the rows that pass the filters of the `olmo3` recipe,
at most two a prompt; the other from the first two rows of each prompt, as they were sampled. Everything else is the
same: start, steps, batch, learning rate, seeds. Scores are greedy answers to held-out prompts. Run again to go on.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import rich.console
import tyro

from posttrain.data.conversations import Rows
from posttrain.data.filters.funnel import PromptFilter
from posttrain.data.row import Row
from posttrain.data.tasks import parts
from posttrain.launch.recipe import Training
from posttrain.launch.recipes import engine_scales, olmo3
from posttrain.train import evaluate
from posttrain.train.answers import Local
from posttrain.train.convert import Convert
from posttrain.train.curate import Curate
from posttrain.train.evaluate import Evaluate, Score
from posttrain.train.generate import ANY, Generate
from posttrain.train.sft import SFT

console = rich.console.Console(markup=False, width=140)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`base` answers, at temperature 1, and learns; `out` is the run folder."""

    out: Path
    base: Literal["tiny", "smollm2"] = "tiny"
    seeds: int = 3


@dataclass(frozen=True, kw_only=True)
class First(PromptFilter):
    """Keep the first `count` rows of each prompt, as they were sampled."""

    count: int

    def prompt_reasons(self, rows: Sequence[Row]) -> list[str | None]:
        """The reason of each row."""
        first = {row.id for row in sorted(rows, key=lambda row: row.id)[: self.count]}
        return [None if row.id in first else f"is not among the first {self.count}" for row in rows]


def main(settings: Settings) -> None:
    """Print a table, in Markdown: each arm's score by domain, and the difference, over seeds."""
    scale, run = engine_scales.SCALES[settings.base], Training(settings.out)
    prompts, held_out = parts(*scale.domains)
    start = run("start", scale.start(prompts) if scale.start else Convert(source=settings.base))
    asked = {**scale.generate, "sampling": dataclasses.replace(scale.generate["sampling"], temperature=1.0)}
    generated = run("generated", Generate(prompts=prompts, teachers={ANY: Local(model=start)}, **asked))
    arms = {
        "unfiltered": run("unfiltered", Curate(rows=(generated,), filters=(First(count=scale.keep),))),
        "kept": run("kept", Curate(rows=(generated,), filters=olmo3.filters(held_out, scale.keep))),
    }
    scores: dict[str, list[dict[str, Score]]] = collections.defaultdict(list)
    scores["start"].append(_score(run, "start", start, held_out, scale))
    for seed in range(settings.seeds):
        for name, rows in arms.items():
            stage = SFT(start=start, data=Rows(folders=(rows,)), optimizer=scale.high, seed=seed, **scale.sft)
            model = run(f"sft-{name}-{seed}", stage)
            scores[name].append(_score(run, f"{name}-{seed}", model, held_out, scale))
    _print(scores)


def _score(run: Training, name: str, model: str, held_out, scale) -> dict[str, Score]:
    return evaluate.read(Path(run(f"eval-{name}", Evaluate(model=model, tasks=held_out, **scale.evaluate))))


def _print(scores: dict[str, list[dict[str, Score]]]) -> None:
    domains = list(scores["start"][0])
    rows = [["", *domains, "mean of domains"]]
    for name, found in scores.items():
        rows.append([name, *(_text([one[d].mean for one in found]) for d in domains), _text(_means(found))])
    pairs = list(zip(scores["kept"], scores["unfiltered"], strict=True))
    gains = [_text([kept[d].mean - other[d].mean for kept, other in pairs]) for d in domains]
    total = [a - b for a, b in zip(_means(scores["kept"]), _means(scores["unfiltered"]), strict=True)]
    rows.append(["kept - unfiltered", *gains, _text(total)])
    rows.insert(1, ["---"] * len(rows[0]))
    for row in rows:
        console.print(f"| {' | '.join(row)} |")
    held_out = ", ".join(f"{domain} {scores['start'][0][domain].n}" for domain in domains)
    console.print(f"{len(pairs)} seeds; held-out prompts: {held_out}")


def _means(found: list[dict[str, Score]]) -> list[float]:
    return [sum(score.mean for score in one.values()) / len(one) for one in found]


def _text(values: list[float]) -> str:
    """Mean over seeds in percent, with its 95% interval by Student's t."""
    mean, half = evaluate.mean_over_seeds(values)
    return f"{mean:.1%}" if math.isinf(half) else f"{mean:.1%} ± {100 * half:.1f}"


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
