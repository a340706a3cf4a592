"""What the recipes that generate their data (`olmo3`, `deepseek_v32`, `rejection`) share: sizes for each base model,
and the filters that every answer has to pass.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...data.filters import contamination, outcome, repetition
from ...data.filters.funnel import Filter
from ...data.task import TaskSource
from ...data.tasks import Mixture
from ...model.config import PUBLISHED
from ...model.processing import Sampling
from ...train.optimizer import AdamW
from ...train.prefer import DPO
from ...train.rl import RL
from ...train.sft import SFT
from . import mopd_scales
from .mopd_scales import LARGE_COMPUTE, LARGE_SAMPLING, SMOLLM2_COMPUTE, TINY_COMPUTE


def sound(held_out: tuple[TaskSource, ...]) -> tuple[Filter, ...]:
    """What any answer to learn from has to pass, in this order; recipes add their own, and a choice, behind it."""
    return (
        outcome.Finished(),
        outcome.Verified(),
        repetition.RepeatedSentences(),
        repetition.RepeatedParagraphs(),
        repetition.RepeatedPhrases(),
        contamination.Decontaminated(evaluations=held_out),
    )


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Keyword arguments of the stages.

    `start` makes the starting model from the prompts, if needed, and `teacher` a stronger one from (start, prompts);
    `keep` rows of a prompt are kept; `high` and `low` are the optimizers of the two SFTs.
    """

    domains: tuple[TaskSource, ...]
    teacher: Callable[[str, Sequence[TaskSource]], SFT | RL]
    generate: Mapping[str, Any]
    sft: Mapping[str, Any]
    high: AdamW
    low: AdamW
    evaluate: Mapping[str, Any]
    rl: Mapping[str, Any]
    mixed_rl: Mapping[str, Any]
    prefer: Mapping[str, Any]
    keep: int = 2
    mixture: int = 4096
    start: Callable[[Sequence[TaskSource]], SFT] | None = None


def _mixed(tasks: Sequence[TaskSource]) -> Mixture:
    return Mixture(sources=tuple(tasks), weights=(1.0,) * len(tasks), size=4096)


def _tiny_teacher(start: str, tasks: Sequence[TaskSource]) -> SFT:
    """On the start's road, further on."""
    assert mopd_scales.TINY.start is not None
    return dataclasses.replace(mopd_scales.TINY.start(tasks), start=start, steps=70)


TINY = Scale(
    domains=mopd_scales.TINY.domains,
    start=mopd_scales.TINY.start,
    teacher=_tiny_teacher,
    generate={"sampling": Sampling(max_tokens=8), "samples": 8, "compute": TINY_COMPUTE},
    sft={"steps": 30, "batch_size": 24, "compute": dataclasses.replace(TINY_COMPUTE, micro_rows=3)},
    high=AdamW(learning_rate=1e-3, warmup_steps=5, schedule="linear"),
    low=AdamW(learning_rate=3e-4, warmup_steps=5, schedule="linear"),
    evaluate=mopd_scales.TINY.evaluate,
    rl=mopd_scales.TINY_RL,
    mixed_rl={**mopd_scales.TINY_RL, "optimizer": AdamW(learning_rate=4e-4)},
    prefer={
        "steps": 20,
        "batch_size": 16,
        "objective": DPO(nll=0.2),
        "optimizer": AdamW(learning_rate=1e-4, schedule="linear", warmup_steps=2),
        "compute": TINY_COMPUTE,
    },
)


def _smollm2_teacher(start: str, tasks: Sequence[TaskSource]) -> RL:
    return RL(start=start, tasks=_mixed(tasks), **{**mopd_scales.SMOLLM2_RL, "steps": 24})


SMOLLM2 = Scale(
    domains=mopd_scales.SMOLLM2.domains,
    teacher=_smollm2_teacher,
    generate={
        "sampling": Sampling(max_tokens=16, temperature=0.7),
        "samples": 4,
        "limit": 60,
        "compute": SMOLLM2_COMPUTE,
    },
    sft={"steps": 40, "batch_size": 8, "compute": SMOLLM2_COMPUTE},
    high=AdamW(learning_rate=3e-5, warmup_steps=2, schedule="linear"),
    low=AdamW(learning_rate=1e-5, warmup_steps=2, schedule="linear"),
    evaluate=mopd_scales.SMOLLM2.evaluate,
    rl=mopd_scales.SMOLLM2_RL,
    mixed_rl={**mopd_scales.SMOLLM2_RL, "steps": 16},
    prefer={
        "steps": 10,
        "batch_size": 8,
        "objective": DPO(nll=0.2),
        "optimizer": AdamW(learning_rate=3e-6, schedule="linear", warmup_steps=1),
        "compute": SMOLLM2_COMPUTE,
    },
)


def _large_teacher(start: str, tasks: Sequence[TaskSource]) -> RL:
    return RL(start=start, tasks=_mixed(tasks), **mopd_scales.LARGE.rl)


LARGE = Scale(
    domains=mopd_scales.LARGE.domains,
    teacher=_large_teacher,
    generate={"sampling": LARGE_SAMPLING, "samples": 16, "block": 4096, "compute": LARGE_COMPUTE},
    sft={"steps": 2000, "batch_size": 256, "compute": LARGE_COMPUTE},
    high=AdamW(learning_rate=1e-4, warmup_steps=60, schedule="linear"),
    low=AdamW(learning_rate=5e-5, warmup_steps=60, schedule="linear"),
    evaluate=mopd_scales.LARGE.evaluate,
    rl=mopd_scales.LARGE.rl,
    mixed_rl=mopd_scales.LARGE.rl,
    prefer={"steps": 500, "batch_size": 128, "objective": DPO(nll=0.2), "compute": LARGE_COMPUTE},
    mixture=100_000,
)
"""For a pod, with the learning rates of the paper's 32B model; the published shapes are planned with it."""
SCALES = {"smollm2": SMOLLM2, "tiny": TINY, **dict.fromkeys(PUBLISHED, LARGE)}
