"""Learning of one model from preferences in files (DPO, IPO, KTO, ORPO, SimPO): one stage."""

from typing import Literal

from ...data.preferences import Rankings
from ...train.compute import Compute
from ...train.optimizer import AdamW
from ...train.prefer import DPO, IPO, KTO, ORPO, LengthNormalizedDPO, Prefer, SimPO
from ..recipe import Run

OBJECTIVES = {
    "dpo": DPO(),
    "dpo-nll": DPO(nll=0.2),
    "dpo-norm": LengthNormalizedDPO(),
    "ipo": IPO(),
    "kto": KTO(),
    "orpo": ORPO(),
    "simpo": SimPO(),
}


def recipe(
    run: Run,
    *,
    model: str,
    data: tuple[str, ...] = (),
    objective: Literal["dpo", "dpo-nll", "dpo-norm", "ipo", "kto", "orpo", "simpo"] = "dpo",
    steps: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 5e-7,
    row_tokens: int = 4096,
    micro_rows: int = 4,
) -> str:
    """Train a model on preferences.

    Args:
        run: trains (or plans) a stage and returns its folder.
        model: the model to start from, which is the reference, too.
        data: JSON Lines, Parquet or ArrayRecord files with prompt, chosen and rejected, or prompt, completion and
            label (for kto); a plan needs none.
        objective: dpo-nll is Llama 3's (NLL weight 0.2), dpo-norm the length-normalised one of Tulu 3.
        steps: updates.
        batch_size: pairs (for kto: answers) per update.
        learning_rate: at the peak; a tenth of the steps warm up, then it falls in a straight line.
        row_tokens: length of a packed row; a prompt and both answers must fit.
        micro_rows: rows that go through the model at a time, at least one per device.
    """
    stage = Prefer(
        start=model,
        data=Rankings(paths=data),
        objective=OBJECTIVES[objective],
        steps=steps,
        batch_size=batch_size,
        optimizer=AdamW(learning_rate=learning_rate, schedule="linear", warmup_steps=steps // 10, b2=0.999),
        compute=Compute(row_tokens=row_tokens, micro_rows=micro_rows, remat="full", save_every=100),
    )
    return run("prefer", stage)
