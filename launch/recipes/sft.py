"""Supervised fine-tuning of one model on files of conversations: one stage."""

from ...data.conversations import Files
from ...train.compute import Compute
from ...train.optimizer import AdamW
from ...train.sft import SFT
from ..recipe import Run


def recipe(
    run: Run,
    *,
    model: str,
    data: tuple[str, ...] = (),
    steps: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 1e-5,
    row_tokens: int = 4096,
    micro_rows: int = 4,
) -> str:
    """Fine-tune a model on conversations.

    Args:
        run: trains (or plans) a stage and returns its folder.
        model: the model to start from.
        data: JSON Lines, Parquet or ArrayRecord files of conversations; a plan needs none.
        steps: updates.
        batch_size: conversations per update.
        learning_rate: at the peak of a cosine schedule.
        row_tokens: length of a packed row.
        micro_rows: rows that go through the model at a time, at least one per device.
    """
    stage = SFT(
        start=model,
        data=Files(paths=data),
        steps=steps,
        batch_size=batch_size,
        optimizer=AdamW(learning_rate=learning_rate, schedule="cosine", final=0.1, warmup_steps=steps // 20),
        compute=Compute(row_tokens=row_tokens, micro_rows=micro_rows, remat="full", save_every=100),
    )
    return run("sft", stage)
