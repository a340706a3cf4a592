"""Llama 2-Chat: two reward models, rounds of rejection sampling, then PPO under both.

After Llama 2 (https://arxiv.org/abs/2307.09288, figure 4 and section 3):

    base --SFT on demonstrations--> sft = chat 0
    round t   chat t-1 and sft --answers, ranked by labellers--> helpful t, safe t
              chat t-1 --ranking loss on helpful 1..t--> helpfulness model;  on safe 1..t--> safety model
              chat t-1 --answers, the best under both models--> winners t
              sft --SFT on winners 1..t--> chat t
    at last   chat T --PPO under both models--> ppo

The rule that makes one reward of two takes the safety model's score for prompts that are marked as unsafe and where it
is low, and the helpfulness model's elsewhere. Each reward model learns from a part of the other's comparisons, too,
with margins that grow with the difference of the labellers' scores; the safety model also learns which answers are
safe. Winners of all rounds are kept: the paper's third round, which kept its own alone, forgot.

The labellers here are verifiers. For the tiny base the unsafe tasks are to sort letters, which half of the
demonstrations do and half refuse; the helpful ones are to reverse them, of whose demonstrations half are careless. Of
answers drawn to held-out tasks, 36% of sft's are right where it should help and 63% are safe where it should refuse;
chat 1 has 65 and 93%, chat 2 70 and 97%, ppo 87 and 99%. One run and one seed, 7 minutes on a busy core; with another
seed the second round adds no help (30, 40, 39, 68%; safe: 40, 92, 96, 99%). When each round's fine-tuning was rougher
(60 steps at 1e-3 instead of 120 at 3e-4), the second made things worse with the first seed, too: 57%, then 41%, and 47%
after PPO. Its reward model was made of a model that had forgotten too much, and agreed with 77% of held-out pairs (at
twice its learning rate) where it now agrees with 90%.
"""

from collections.abc import Mapping
from typing import Literal

from ...data.conversations import Demonstrations, Files
from ...data.preferences import Blended, Rankings
from ...data.tasks import Mixture, parts
from ...train.compare import BEST, RANKINGS, Compare
from ...train.evaluate import Evaluate
from ...train.ppo import PPO, Objective
from ...train.reward import Ranked, Reward
from ...train.rewards import RewardModels, SafetyOrHelpfulness
from ...train.sft import SFT
from ..comparison import Comparison, Entry
from ..recipe import Run
from . import feedback_scales

RANKED, SAMPLED = 4, 8  # answers to a prompt: that labellers rank, that the best is taken of


OBJECTIVES = {
    "safe": Ranked(answers=RANKED, margin_of_gap=1.0, safety=1.0),
    "helpful": Ranked(answers=RANKED, margin_of_gap=1.0),
}
SAFE = 0.5  # the score from which on an answer to an unsafe prompt is safe; answers to the other prompts all are


def blends(ranked: Mapping[str, tuple[str, ...]]) -> dict[str, Blended]:
    """What each reward model learns from: all of its own labellers' comparisons, and a part of the others'.

    A tenth of the safety model's are about helpfulness. The helpfulness model's are half its own, and half others, in
    equal parts about safety and from open sets; without open sets two thirds and one third.
    """
    safe = Rankings(paths=ranked["safe"], safe_from=SAFE)
    helpful = Rankings(paths=ranked["helpful"], safe_from=-1.0)
    return {
        "safe": Blended(main=safe, others=helpful, share=0.1),
        "helpful": Blended(main=helpful, others=safe, share=1 / 3),
    }


def recipe(
    run: Run,
    *,
    base: Literal["tiny", "llama3.1-8b", "qwen2.5-32b", "llama3.1-70b"] = "tiny",
    rounds: int = 2,
    kl_weight: float | None = None,
) -> Comparison:
    """SFT, rounds of two reward models and rejection sampling, PPO, compared on held-out tasks.

    Args:
        run: trains (or plans) a stage and returns its folder.
        base: the model to start from; "tiny" is made on the spot and takes minutes; the large ones are
            shapes to plan with.
        rounds: how often labellers rank and the model learns from its own best answers.
        kl_weight: what a token pays for leaving the last round's model, in nats of its log ratio; rewards are whitened.
            0.01 unless told, as in the paper, and 0.1 for "tiny".
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: PPO needs the reward models of at least one round")
    scale = feedback_scales.SCALES[base]
    train, held_out = parts(*scale.domains, scale.unsafe)
    asked = train[0], train[-1]
    prompts = Mixture(sources=asked, weights=(1.0, 1.0), size=scale.compare["limit"])
    shown = (*scale.shown, *scale.shown_unsafe)
    weights = (*scale.weights, *(1 / len(scale.shown_unsafe),) * len(scale.shown_unsafe))
    lessons, _ = parts(*shown)
    mixed = Mixture(sources=lessons, weights=weights, size=scale.demonstrations)
    (labelled,), _ = parts(scale.labelled)
    labellers = {"safe": asked[1], "helpful": labelled}

    def score(name: str, model: str, made: tuple[str, ...]) -> Entry:
        tasks = held_out[0], held_out[-1]
        return Entry(name, run(f"eval-{name}", Evaluate(model=model, tasks=tasks, **scale.evaluate)), made)

    sft = run("sft", SFT(start=base, data=Demonstrations(tasks=mixed), **scale.sft))
    entries, made, winners = [score("sft", sft, ())], (), ()
    ranked: dict[str, tuple[str, ...]] = dict.fromkeys(labellers, ())
    chat, rewards = sft, None
    for number in range(1, rounds + 1):
        judges: dict[str, str] = {}
        pool = tuple(dict.fromkeys((chat, sft)))  # a model that is always safe has nothing to rank
        for name, tasks in labellers.items():
            compared = Compare(models=pool, tasks=tasks, samples=RANKED // len(pool), seed=number, **scale.compare)
            ranked[name] += (f"{run(f'{name}-{number}', compared)}/{RANKINGS}",)
        for name in labellers:
            stage = Reward(start=chat, data=blends(ranked)[name], objective=OBJECTIVES[name], **scale.reward)
            judges[name] = run(f"{name}-model-{number}", stage)
        rule = SafetyOrHelpfulness(safety_domains=(asked[1].domain,))
        rewards = RewardModels(models=(judges["safe"], judges["helpful"]), combine=rule)
        best = Compare(
            models=(chat,), tasks=prompts, samples=SAMPLED, by=rewards, passing=None, seed=number, **scale.compare
        )
        winners += (f"{run(f'winners-{number}', best)}/{BEST}",)
        chat = run(f"chat-{number}", SFT(start=sft, data=Files(paths=winners), **scale.rejection))
        made += (*judges.values(), chat)
        entries.append(score(f"chat-{number}", chat, made))
    objective = Objective(kl_weight=scale.whitened_kl_weight if kl_weight is None else kl_weight)
    ppo = run("ppo", PPO(start=chat, tasks=prompts, rewards=rewards, objective=objective, **scale.ppo))
    entries.append(score("ppo", ppo, (*made, ppo)))
    taught = {one.domain: "ppo" for one in asked}
    return Comparison(title=f"Llama 2-Chat from {base}", entries=tuple(entries), teachers=taught)
