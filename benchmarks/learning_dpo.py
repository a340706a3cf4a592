"""Does DPO on a stronger model's answers over a weaker one's beat fine-tuning on the stronger one's answers?

    python benchmarks/learning_dpo.py --out /tmp/dpo

Delta learning (https://arxiv.org/abs/2507.06187; Olmo 3, https://arxiv.org/abs/2512.13961, table 21: fine-tuning on the
chosen answers made a model worse, DPO better). One run of demonstrations gives a weak model, the start and a strong
one. Two kinds of pairs have the weak model's answers as rejected ones: in the first the chosen ones are the start's own,
so that there is nothing to imitate, in the second the strong model's. All methods see the same answers.
"""

from dataclasses import replace
from typing import Any

import tyro
from tiny_runs import COMPUTE, HELD_OUT, Measured, Settings, accuracy, demonstrated, seeds, split

from posttrain.data.characters import Characters
from posttrain.data.conversations import Files
from posttrain.data.preferences import Rankings
from posttrain.launch.recipe import Training
from posttrain.model.processing import Sampling
from posttrain.train.compare import BEST, RANKINGS, Compare, Order
from posttrain.train.optimizer import AdamW
from posttrain.train.prefer import DPO, LengthNormalizedDPO, Prefer
from posttrain.train.sft import SFT

TRAIN, ASKED = split(Characters(operation="reverse"))
WEAK, START, STRONG = 100, 60, 140  # steps of demonstrations, each after those before
STEPS, BATCH = 30, 24


def pairs(run: Training, name: str, chosen: str, rejected: str, seed: int) -> str:
    """One answer of each of two models to every task, the first model's above the second's."""
    return run(
        name,
        Compare(
            models=(chosen, rejected), tasks=TRAIN, sampling=Sampling(max_tokens=8), by=Order(), samples=1,
            limit=len(TRAIN), compute=COMPUTE, seed=seed,
        ),
    )  # fmt: skip


def one(run: Training, seed: int) -> Measured:
    """Held-out accuracy of every model of one seed."""
    models: dict[str, str] = {}
    for name, steps in {"weak": WEAK, "start": START, "strong": STRONG}.items():
        before = next(reversed(models.values()), "tiny")
        models[name] = run(name, demonstrated(TRAIN, steps=steps, seed=seed, start=before))
    shared: dict[str, Any] = {
        "start": models["start"], "steps": STEPS, "batch_size": BATCH, "compute": COMPUTE, "seed": seed,
    }  # fmt: skip
    for better in ("start", "strong"):
        of = f"{better} over weak"
        compared = pairs(run, f"pairs-{better}", models[better], models["weak"], seed)
        adam = AdamW(learning_rate=5e-4, schedule="linear", warmup_steps=4)
        lessons = SFT(data=Files(paths=(f"{compared}/{BEST}",)), optimizer=adam, **shared)
        models[f"SFT on chosen, {of}"] = run(f"sft-{better}", lessons)
        ranked, adam = Rankings(paths=(f"{compared}/{RANKINGS}",)), replace(adam, learning_rate=2e-4)
        for name, objective in {"DPO": DPO(beta=0.1), "DPO-norm": LengthNormalizedDPO(beta=1.0)}.items():
            stage = Prefer(data=ranked, objective=objective, optimizer=adam, **shared)
            models[f"{name}, {of}"] = run(f"{name}-{better}", stage)
    return {name: {HELD_OUT: accuracy(run, name, path, ASKED, max_tokens=8)} for name, path in models.items()}


if __name__ == "__main__":
    seeds(one, tyro.cli(Settings), against="start")
