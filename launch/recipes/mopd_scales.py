"""Sizes of the `mopd` recipe: which tasks, how many steps, which learning rates, for each base model."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...data.arithmetic import Arithmetic
from ...data.characters import Characters
from ...data.conversations import Demonstrations
from ...data.instruction_tasks import Instructions
from ...data.reasoning_gym import ReasoningGym
from ...data.task import TaskSource
from ...data.tasks import Mixture
from ...model.config import PUBLISHED
from ...model.processing import Sampling
from ...train import objective
from ...train.compute import Compute
from ...train.optimizer import AdamW
from ...train.sft import SFT


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Keyword arguments of the recipe's stages. `start` makes the starting model from the training tasks, if needed."""

    domains: tuple[TaskSource, ...]
    rl: Mapping[str, Any]
    distill: Mapping[str, Mapping[str, Any]]
    evaluate: Mapping[str, Any]
    ties: Mapping[str, Any] = field(default_factory=dict)
    mixture: int = 4096
    start: Callable[[Sequence[TaskSource]], SFT] | None = None


def _tiny_start(train: Sequence[TaskSource]) -> SFT:
    tasks = Mixture(sources=tuple(train), weights=(1.0,) * len(train), size=4096)
    return SFT(
        start="tiny",
        data=Demonstrations(tasks=tasks),
        steps=90,
        batch_size=24,
        optimizer=AdamW(learning_rate=2e-3, warmup_steps=10),
        compute=dataclasses.replace(TINY_COMPUTE, micro_rows=3),
    )


TINY_COMPUTE = Compute(row_tokens=208, micro_rows=2, slots=128, save_every=50)
TINY_RL = {
    "steps": 24,
    "prompts": 16,
    "group": 8,
    "objective": objective.olmo(rounds=1),
    "sampling": Sampling(max_tokens=8),
    "optimizer": AdamW(learning_rate=8e-4),
    "compute": TINY_COMPUTE,
}
TINY_DISTILL = {
    "steps": 32,
    "prompts": 16,
    "samples": 8,
    "sampling": Sampling(max_tokens=8),
    "optimizer": AdamW(learning_rate=6e-4, schedule="linear", warmup_steps=5),
    "compute": TINY_COMPUTE,
}
TINY = Scale(
    domains=tuple(Characters(operation=name) for name in ("reverse", "rotate", "double")),
    start=_tiny_start,
    rl=TINY_RL,
    distill={"full": TINY_DISTILL, "sampled": TINY_DISTILL},
    evaluate={"limit": 128, "sampling": Sampling(max_tokens=8, temperature=0.0), "compute": TINY_COMPUTE},
    ties={"density": 0.5},
)

SMOLLM2_COMPUTE = Compute(row_tokens=184, micro_rows=1, slots=40, save_every=10)
SMOLLM2_RL = {
    "steps": 8,
    "prompts": 5,
    "group": 8,
    "objective": objective.olmo(rounds=1),
    "sampling": Sampling(max_tokens=16, temperature=0.7),
    "optimizer": AdamW(learning_rate=1.5e-5),
    "compute": SMOLLM2_COMPUTE,
}
SMOLLM2_DISTILL = {
    "steps": 14,
    "prompts": 6,
    "samples": 4,
    "sampling": Sampling(max_tokens=16, temperature=0.7),
    "optimizer": AdamW(learning_rate=3e-5, schedule="linear"),
    "compute": dataclasses.replace(SMOLLM2_COMPUTE, row_tokens=216),
}
SMOLLM2 = Scale(
    domains=(
        Arithmetic(digits=1, operations=("+",)),
        Instructions(kinds=("words_at_least",)),
        ReasoningGym(name="gcd", size=300, system="Answer with a number.", config={"min_value": 2, "max_value": 20}),
    ),
    rl=SMOLLM2_RL,
    distill={"full": SMOLLM2_DISTILL, "sampled": SMOLLM2_DISTILL},
    evaluate={"limit": 40, "sampling": Sampling(max_tokens=16, temperature=0.0), "compute": SMOLLM2_COMPUTE},
)
LARGE_COMPUTE = Compute(row_tokens=4096, micro_rows=64, slots=512, remat="full", save_every=20)
LARGE_SAMPLING = Sampling(max_tokens=2048)
LARGE_DISTILL = {
    "steps": 100,
    "prompts": 512,
    "samples": 1,
    "sampling": LARGE_SAMPLING,
    "optimizer": AdamW(learning_rate=2e-6),
    "compute": LARGE_COMPUTE,
}
LARGE = Scale(
    domains=(
        Arithmetic(digits=3, operations=("+", "-", "*")),
        Instructions(),
        ReasoningGym(name="gcd", size=100_000, system="Answer with a number."),
    ),
    rl={
        "steps": 100,
        "prompts": 64,
        "group": 8,
        "sampling": LARGE_SAMPLING,
        "optimizer": AdamW(learning_rate=1e-6),
        "compute": LARGE_COMPUTE,
    },
    distill={"full": LARGE_DISTILL, "sampled": LARGE_DISTILL},
    evaluate={"limit": 512, "sampling": Sampling(max_tokens=2048, temperature=0.0), "compute": LARGE_COMPUTE},
    mixture=100_000,
)
"""For a pod; the published shapes are planned with it."""
SCALES = {"smollm2": SMOLLM2, "tiny": TINY, **dict.fromkeys(PUBLISHED, LARGE)}
