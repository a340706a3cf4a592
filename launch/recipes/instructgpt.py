"""Reinforcement learning from human feedback: demonstrations, a reward model from comparisons, PPO with pretraining.

After InstructGPT (https://arxiv.org/abs/2203.02155, figure 2):

    step 1   base --SFT on demonstrations--> sft
    step 2   sft --K answers to a prompt, ranked--> comparisons;  sft --K-wise ranking loss--> reward model
    step 3   sft --PPO from the reward model--> ppo;  the same with pretraining mixed in --> ppo-ptx

The labeller who ranks is a verifier, so the reward model's opinion can be held against the truth. Prompts of the first
domain are what the labeller compares and PPO trains on; demonstrations are of all domains, and stand for pretraining,
too: what PPO forgets of the others is what ptx is for. Every model is evaluated on held-out tasks of all domains.

On the tiny base (7 minutes on busy cores, one seed) the reward model comes to rank all of its training pairs and PPO
raises its score from -8.7 to -4.1, but not the truth: 11.7% of the first domain's held-out tasks before and 10.9%
after. Without ptx the other domains fall from 100% to 89, 73 and 95%; with it they stay at 100%. No other share of
the first domain among the demonstrations (0.045 to 0.08, for which SFT reaches anything from 12 to 100%) or weight of
the KL term (0.02 to 0.5) let PPO gain either.
"""

import dataclasses
from typing import Literal

from ...data.conversations import Demonstrations
from ...data.preferences import Rankings
from ...data.tasks import Mixture, parts
from ...train.compare import RANKINGS, Compare
from ...train.evaluate import Evaluate
from ...train.ppo import PPO, Objective, Ptx
from ...train.reward import Ranked, Reward
from ...train.rewards import RewardModels
from ...train.sft import SFT
from ...train.validation import Agreement
from ..comparison import Comparison, Entry
from ..recipe import Run
from . import feedback_scales

K = 9  # the most answers to a prompt that are ranked; the paper has 4 to 9


def recipe(
    run: Run,
    *,
    base: Literal["tiny", "llama3.1-8b", "qwen2.5-32b", "llama3.1-70b"] = "tiny",
    kl_weight: float | None = None,
) -> Comparison:
    """SFT, a reward model, PPO without and with pretraining mixed in, compared on held-out tasks.

    Args:
        run: trains (or plans) a stage and returns its folder.
        base: the model to start from; "tiny" is made on the spot and takes minutes; the large ones are
            shapes to plan with.
        kl_weight: what a token pays for leaving the SFT model, in nats of its log ratio; 0.02 unless told, as in the
            paper, and 0.5 for "tiny".
    """
    scale = feedback_scales.SCALES[base]
    train, held_out = parts(*scale.domains)
    lessons, _ = parts(*scale.shown)
    shown = Mixture(sources=lessons, weights=scale.weights, size=scale.demonstrations)
    others = Mixture(sources=train[1:], weights=(1.0,) * len(train[1:]), size=scale.demonstrations)
    prompts = train[0]

    def score(name: str, model: str) -> str:
        return run(f"eval-{name}", Evaluate(model=model, tasks=held_out, **scale.evaluate))

    sft = run("sft", SFT(start=base, data=Demonstrations(tasks=shown), **scale.sft))
    entries = [Entry("sft", score("sft", sft), ())]

    (labelled,), (checked,) = parts(scale.labelled)
    compared = Compare(models=(sft,), tasks=labelled, samples=K, **scale.compare)
    asked = dataclasses.replace(compared, tasks=checked, limit=scale.checked)
    ranked, held = (
        Rankings(paths=(f"{run(name, stage)}/{RANKINGS}",))
        for name, stage in {"comparisons": compared, "comparisons-held-out": asked}.items()
    )
    judge = run(
        "reward",
        Reward(
            start=sft,
            data=ranked,
            objective=Ranked(answers=K),
            demonstrations=Demonstrations(tasks=prompts),
            validation=Agreement(data=held, every=max(1, scale.reward["steps"] // 6), limit=scale.checked),
            **scale.reward,
        ),
    )
    mixed_in = Ptx(data=Demonstrations(tasks=others), **scale.ptx)
    for name, ptx in {"ppo": None, "ppo-ptx": mixed_in}.items():
        policy = run(
            name,
            PPO(
                start=sft,
                tasks=prompts,
                rewards=RewardModels(models=(judge,)),
                objective=Objective(kl_weight=scale.kl_weight if kl_weight is None else kl_weight),
                ptx=ptx,
                **scale.ppo,
            ),
        )
        entries.append(Entry(name, score(name, policy), (judge, policy)))
    return Comparison(title=f"InstructGPT from {base}", entries=tuple(entries), teachers={prompts.domain: "ppo"})
