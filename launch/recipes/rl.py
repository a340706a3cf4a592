"""Reinforcement learning of one model on tasks with verifiers: one stage, then its score on held-out tasks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from ...data.tasks import parts
from ...model.processing import Sampling
from ...train import objective as objectives
from ...train.compute import Compute
from ...train.evaluate import Evaluate
from ...train.optimizer import AdamW
from ...train.rl import RL
from ..comparison import Comparison, Entry
from ..recipe import Run
from ..tasks import source

OBJECTIVES: dict[str, Callable[[int], objectives.Objective]] = {
    "olmo": lambda _: objectives.olmo(),
    "grpo": lambda _: objectives.grpo(),
    "dr_grpo": lambda limit: objectives.dr_grpo(budget=limit),
    "dapo": lambda limit: objectives.dapo(limit=limit, buffer=max(1, limit // 5)),
    "gspo": lambda _: objectives.gspo(),
    "cispo": lambda _: objectives.cispo(),
    "rloo": lambda _: objectives.rloo(),
    "reinforce_plus_plus": lambda _: objectives.reinforce_plus_plus(),
    "deepseek_v32": lambda _: objectives.deepseek_v32(),
}
"""Published objectives, given the longest answer in tokens."""


def recipe(
    run: Run,
    *,
    model: str,
    tasks: str = "arithmetic",
    objective: Literal[
        "olmo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_plus_plus", "deepseek_v32"
    ] = "olmo",
    keep_routing: bool = False,
    steps: int = 100,
    prompts: int = 64,
    group: int = 8,
    learning_rate: float = 1e-6,
    max_tokens: int = 1024,
    row_tokens: int = 4096,
    micro_rows: int = 4,
    slots: int = 512,
) -> Comparison:
    """Train a model on tasks by RL, and score it before and after.

    Args:
        run: trains (or plans) a stage and returns its folder.
        model: the model to start from.
        tasks: what to train on, as `posttrain eval` names tasks; 30% are held out.
        objective: what is minimised, as it was published (see `train/objective.py`).
        keep_routing: whether tokens of a mixture of experts go to the experts that the sampler chose (router replay).
        steps: updates.
        prompts: tasks per update.
        group: answers per task.
        learning_rate: constant.
        max_tokens: longest answer.
        row_tokens: length of a packed row.
        micro_rows: rows that go through the model at a time, at least one per device.
        slots: answers generated at a time.
    """
    compute = Compute(row_tokens=row_tokens, micro_rows=micro_rows, slots=slots, remat="full")
    (train,), held_out = parts(source(tasks))
    stage = RL(
        start=model,
        tasks=train,
        steps=steps,
        sampling=Sampling(max_tokens=max_tokens),
        prompts=prompts,
        group=group,
        objective=replace(OBJECTIVES[objective](max_tokens), keep_routing=keep_routing),
        optimizer=AdamW(learning_rate=learning_rate),
        compute=compute,
    )
    greedy = Sampling(max_tokens=max_tokens, temperature=0.0)

    def score(name: str, of: str) -> str:
        return run(f"eval-{name}", Evaluate(model=of, tasks=held_out, sampling=greedy, limit=slots, compute=compute))

    entries = [Entry("start", score("start", model), ())]
    trained = run("rl", stage)
    entries.append(Entry("rl", score("rl", trained), (trained,)))
    return Comparison(title=f"RL of {model} on {tasks}", entries=tuple(entries), teachers={train.domain: "rl"})
