"""Is PPO with lambda 1 close to group advantages, and with lambda 0.95 worse?

    python benchmarks/learning_ppo.py --out /tmp/ppo

DeepSeek-R1 (https://arxiv.org/abs/2501.12948, appendix A.3) says so of long answers with a reward at their end, of
which 0.95 per token leaves next to nothing. Here an answer has four tokens, and 0.95^4 is 0.81; 0.5^4 is 0.06, what
0.95 leaves of a reward 54 tokens away, so lambda 0.5 is tried, too. All have the same start, tasks, number of answers
and updates, and no KL term; the critic begins as the start with a new scalar head.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from tiny_runs import COMPUTE, accuracy, demonstrated, seeds, split

from posttrain.data.characters import Characters
from posttrain.launch.recipe import Training
from posttrain.model.processing import Sampling
from posttrain.train.objective import olmo
from posttrain.train.optimizer import AdamW
from posttrain.train.ppo import PPO, Objective
from posttrain.train.rl import RL

TRAIN, HELD_OUT = split(Characters(operation="reverse"))
SAMPLING = Sampling(max_tokens=8)
START, STEPS, PROMPTS, GROUP = 85, 24, 16, 8


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
    for decay in (1.0, 0.95, 0.5):
        objective = Objective(decay=decay, kl_weight=0.0)
        critic = AdamW(learning_rate=1e-3, warmup_steps=3)
        stage = PPO(objective=objective, minibatches=1, critic_optimizer=critic, **shared)
        models[f"PPO, lambda {decay:g}"] = run(f"ppo-{decay:g}", stage)
    names = {name: name.replace(" ", "-").replace(",", "") for name in models}
    return {name: accuracy(run, names[name], path, HELD_OUT, max_tokens=8) for name, path in models.items()}


if __name__ == "__main__":
    settings = tyro.cli(Settings)
    seeds(one, settings.out, settings.seeds, against="group advantages")
