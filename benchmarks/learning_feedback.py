"""Do the recipes that learn from feedback learn, and does what they optimise stay true?

    python benchmarks/learning_feedback.py instructgpt --out /tmp/feedback    # the recipe, over seeds
    python benchmarks/learning_feedback.py llama2 --out /tmp/feedback
    python benchmarks/learning_feedback.py tulu3 --out /tmp/feedback
    python benchmarks/learning_feedback.py proxy --out /tmp/feedback          # reward and truth as PPO goes on

Every stage of a recipe gets a seed of its run's own: orders of the data, answers, new heads. The first three print how
many of the first domain's held-out answers are right for each model, and the other domains in further columns. `proxy`
runs PPO for twice as long, with and without a KL term, from the reward model of `instructgpt` and from a weak one,
which has seen an eighth of the prompts with four answers each (https://arxiv.org/abs/2210.10760).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tiny_runs import HELD_OUT, Measured, Settings, seeds, slug

from posttrain.data.preferences import Rankings
from posttrain.data.tasks import parts
from posttrain.launch.comparison import Comparison
from posttrain.launch.recipe import Run, Stage, Training
from posttrain.launch.recipes import feedback_scales, instructgpt, llama2, tulu3
from posttrain.train import evaluate, metrics
from posttrain.train.compare import RANKINGS, Compare
from posttrain.train.ppo import PPO, Objective
from posttrain.train.reward import Ranked, Reward
from posttrain.train.rewards import RewardModels

APART = 100
"""Between the seeds of two runs: recipes count up from a stage's own."""
SCALE = feedback_scales.SCALES["tiny"]
LONG, WEIGHTS = 60, (0.0, 1.0)
WEAK: dict[str, Any] = {**SCALE.reward, "steps": 120, "batch_size": 24}


@dataclass(frozen=True, kw_only=True)
class Tried(Settings):
    """Run a recipe that learns from feedback with several seeds and print a Markdown table."""

    recipe: Annotated[Literal["instructgpt", "llama2", "tulu3", "proxy"], tyro.conf.Positional]
    """Which recipe; "proxy": PPO for longer, from the first one's reward model and from a weak one."""


def seeded(run: Training, seed: int) -> Run:
    """A `run` whose stages have this run's seeds."""

    def train(name: str, stage: Any) -> str:
        has = "seed" in {field.name for field in dataclasses.fields(stage)}
        seeded: Stage = dataclasses.replace(stage, seed=stage.seed + APART * seed) if has else stage
        return run(name, seeded)

    return train


def whole(recipe: Callable[[Run], Comparison], run: Training, seed: int) -> Measured:
    """The held-out score of every model of a recipe in each domain."""
    found: dict[str, dict[str, float]] = {}
    for entry in recipe(seeded(run, seed)).entries:
        first, *others = evaluate.read(Path(entry.evaluation)).items()
        found[entry.name] = {HELD_OUT: first[1].mean, **{domain: score.mean for domain, score in others}}
    return found


def proxy(run: Training, seed: int) -> Measured:
    """What a reward model and the verifier say of the answers that PPO samples: at first, at best and at last."""
    again, sft = seeded(run, seed), str(run.out / "sft")
    instructgpt.recipe(again)
    (prompts, labelled), _ = parts(SCALE.domains[0], SCALE.labelled)
    few = Compare(models=(sft,), tasks=labelled, samples=4, **{**SCALE.compare, "limit": SCALE.compare["limit"] // 8})
    ranked = Rankings(paths=(f"{again('few-comparisons', few)}/{RANKINGS}",))
    weak = again("weak-reward", Reward(start=sft, data=ranked, objective=Ranked(answers=4), **WEAK))
    found: dict[str, dict[str, float]] = {}
    for judge, path in {"": str(run.out / "reward"), "weak reward model, ": weak}.items():
        for weight in WEIGHTS:
            stage = PPO(
                start=sft, tasks=prompts, rewards=RewardModels(models=(path,)),
                objective=Objective(kl_weight=weight), **{**SCALE.ppo, "steps": LONG},
            )  # fmt: skip
            name = f"{judge}KL weight {weight:g}"
            lines = metrics.read(Path(again(slug(name), stage)) / "metrics.jsonl")
            for when, part in {"first step": lines[:1], "best five": best(lines), "last five": lines[-5:]}.items():
                mean = {key: sum(line[key] for line in part) / len(part) for key in ("verdict", "reward", "step")}
                found[f"{name}, {when}"] = {HELD_OUT: mean["verdict"], "reward": mean["reward"], "step": mean["step"]}
    return found


def best(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The five steps in a row whose answers were right most often."""
    windows = [lines[i : i + 5] for i in range(len(lines) - 4)]
    return max(windows, key=lambda part: sum(line["verdict"] for line in part))


RECIPES: dict[str, tuple[Callable[[Training, int], Measured], str]] = {
    "instructgpt": (partial(whole, instructgpt.recipe), "sft"),
    "llama2": (partial(whole, llama2.recipe), "sft"),
    "tulu3": (partial(whole, tulu3.recipe), "sft"),
    "proxy": (proxy, f"KL weight {WEIGHTS[0]:g}, first step"),
}
"""How each is run, and what it is compared with."""


if __name__ == "__main__":
    args = tyro.cli(Tried)
    one, against = RECIPES[args.recipe]
    where = "instructgpt" if args.recipe == "proxy" else args.recipe
    seeds(one, dataclasses.replace(args, out=args.out / where), against=against)
