"""A reward model from comparisons in files: one stage."""

from typing import Literal

from ...data.conversations import Files
from ...data.preferences import Rankings
from ...train.compute import Compute
from ...train.losses.reward import LARGE_MARGINS, SMALL_MARGINS
from ...train.optimizer import AdamW
from ...train.reward import Pointwise, Ranked, Reward
from ..recipe import Run

MARGINS = {"none": None, "small": SMALL_MARGINS, "large": LARGE_MARGINS}


def recipe(
    run: Run,
    *,
    model: str,
    data: tuple[str, ...] = (),
    demonstrations: tuple[str, ...] = (),
    pointwise: bool = False,
    answers: int = 2,
    margins: Literal["none", "small", "large"] = "none",
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 9e-6,
    row_tokens: int = 4096,
    micro_rows: int = 4,
) -> str:
    """Train a reward model.

    Args:
        run: trains (or plans) a stage and returns its folder.
        model: the model to start from; its head makes place for a scalar one.
        data: JSON Lines, Parquet or ArrayRecord files with prompt, chosen and rejected, or prompt, responses and
            scores; a plan needs none.
        demonstrations: files of conversations whose answers are to have the mean score 0.
        pointwise: learn each answer's score, in [0, 1], by itself, and no ranking.
        answers: the most answers to a prompt.
        margins: Llama 2's tables of how far apart the answers of a rated pair must be.
        steps: updates.
        batch_size: prompts per update.
        learning_rate: at the peak of a cosine schedule.
        row_tokens: length of a packed row; a prompt and all answers to it must fit.
        micro_rows: rows that go through the model at a time, at least one per device.
    """
    stage = Reward(
        start=model,
        data=Rankings(paths=data),
        objective=Pointwise() if pointwise else Ranked(answers=answers, margins=MARGINS[margins]),
        demonstrations=Files(paths=demonstrations) if demonstrations else None,
        steps=steps,
        batch_size=batch_size,
        optimizer=AdamW(learning_rate=learning_rate, schedule="cosine", final=0.1, warmup_steps=steps // 20),
        compute=Compute(row_tokens=row_tokens, micro_rows=micro_rows, remat="full", save_every=100),
    )
    return run("reward", stage)
