"""Is PPO with lambda 1 close to group advantages, and with lambda 0.95 worse?

    python benchmarks/learning_ppo.py --out /tmp/ppo

DeepSeek-R1 (https://arxiv.org/abs/2501.12948, appendix A.3) says so of long answers with a reward at their end, on
which 0.95 per token leaves next to nothing. Here an answer has eleven tokens, and 0.95^11 is 0.57. All have the same
start, tasks, number of answers and updates, and no KL term; the critic begins as the start with a new scalar head.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from learning import COMPUTE, accuracy, demonstrated, seeds, split

from posttrain.data.characters import Characters
from posttrain.launch.recipe import Training
from posttrain.model.processing import Sampling
from posttrain.train.objective import olmo
from posttrain.train.optimizer import AdamW
from posttrain.train.ppo import PPO, Objective
from posttrain.train.rl import RL

TRAIN, HELD_OUT = split(Characters(operation="double", length=5, letters=4))
SAMPLING = Sampling(max_tokens=14)
START, STEPS, PROMPTS, GROUP = 80, 30, 16, 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`seeds` runs of everything, in `out`; a run that is there is not repeated."""

    out: Path
    seeds: int = 3


def one(run: Training, seed: int) -> dict[str, float]:
    """Held-out accuracy of every model of one seed."""
    models = {"start": run("start", demonstrated(TRAIN, steps=START, seed=seed))}
    shared = {
        "start": models["start"], "tasks": TRAIN, "steps": STEPS, "prompts": PROMPTS, "group": GROUP,
        "sampling": SAMPLING, "optimizer": AdamW(learning_rate=4e-4), "compute": COMPUTE, "seed": seed,
    }  # fmt: skip
    models["group advantages"] = run("rl", RL(objective=olmo(rounds=1), **shared))
    for decay in (1.0, 0.95):
        objective = Objective(decay=decay, kl_weight=0.0)
        critic = AdamW(learning_rate=1e-3, warmup_steps=3)
        stage = PPO(objective=objective, minibatches=1, critic_optimizer=critic, **shared)
        models[f"PPO, lambda {decay:g}"] = run(f"ppo-{decay:g}", stage)
    names = {name: name.replace(" ", "-").replace(",", "") for name in models}
    return {name: accuracy(run, names[name], path, HELD_OUT, max_tokens=14) for name, path in models.items()}


if __name__ == "__main__":
    settings = tyro.cli(Settings)
    seeds(one, settings.out, settings.seeds, against="group advantages")
