"""Is PPO with lambda 1 close to group advantages, and with lambda 0.95 worse?

    python benchmarks/learning_ppo.py --out /tmp/ppo

DeepSeek-R1 (https://arxiv.org/abs/2501.12948, appendix A.3) says so of long answers with a reward at their end, of
which 0.95 per token leaves next to nothing. Answers here have four tokens, and 0.95^3 is 0.86; 0.5^3 is 0.13, what 0.95
leaves of a reward 40 tokens away, so lambda 0.5 is tried, too. All have the same start, tasks, number of answers and
updates, and no KL term. The critic begins as the start with a new scalar head, or as one that was fitted to the start's
answers for as many steps before the policy moves.
"""

from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tiny_runs import COMPUTE, HELD_OUT, Measured, Settings, accuracy, demonstrated, pretrained, seeds, slug, split

from posttrain.data.characters import Characters
from posttrain.launch.recipe import Training
from posttrain.model.processing import Sampling
from posttrain.train import metrics
from posttrain.train.objective import olmo
from posttrain.train.optimizer import AdamW
from posttrain.train.ppo import PPO, Objective
from posttrain.train.rl import RL

TASKS = Characters(operation="reverse")
TRAIN, ASKED = split(TASKS)
SAMPLING = Sampling(max_tokens=8)
START, STEPS, PROMPTS, GROUP = 8, 48, 16, 8


def one(run: Training, seed: int) -> Measured:
    """Held-out accuracy of every model of one seed, and how well its critic explains what answers earn."""
    start = run("start", demonstrated(TRAIN, start=pretrained(run, seed), steps=START, seed=seed))
    shared: dict[str, Any] = {
        "start": start, "tasks": TRAIN, "steps": STEPS, "prompts": PROMPTS, "group": GROUP, "sampling": SAMPLING,
        "optimizer": AdamW(learning_rate=4e-4), "compute": COMPUTE, "seed": seed,
    }  # fmt: skip
    learned = run("rl", RL(objective=olmo(rounds=1), **shared))
    found = {"start": scored(run, "start", start), "group advantages": scored(run, "group advantages", learned)}
    adam = AdamW(learning_rate=1e-3, warmup_steps=3)
    still = {**shared, "optimizer": AdamW(learning_rate=0.0)}  # the critic alone learns
    warming = PPO(
        objective=Objective(decay=1.0, kl_weight=0.0, value_clip=None), minibatches=1, critic_optimizer=adam, **still
    )
    fitted = run("fitted", warming) + "/critic"
    for begin, path in {"fitted critic": fitted, "new head": start}.items():
        for decay in (1.0, 0.95, 0.5):
            stage = PPO(
                objective=Objective(decay=decay, kl_weight=0.0), minibatches=1, critic=path, critic_optimizer=adam,
                **shared,
            )  # fmt: skip
            name = f"PPO, lambda {decay:g}, {begin}"
            found[name] = scored(run, name, run(slug(name), stage))
    return found


def scored(run: Training, name: str, model: str) -> dict[str, float]:
    """What a model reached, and the share of the returns' variance that its critic explained, the median of steps."""
    lines = metrics.read(Path(model) / "metrics.jsonl")
    explained = [line["explained_variance"] for line in lines if "explained_variance" in line]
    return {
        HELD_OUT: accuracy(run, name, model, ASKED),
        "drawn": accuracy(run, name, model, ASKED, temperature=1.0),
        "explained variance": float(np.median(explained)) if explained else float("nan"),
    }


if __name__ == "__main__":
    seeds(one, tyro.cli(Settings), against="group advantages")
