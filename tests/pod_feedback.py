"""As pod.py, with stages that have answers written, compared, learned from: `pod_feedback.py OUT [ACTION@EVENT]`.

$ENDPOINT is a chat server (see `chat_server`): a teacher, and the judge of comparisons.
"""

import os

import pod
from resumable import MIXED
from toy import Likes

from posttrain.data.conversations import Demonstrations
from posttrain.data.endpoint import Endpoint
from posttrain.data.filters.outcome import BestByReward
from posttrain.data.preferences import Rankings
from posttrain.launch.recipe import Run
from posttrain.train.answers import Local
from posttrain.train.compare import RANKINGS, Compare
from posttrain.train.curate import Curate
from posttrain.train.generate import ANY, Generate
from posttrain.train.judge import Judge
from posttrain.train.ppo import PPO, Ptx
from posttrain.train.prefer import KTO, Prefer
from posttrain.train.reward import Reward
from posttrain.train.rewards import RewardModels, ScoreRows

SHARED = {**pod.SHARED, "steps": 2}
COMPUTE, SAMPLING, NORTH, SOUTH = SHARED["compute"], pod.SAMPLING, Likes(domain="north"), Likes(domain="south")


def recipe(run: Run) -> str:
    """Every kind of these stages once."""
    big = Endpoint(url=os.environ["ENDPOINT"], model="big", concurrency=4)
    teachers = {"north": Local(model="tiny"), ANY: big}
    sizes = {"samples": 2, "limit": 6, "block": 4, "sampling": SAMPLING, "compute": COMPUTE, "seed": 3}
    rows = run("generate", Generate(prompts=(NORTH, SOUTH), teachers=teachers, rounds=2, passing=0.5, **sizes))
    ranked = run("compare", Compare(models=("tiny",), tasks=NORTH, by=Judge(model=big), **sizes))
    rankings = Rankings(paths=(f"{ranked}/{RANKINGS}",))
    policy = run("prefer", Prefer(start="tiny", data=rankings, objective=KTO(), batch_size=2, **SHARED))
    shown = Demonstrations(tasks=NORTH)
    judge = run("reward", Reward(start="tiny", data=rankings, demonstrations=shown, limit=4, batch_size=2, **SHARED))
    scorer = ScoreRows(models=(judge,), compute=COMPUTE)
    run("kept", Curate(rows=(rows,), filters=(), scorer=scorer, best=(BestByReward(),)))
    by = RewardModels(models=(judge,))
    ppo = {"rewards": by, "prompts": 2, "minibatches": 2, "group": 2, "ptx": Ptx(data=shown, batch_size=2)}
    return run("ppo", PPO(start=policy, tasks=MIXED, sampling=SAMPLING, **ppo, **SHARED))


if __name__ == "__main__":
    pod.main(recipe)
