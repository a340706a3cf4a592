"""Reinforcement learning from human feedback: demonstrations, a reward model from comparisons, PPO with pretraining.

After InstructGPT (https://arxiv.org/abs/2203.02155, figure 2):

    step 1   base --SFT on demonstrations--> sft
    step 2   sft --K answers to a prompt, ranked--> comparisons;  sft --K-wise ranking loss--> reward model
    step 3   sft --PPO from the reward model--> ppo;  the same with pretraining mixed in --> ppo-ptx

The labeller who ranks is a verifier, so the reward model's opinion can be held against the truth. Prompts of the first
domain are what the labeller compares and PPO trains on; demonstrations are of all domains, and stand for pretraining,
too: what PPO forgets of the others is what ptx is for. Every model is evaluated on held-out tasks of all domains.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...data.arithmetic import Arithmetic
from ...data.characters import Characters, CloseText
from ...data.conversations import Demonstrations
from ...data.instruction_tasks import Instructions
from ...data.preferences import Rankings
from ...data.task import TaskSource
from ...data.tasks import Mixture, Split
from ...model.config import PUBLISHED
from ...model.processing import Sampling
from ...train.compare import RANKINGS, Compare
from ...train.compute import Compute
from ...train.evaluate import Evaluate
from ...train.optimizer import AdamW
from ...train.ppo import PPO, Objective, Ptx
from ...train.reward import Ranked, Reward
from ...train.rewards import RewardModels
from ...train.sft import SFT
from ..comparison import Comparison, Entry
from ..recipe import Run

HELD_OUT = 0.3
K = 9  # the most answers to a prompt that are ranked; the paper has 4 to 9


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Keyword arguments of the stages; `labelled` are the first domain's tasks with a verdict that ranks answers."""

    domains: tuple[TaskSource, ...]
    labelled: TaskSource
    sft: Mapping[str, Any]
    compare: Mapping[str, Any]
    reward: Mapping[str, Any]
    ppo: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    ptx: Mapping[str, Any] = field(default_factory=dict)
    demonstrations: int = 4096


TINY_COMPUTE = Compute(row_tokens=208, micro_rows=2, slots=128, save_every=50)
TINY = Scale(
    domains=(Characters(operation="reverse"), Characters(operation="copy")),
    labelled=Characters(operation="reverse", verifier=CloseText()),
    sft={
        "steps": 260,
        "batch_size": 24,
        "optimizer": AdamW(learning_rate=2e-3, warmup_steps=10),
        "compute": dataclasses.replace(TINY_COMPUTE, micro_rows=3),
    },
    compare={"limit": 360, "sampling": Sampling(max_tokens=8), "compute": TINY_COMPUTE},
    reward={
        "steps": 60,
        "batch_size": 24,
        "optimizer": AdamW(learning_rate=1e-3, schedule="cosine", final=0.1, warmup_steps=5),
        "compute": TINY_COMPUTE,
    },
    ppo={
        "steps": 30,
        "prompts": 64,
        "group": 2,
        "minibatches": 2,
        "sampling": Sampling(max_tokens=8),
        "optimizer": AdamW(learning_rate=6e-4, warmup_steps=3),
        "critic_optimizer": AdamW(learning_rate=1e-3, warmup_steps=3),
        "compute": TINY_COMPUTE,
    },
    ptx={"coefficient": 1.0, "batch_size": 24},
    evaluate={"limit": 128, "sampling": Sampling(max_tokens=8, temperature=0.0), "compute": TINY_COMPUTE},
)
LARGE_COMPUTE = Compute(row_tokens=4096, micro_rows=64, slots=512, remat="full", save_every=20)
LARGE = Scale(
    domains=(Instructions(), Arithmetic(digits=3, operations=("+", "-", "*"))),
    labelled=Instructions(),
    sft={"steps": 1000, "batch_size": 512, "optimizer": AdamW(learning_rate=9.65e-6), "compute": LARGE_COMPUTE},
    compare={"limit": 32_768, "sampling": Sampling(max_tokens=1024), "compute": LARGE_COMPUTE},
    reward={"steps": 512, "batch_size": 64, "compute": LARGE_COMPUTE},
    ppo={"steps": 500, "prompts": 512, "sampling": Sampling(max_tokens=1024), "compute": LARGE_COMPUTE},
    ptx={"batch_size": 512},
    evaluate={"limit": 512, "sampling": Sampling(max_tokens=1024, temperature=0.0), "compute": LARGE_COMPUTE},
    demonstrations=100_000,
)
"""The paper's settings, for a pod; the published shapes are planned with it."""
SCALES = {"tiny": TINY, **dict.fromkeys(PUBLISHED, LARGE)}


def recipe(
    run: Run,
    *,
    base: Literal["tiny", "llama3.1-8b", "qwen2.5-32b", "llama3.1-70b"] = "tiny",
    kl_weight: float = 0.02,
) -> Comparison:
    """SFT, a reward model, PPO without and with pretraining mixed in, compared on held-out tasks.

    Args:
        run: trains (or plans) a stage and returns its folder.
        base: the model to start from; "tiny" is made on the spot and takes minutes; the large ones are
            shapes to plan with.
        kl_weight: what a token pays for leaving the SFT model, in nats of its log ratio.
    """
    scale = SCALES[base]
    train, held_out = (
        tuple(Split(source=source, part=part, fraction=HELD_OUT) for source in scale.domains)
        for part in ("train", "held_out")
    )
    mixed = Mixture(sources=train, weights=(1.0,) * len(train), size=scale.demonstrations)
    shown, prompts = Demonstrations(tasks=mixed), train[0]

    def score(name: str, model: str) -> str:
        return run(f"eval-{name}", Evaluate(model=model, tasks=held_out, **scale.evaluate))

    sft = run("sft", SFT(start=base, data=shown, **scale.sft))
    entries = [Entry("sft", score("sft", sft), ())]

    labelled = Split(source=scale.labelled, part="train", fraction=HELD_OUT)
    compared = run("comparisons", Compare(models=(sft,), tasks=labelled, samples=K, **scale.compare))
    ranked = Rankings(paths=(f"{compared}/{RANKINGS}",))
    judge = run(
        "reward",
        Reward(
            start=sft,
            data=ranked,
            objective=Ranked(answers=K),
            demonstrations=Demonstrations(tasks=prompts),
            **scale.reward,
        ),
    )
    for name, ptx in {"ppo": None, "ppo-ptx": Ptx(data=shown, **scale.ptx)}.items():
        policy = run(
            name,
            PPO(
                start=sft,
                tasks=prompts,
                rewards=RewardModels(models=(judge,)),
                objective=Objective(kl_weight=kl_weight),
                ptx=ptx,
                **scale.ppo,
            ),
        )
        entries.append(Entry(name, score(name, policy), (judge, policy)))
    return Comparison(title=f"InstructGPT from {base}", entries=tuple(entries), teachers={prompts.domain: "ppo"})
