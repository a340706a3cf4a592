"""Claims about learning, tried on the tiny model: each against its baseline, over seeds, with intervals.

    python benchmarks/learning_claims.py distill --out /tmp/claims     # in how many times fewer steps than RL
    python benchmarks/learning_claims.py stale --out /tmp/claims       # a sampler with old weights, and corrections
    python benchmarks/learning_claims.py noisy --out /tmp/claims       # a sampler with noisy weights, and corrections
    python benchmarks/learning_claims.py average --out /tmp/claims     # two SFT runs and the average of their weights

README.md has what each did. The tiny model learns to reverse three letters: a minute or two a seed.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tiny_runs import (
    COMPUTE,
    HELD_OUT,
    Measured,
    Settings,
    accuracy,
    demonstrated,
    pretrained,
    seeds,
    slug,
    split,
    taught,
)

from posttrain.data.characters import Characters
from posttrain.launch.recipe import Training
from posttrain.model.processing import Sampling
from posttrain.train import correction, metrics, objective
from posttrain.train.distill import Distill
from posttrain.train.merge import Linear
from posttrain.train.optimizer import AdamW
from posttrain.train.rl import RL
from posttrain.train.teaching import FullVocabulary

TASKS = Characters(operation="reverse")
TRAIN, ASKED = split(TASKS)
STARTS = 5, 3, 2  # steps of demonstrations
DIVERGENCES = {
    "reverse KL": (1.0, AdamW(learning_rate=8e-4)),
    "forward KL": (0.0, AdamW(learning_rate=1.6e-3, warmup_steps=5)),
}
"""The beta of a divergence, and what the student learns it with."""
NOISE = 0.4  # of the deviation of each matrix
EVERY = 16  # steps after which a stale sampler gets the policy's weights
FEW, MANY = split(TASKS, 0.95)  # 23 strings to learn from
SHARED: dict[str, Any] = {"tasks": TRAIN, "sampling": Sampling(max_tokens=8), "compute": COMPUTE, "prompts": 16}


@dataclass(frozen=True, kw_only=True)
class Claim(Settings):
    """Try one claim with several seeds and print a Markdown table."""

    claim: Annotated[Literal["distill", "stale", "noisy", "average"], tyro.conf.Positional]
    """Which claim."""


def started(run: Training, seed: int, steps: int) -> str:
    """A model that has seen a few demonstrations and solves some of the tasks."""
    return run(f"start-{steps}", demonstrated(TRAIN, start=pretrained(run, seed), steps=steps, seed=seed))


def rewards(folder: str) -> np.ndarray:
    """Mean reward of each step's answers, over a window of three steps."""
    found = [line["reward"] for line in metrics.read(Path(folder) / "metrics.jsonl")]
    return np.convolve(found, np.ones(3) / 3, mode="valid")


def first_at(values: np.ndarray, level: float) -> float:
    """Steps until the values reach a level; nan if they never do."""
    reached = np.flatnonzero(values >= level)
    return float(reached[0] + 1) if len(reached) else float("nan")


def distill(run: Training, seed: int) -> Measured:
    """Students of RL's teachers, from starts that know ever less."""
    return {name: scores for lessons in STARTS for name, scores in students(run, seed, lessons).items()}


def students(run: Training, seed: int, lessons: int) -> dict[str, dict[str, float]]:
    """RL makes a teacher; the same start is distilled from it. Steps until 95% of the gain in sampled reward."""
    start = started(run, seed, lessons)
    learner = RL(
        start=start, steps=480, group=8, objective=objective.olmo(rounds=1), optimizer=AdamW(learning_rate=4e-4),
        seed=seed, **SHARED,
    )  # fmt: skip
    models = {"start": start, "RL, the teacher": run(f"rl-{lessons}", learner)}
    for way, (beta, optimizer) in DIVERGENCES.items():
        student = Distill(
            start=start, teachers={TASKS.domain: models["RL, the teacher"]}, steps=60, samples=8, optimizer=optimizer,
            objective=FullVocabulary(beta=beta), seed=seed, **SHARED,
        )  # fmt: skip
        models[f"on-policy distillation, {way}"] = run(f"distill-{lessons}-{slug(way)}", student)
    earned = {way: rewards(model) for way, model in models.items() if model != start}
    first, last = earned["RL, the teacher"][0], np.mean(earned["RL, the teacher"][-10:])
    taken = {way: first_at(values, first + 0.95 * (last - first)) for way, values in earned.items()}
    found = {}
    for way, model in models.items():
        name, steps = f"{way}, after {lessons} steps", taken.get(way, float("nan"))
        fewer = taken["RL, the teacher"] / steps
        found[name] = {HELD_OUT: accuracy(run, name, model, ASKED), "steps": steps, "times fewer": fewer}
    return found


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


@dataclass(frozen=True, kw_only=True)
class Stale(RL):
    """RL whose sampler gets the policy's weights every so many steps, and goes on with them in between."""

    every: int

    def behavior(self, params: Any, step: int) -> Any:
        """The weights that the policy had when the sampler last got them."""
        if step % self.every == 0 or not self._held:
            self._held["params"] = jax.tree.map(jnp.copy, params)  # a step takes its policy's own memory
        return self._held["params"]

    @cached_property
    def _held(self) -> dict[str, Any]:
        return {}


def noisy(run: Training, seed: int) -> Measured:
    """RL with a noisy sampler under each correction; and with an exact one."""
    return mismatch(run, seed, steps=50, exact=partial(Noisy, noise=0.0), off=partial(Noisy, noise=NOISE))


def stale(run: Training, seed: int) -> Measured:
    """RL with a sampler that lags behind under each correction; and with one that does not."""
    return mismatch(run, seed, steps=60, exact=partial(Stale, every=1), off=partial(Stale, every=EVERY))


def mismatch(run: Training, seed: int, *, steps: int, exact: Callable[..., RL], off: Callable[..., RL]) -> Measured:
    """RL from a start that does 40% of the tasks: with an exact sampler, and with another under each correction."""
    start = taught(run, pretrained(run, seed), (TRAIN, ASKED), levels={"start": 0.4}, seed=seed)["start"]
    plan = dataclasses.replace(objective.olmo(rounds=1), correction=correction.Uncorrected())
    ways: dict[str, tuple[Callable[..., RL], Any]] = {
        "exact sampler": (exact, plan.correction),
        "uncorrected": (off, plan.correction),
        "TIS at 2": (off, correction.Truncated()),
        "IcePop in [0.5, 2]": (off, correction.Masked()),
        "sequences at 2": (off, correction.TruncatedSequence()),
    }
    nothing = {"mismatch": 0.0, "outside": 0.0}
    found = {"start": {HELD_OUT: accuracy(run, "start", start, ASKED), **nothing}}
    for name, (kind, way) in ways.items():
        stage = kind(
            start=start, steps=steps, group=8, seed=seed,
            objective=dataclasses.replace(plan, correction=way), optimizer=AdamW(learning_rate=4e-4), **SHARED,
        )  # fmt: skip
        folder = run(slug(name), stage)
        lines = [line for line in metrics.read(Path(folder) / "metrics.jsonl") if "mismatch" in line]
        found[name] = {
            HELD_OUT: accuracy(run, name, folder, ASKED),
            "mismatch": float(np.mean([line["mismatch"] for line in lines])),
            "outside": float(np.mean([line["mismatch_outside"] for line in lines])),
        }
    return found


def average(run: Training, seed: int) -> Measured:
    """SFT on the same few demonstrations at a high and a low learning rate, and the mean of the two."""
    models = {"start": pretrained(run, seed)}
    for name, rate in (("high", 2e-3), ("low", 1e-3)):
        adam = AdamW(learning_rate=rate, warmup_steps=5, schedule="linear")
        models[name] = run(name, demonstrated(FEW, start=models["start"], steps=60, seed=seed, optimizer=adam))
    models["average"] = run("average", Linear(models=(models["high"], models["low"])))
    return {name: {HELD_OUT: accuracy(run, name, path, MANY)} for name, path in models.items()}


CLAIMS: dict[str, tuple[Callable[[Training, int], Measured], str]] = {
    "distill": (distill, f"RL, the teacher, after {STARTS[0]} steps"),
    "stale": (stale, "exact sampler"),
    "noisy": (noisy, "uncorrected"),
    "average": (average, "high"),
}
"""How each claim is tried, and what it is compared with."""


if __name__ == "__main__":
    args = tyro.cli(Claim)
    one, against = CLAIMS[args.claim]
    seeds(one, dataclasses.replace(args, out=args.out / args.claim), against=against)
