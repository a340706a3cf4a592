"""Tulu 3: fine-tuning on demonstrations, DPO on answers of several models, reinforcement learning from verifiers.

After Tulu 3 (https://arxiv.org/abs/2411.15124, figure 1 and sections 4 to 6):

    base --SFT on demonstrations--> sft
    sft and a pool of other models --answers, judged--> preferences
    sft --length-normalised DPO--> dpo
    dpo --Bradley-Terry on the same preferences--> reward model, which only the critic begins as
    dpo --PPO, rewards from verifiers alone--> rlvr

The pool here is the base's own earlier and later checkpoints, and the judge is a verifier; the paper's are some twenty
models and GPT-4o. A right answer earns 1 instead of the paper's 10, so that the weight of the KL term and the penalty
of an answer that does not end are a tenth of the paper's. Prompts are those of the first domain; every model is
evaluated on held-out tasks of all.

For the tiny base the first domain is to reverse letters, and half of its demonstrations are careless. Of answers drawn
to its held-out tasks sft does 30% right, dpo 66% and rlvr 98%; the others go from 98, 95 and 95% to 98, 96 and 96% with
dpo and to 93, 95 and 86% with rlvr, which has no prompts of them. One run and one seed, 2 to 4 minutes on a busy core;
three seeds are in benchmarks/README.md.
"""

from typing import Literal

from ...data.conversations import Demonstrations
from ...data.preferences import Rankings
from ...data.tasks import Mixture, parts
from ...train.compare import RANKINGS, Compare
from ...train.evaluate import Evaluate
from ...train.ppo import PPO, Objective
from ...train.prefer import LengthNormalizedDPO, Prefer
from ...train.reward import Ranked, Reward
from ...train.sft import SFT
from ..comparison import Comparison, Entry
from ..recipe import Run
from . import feedback_scales

ANSWERS = 4  # to a prompt, over all models of the pool


def recipe(
    run: Run,
    *,
    base: Literal["tiny", "llama3.1-8b", "qwen2.5-32b", "llama3.1-70b"] = "tiny",
    kl_weight: float = 0.005,
) -> Comparison:
    """SFT, length-normalised DPO, PPO on verifiable rewards, compared on held-out tasks.

    Args:
        run: trains (or plans) a stage and returns its folder.
        base: the model to start from; "tiny" is made on the spot and takes minutes; the large ones are
            shapes to plan with.
        kl_weight: what a token pays for leaving the DPO model, in nats of its log ratio; a right answer earns 1.
    """
    scale = feedback_scales.SCALES[base]
    train, held_out = parts(*scale.domains)
    lessons, _ = parts(*scale.shown)
    mixed = Mixture(sources=lessons, weights=scale.weights, size=scale.demonstrations)
    prompts = train[0]

    def score(name: str, model: str) -> Entry:
        asked = Evaluate(model=model, tasks=held_out, **scale.evaluate)
        return Entry(name, run(f"eval-{name}", asked), tuple(made[1:]))

    sft = run("sft", SFT(start=base, data=Demonstrations(tasks=mixed), **scale.sft))
    made = [sft]
    entries = [score("sft", sft)]

    weaker = run("weaker", SFT(start=base, data=Demonstrations(tasks=mixed), **scale.weaker))
    (labelled,), _ = parts(scale.labelled)
    pool = (sft, weaker)
    compared = run("preferences", Compare(models=pool, tasks=labelled, samples=ANSWERS // len(pool), **scale.compare))
    preferences = Rankings(paths=(f"{compared}/{RANKINGS}",))
    dpo = run("dpo", Prefer(start=sft, data=preferences, objective=LengthNormalizedDPO(beta=5.0), **scale.prefer))
    made.append(dpo)
    entries.append(score("dpo", dpo))

    critic = run("critic", Reward(start=dpo, data=preferences, objective=Ranked(answers=ANSWERS), **scale.reward))
    objective = Objective(kl_weight=kl_weight, unfinished=-1.0)
    rlvr = run("rlvr", PPO(start=dpo, critic=critic, tasks=prompts, objective=objective, **scale.rlvr))
    made += [critic, rlvr]
    entries.append(score("rlvr", rlvr))
    return Comparison(title=f"Tulu 3 from {base}", entries=tuple(entries), teachers={prompts.domain: "rlvr"})
