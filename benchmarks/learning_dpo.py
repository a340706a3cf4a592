"""Does DPO on a stronger model's answers over a weaker one's beat fine-tuning on the stronger one's answers?

    python benchmarks/learning_dpo.py --out /tmp/dpo

Delta learning (https://arxiv.org/abs/2507.06187; Olmo 3, https://arxiv.org/abs/2512.13961, table 21: fine-tuning on the
chosen answers made a model worse, DPO better). Three models learn from ever more demonstrations, each going on from the
one before: a weak one, the start, and a strong one, hardly better than the start. All methods see the same answers.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from tiny_runs import COMPUTE, accuracy, demonstrated, seeds, split

from posttrain.data.characters import Characters
from posttrain.data.conversations import Files
from posttrain.data.preferences import Rankings
from posttrain.launch.recipe import Training
from posttrain.model.processing import Sampling
from posttrain.train.compare import BEST, RANKINGS, Compare, Order
from posttrain.train.optimizer import AdamW
from posttrain.train.prefer import DPO, LengthNormalizedDPO, Prefer
from posttrain.train.sft import SFT

TRAIN, HELD_OUT = split(Characters(operation="reverse"))
WEAK, START, STRONG = 70, 15, 5  # steps of demonstrations, each after those before
STEPS, BATCH = 30, 24


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`seeds` runs of everything, in `out`; a run that is there is not repeated."""

    out: Path
    seeds: int = 3


def one(run: Training, seed: int) -> dict[str, float]:
    """Held-out accuracy of every model of one seed."""
    steps = {"weak": WEAK, "start": START, "strong": STRONG}
    models: dict[str, str] = {}
    for name, n in steps.items():
        before = next(reversed(models.values()), "tiny")
        models[name] = run(name, demonstrated(TRAIN, steps=n, seed=seed, start=before))
    pairs = run(
        "pairs",
        Compare(
            models=(models["strong"], models["weak"]), tasks=TRAIN, sampling=Sampling(max_tokens=8), by=Order(),
            samples=1, limit=len(TRAIN), compute=COMPUTE, seed=seed,
        ),
    )  # fmt: skip
    shared = {"start": models["start"], "steps": STEPS, "batch_size": BATCH, "compute": COMPUTE, "seed": seed}
    chosen = Files(paths=(f"{pairs}/{BEST}",))
    ranked = Rankings(paths=(f"{pairs}/{RANKINGS}",))
    models["SFT on chosen"] = run(
        "sft", SFT(data=chosen, optimizer=AdamW(learning_rate=5e-4, schedule="linear"), **shared)
    )
    for name, objective in {"DPO": DPO(beta=0.1), "length-normalised DPO": LengthNormalizedDPO(beta=1.0)}.items():
        adam = AdamW(learning_rate=2e-4, schedule="linear", warmup_steps=4)
        stage = Prefer(data=ranked, objective=objective, optimizer=adam, **shared)
        models[name] = run(type(objective).__name__, stage)
    return {name: accuracy(run, name.replace(" ", "-"), path, HELD_OUT, max_tokens=8) for name, path in models.items()}


if __name__ == "__main__":
    settings = tyro.cli(Settings)
    seeds(one, settings.out, settings.seeds, against="SFT on chosen")
