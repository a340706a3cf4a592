"""Rewards of generated rows: what scores rollouts in RL (reward models, a judge) also chooses among rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from ..data import chat
from ..data.row import Row
from ..data.task import Task, Verdict
from ..data.tokenizer import Tokenizer
from ..sharding import mesh as meshes
from . import checkpoint
from .checkpoint import Model
from .compute import Compute
from .rewards import RewardSource
from .rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Rewarded:
    """A `curate.Scorer`: the rewards that `source` gives, read in the tokens of the model `tokenizer`.

    Rows of other teachers are tokenised anew, in the chat template of that model; a judge has to name its model.
    """

    source: RewardSource
    tokenizer: str
    compute: Compute = field(default_factory=Compute)

    def __call__(self, rows: Sequence[Row], mesh: jax.sharding.Mesh | None, /) -> list[float]:
        """One reward a row, in their order."""
        mesh = mesh or meshes.make_mesh()
        tokenizer = checkpoint.open_tokenizer(self.tokenizer)
        score = self.source.open(tokenizer, self.compute, mesh)
        config = checkpoint.open_config(self.tokenizer)
        rewards = score(Model(config, None, tokenizer), [[_rollout(tokenizer, row)] for row in rows])
        return [float(value) for value in rewards]


def _rollout(tokenizer: Tokenizer, row: Row) -> Rollout:
    """The row as if its answer had been sampled in these tokens."""
    tools = row.tools or None
    prompt = chat.render(tokenizer, row.prompt, add_generation_prompt=True, tools=tools)
    tokens, mask = chat.render_with_mask(tokenizer, (*row.prompt, *row.response), tools=tools)
    end = int(np.flatnonzero(mask)[-1]) + 1
    answer = np.asarray(tokens[len(prompt) : end], np.int32)
    task = Task(id=row.prompt_id, domain=row.domain, messages=row.prompt, verifier=_as_it_was)
    return Rollout(
        task=task,
        prompt=prompt,
        tokens=answer,
        logp=np.zeros(len(answer), np.float32),
        reward=row.score or 0.0,
        reason=row.reason,
        finish=row.finish,
        version=0,
    )


def _as_it_was(task: Task, response: str) -> Verdict:
    raise ValueError(f"the rows of task {task.id} were judged when they were generated")
