"""Supervised fine-tuning: raise the log-probability of the assistant's tokens in given conversations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import optax

from ..data import chat
from ..data.batch import Batch
from ..data.chat import Conversation, WithTools
from ..data.conversations import Conversations
from ..data.pack import Example, pack
from ..data.shuffle import Shuffled
from ..data.tokenizer import Tokenizer
from ..model import transformer
from ..model.config import ModelConfig
from ..sharding import hosts
from ..sharding import mesh as meshes
from . import checkpoint, loop, programs
from .compute import Compute
from .losses import masked, supervised
from .metrics import Log
from .optimizer import AdamW, Optimizer
from .step import Loss, State, make_train_step
from .updater import Updater, micro_batches
from .validation import Validation, validating


def loss(config: ModelConfig) -> Loss:
    """Cross-entropy of the masked targets: `loss(params, batch) -> (sum, weight, metrics)`."""

    def compute(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        hidden, _ = transformer.apply(
            config, params, batch["tokens"], positions=batch["positions"], segments=batch["segments"]
        )
        logp = transformer.token_logp(config, params, hidden, batch["targets"])
        return masked.sum(supervised.nll(logp), batch["mask"]), masked.weight(batch["mask"]), {}

    return compute


def train_step(config: ModelConfig, optimizer: optax.GradientTransformation, *, accumulate: int = 1) -> Callable:
    """`step(state, batch) -> (state, metrics)`, pure; the batch holds tokens, targets, mask, segments, positions."""
    return make_train_step(loss(config), optimizer, accumulate=accumulate)


def batch(tokenizer: Tokenizer, conversations: Sequence[Conversation], *, length: int) -> Batch:
    """Conversations rendered, masked to the assistant's turns, and packed into rows of `length` tokens.

    Raises:
        ValueError: for a conversation longer than a row, or one in which the assistant says nothing.
    """
    return pack([example(tokenizer, one, length=length) for one in conversations], length=length).batch


def example(tokenizer: Tokenizer, conversation: Conversation, *, length: int) -> Example:
    """A conversation rendered and masked; for errors see `batch`."""
    messages, tools = conversation if isinstance(conversation, WithTools) else (conversation, None)
    tokens, mask = chat.render_with_mask(tokenizer, messages, tools=tools)
    if len(tokens) > length:
        raise ValueError(
            f"a conversation has {len(tokens)} tokens and a row {length}: raise row_tokens or leave it out; "
            f"it begins {str(messages[0]['content'])[:60]!r}"
        )
    return Example(tokens=tokens, mask=mask)


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Fine-tune `start` on conversations, `batch_size` of them a step."""

    start: str
    data: Conversations
    steps: int
    batch_size: int = 32
    optimizer: Optimizer = field(default_factory=lambda: AdamW(learning_rate=1e-5, schedule="cosine", final=0.1))
    compute: Compute = field(default_factory=Compute)
    validation: Validation | None = None
    verifiers: int = 1
    seed: int = 0

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Run to the end, from the newest checkpoint in `out`; the model is then in `out`/model."""
        mesh = mesh or meshes.make_mesh()
        config = self.compute.configure(checkpoint.open_config(self.start))
        tokenizer = checkpoint.open_tokenizer(self.start)
        conversations = Shuffled(self.data.open(), seed=self.seed)
        optimizer = self.optimizer.build(self.steps)
        updater = Updater(loss(config), optimizer, mesh)

        def iterate(state: State, cursor: loop.Cursor, log: Log) -> tuple[State, loop.Cursor, Any]:
            first, length = cursor["iteration"] * self.batch_size, self.compute.row_tokens
            with log.phase("data"):
                mine = hosts.share(range(first, first + self.batch_size))  # each host renders its part
                rendered = [example(tokenizer, conversations[index], length=length) for index in mine]
            with log.phase("sync"):
                rendered = hosts.together([[list(one.tokens), list(one.mask)] for one in rendered])
            with log.phase("data"):
                rows = pack([Example(tokens=tokens, mask=mask) for tokens, mask in rendered], length=length).batch
            with log.phase("train"):
                state, metrics = updater.step(state, micro_batches(rows, self.compute.rows(mesh), mesh))
            return state, cursor, metrics

        with validating(self, out, mesh) as validate:
            loop.run(
                out,
                start=self.start,
                steps=self.steps,
                optimizer=optimizer,
                compute=self.compute,
                mesh=mesh,
                iterate=iterate,
                validate=validate,
            )

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """The compiled programs of this stage; every conversation fills a row."""
        config = self.compute.configure(checkpoint.open_config(self.start))
        optimizer, batch = self.optimizer.build(self.steps), programs.abstract_batch(self.compute, mesh)
        tokens = self.batch_size * self.compute.row_tokens
        named = programs.training(loss(config), config, optimizer, batch, mesh, updates=self.steps, tokens=tokens)
        if self.validation:
            beside = named["gradients"].resident
            named |= self.validation.programs(config, self.compute, mesh, steps=self.steps, resident=beside)
        return named

    def result(self) -> ModelConfig:
        """The shape of the model that the stage makes."""
        return checkpoint.open_config(self.start)
