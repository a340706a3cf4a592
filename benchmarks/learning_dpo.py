"""Does DPO on a stronger model's answers over a weaker one's beat fine-tuning on the stronger one's answers?

    python benchmarks/learning_dpo.py --out /tmp/dpo

Delta learning (https://arxiv.org/abs/2507.06187; Olmo 3, https://arxiv.org/abs/2512.13961, table 21: fine-tuning on the
chosen answers made a model worse, DPO better). One run of demonstrations gives a weak model, the start and a strong
one, and a middle one that is stronger than the weak one and weaker than the start. The rejected answers are the weak
model's. The chosen ones are the middle model's, as in those papers, where the start is better than what it is shown;
or the start's own, which it cannot gain from by imitation; or the strong model's. All methods see the same answers, and
answers are drawn when they are scored.
"""

from dataclasses import replace
from typing import Any

import tyro
from tiny_runs import COMPUTE, HELD_OUT, Measured, Settings, accuracy, pretrained, seeds, slug, split, taught

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
LEVELS = {"weak": 0.2, "middle": 0.45, "start": 0.7, "strong": 0.95}  # shares of drawn answers that are right
STEPS, BATCH = 30, 24


def pairs(chosen: str, rejected: str, seed: int) -> Compare:
    """One answer of each of two models to every task, the first model's above the second's."""
    return Compare(
        models=(chosen, rejected), tasks=TRAIN, sampling=Sampling(max_tokens=8), by=Order(), samples=1,
        limit=len(TRAIN), compute=COMPUTE, seed=seed,
    )  # fmt: skip


def one(run: Training, seed: int) -> Measured:
    """Held-out accuracy of every model of one seed."""
    models = taught(run, pretrained(run, seed), (TRAIN, ASKED), levels=LEVELS, seed=seed)
    shared: dict[str, Any] = {
        "start": models["start"], "steps": STEPS, "batch_size": BATCH, "compute": COMPUTE, "seed": seed,
    }  # fmt: skip
    for better in ("middle", "start", "strong"):
        compared = run(f"pairs-{better}", pairs(models[better], models["weak"], seed))
        chosen, ranked = Files(paths=(f"{compared}/{BEST}",)), Rankings(paths=(f"{compared}/{RANKINGS}",))
        adam = AdamW(learning_rate=5e-4, schedule="linear", warmup_steps=4)
        gentle = replace(adam, learning_rate=3e-5)
        ways = {
            "SFT on chosen": SFT(data=chosen, optimizer=adam, **shared),
            "DPO": Prefer(data=ranked, objective=DPO(beta=0.5), optimizer=gentle, **shared),
            "DPO with 0.2 NLL": Prefer(data=ranked, objective=DPO(beta=0.5, nll=0.2), optimizer=gentle, **shared),
            "DPO-norm": Prefer(data=ranked, objective=LengthNormalizedDPO(beta=5.0), optimizer=gentle, **shared),
        }
        for way, stage in ways.items():
            name = f"{way}, {better} over weak"
            models[name] = run(slug(name), stage)
    drawn = {name: accuracy(run, name, path, ASKED, temperature=1.0) for name, path in models.items()}
    return {name: {HELD_OUT: drawn[name], "greedy": accuracy(run, name, models[name], ASKED)} for name in models}


if __name__ == "__main__":
    seeds(one, tyro.cli(Settings), against="SFT on chosen, middle over weak")
