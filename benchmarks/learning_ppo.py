"""Is PPO with lambda 1 close to group advantages, and with lambda 0.95 worse?

    python benchmarks/learning_ppo.py --out /tmp/ppo

DeepSeek-R1 (https://arxiv.org/abs/2501.12948, appendix A.3) says so of long answers with a reward at their end, of
which 0.95 per token leaves next to nothing. Answers here have four tokens, and 0.95^3 is 0.86; 0.5^3 is 0.13, what 0.95
leaves of a reward 40 tokens away, so lambda 0.5 is tried, too. All have the same start, tasks, number of answers and
updates, and no KL term. The critic begins as a reward model that learned from verified answers of the
start's, as InstructGPT and Tulu 3 begin theirs, or as the start with a new scalar head.
"""

from typing import Any

import tyro
from tiny_runs import COMPUTE, HELD_OUT, Measured, Settings, accuracy, demonstrated, pretrained, seeds, slug, split

from posttrain.data.characters import Characters
from posttrain.data.preferences import Rankings
from posttrain.launch.recipe import Training
from posttrain.model.processing import Sampling
from posttrain.train.compare import RANKINGS, Compare
from posttrain.train.objective import olmo
from posttrain.train.optimizer import AdamW
from posttrain.train.ppo import PPO, Objective
from posttrain.train.reward import Pointwise, Reward
from posttrain.train.rl import RL

TASKS = Characters(operation="reverse")
TRAIN, ASKED = split(TASKS)
SAMPLING = Sampling(max_tokens=8)
START, STEPS, PROMPTS, GROUP = 8, 24, 16, 8


def critic(run: Training, start: str, seed: int) -> str:
    """A reward model: is an answer to a training task right?"""
    asked = Compare(
        models=(start,), tasks=TRAIN, sampling=SAMPLING, samples=4, limit=len(TRAIN), compute=COMPUTE, seed=seed
    )
    told = run("answers", asked)
    adam = AdamW(learning_rate=1e-3, warmup_steps=5, schedule="linear")
    judge = Reward(
        start=start, data=Rankings(paths=(f"{told}/{RANKINGS}",)), steps=40, objective=Pointwise(), batch_size=24,
        optimizer=adam, compute=COMPUTE, seed=seed,
    )  # fmt: skip
    return run("critic", judge)


def one(run: Training, seed: int) -> Measured:
    """Held-out accuracy of every model of one seed, and how well critics explain what answers earn."""
    start = run("start", demonstrated(TRAIN, start=pretrained(run, seed), steps=START, seed=seed))
    shared: dict[str, Any] = {
        "start": start, "tasks": TRAIN, "steps": STEPS, "prompts": PROMPTS, "group": GROUP, "sampling": SAMPLING,
        "optimizer": AdamW(learning_rate=4e-4), "compute": COMPUTE, "seed": seed,
    }  # fmt: skip
    models = {"start": start, "group advantages": run("rl", RL(objective=olmo(rounds=1), **shared))}
    for begin, path in {"reward model": critic(run, start, seed), "new head": start}.items():
        for decay in (1.0, 0.95, 0.5):
            stage = PPO(
                objective=Objective(decay=decay, kl_weight=0.0), minibatches=1, critic=path,
                critic_optimizer=AdamW(learning_rate=1e-3, warmup_steps=3), **shared,
            )  # fmt: skip
            name = f"PPO, lambda {decay:g}, {begin}"
            models[name] = run(slug(name), stage)
    return {
        name: {
            HELD_OUT: accuracy(run, name, path, ASKED),
            "drawn": accuracy(run, name, path, ASKED, temperature=1.0),
        }
        for name, path in models.items()
    }


if __name__ == "__main__":
    seeds(one, tyro.cli(Settings), against="group advantages")
