"""Reward models: a language model with a scalar head in its own head's place, trained on comparisons of answers.

The score of an answer is the head's output at the last of its tokens, the end of its turn. The answers to a prompt
share a packed row with it: the prompt is computed once, and all pairs of answers count in the same step.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..data import chat, preferences
from ..data.batch import Batch
from ..data.conversations import Demonstrations, Files
from ..data.pack import Example, Group, pack_groups
from ..data.preferences import Blended, Paired, Ranking, Rankings
from ..data.shuffle import Shuffled
from ..data.tokenizer import Tokenizer
from ..model import transformer
from ..model.config import ModelConfig
from ..sharding import mesh as meshes
from . import checkpoint, loop, programs, score, state
from .compute import Compute
from .losses import masked, reward
from .losses.reward import Margins
from .metrics import Log
from .optimizer import AdamW, Optimizer
from .step import Loss, State, make_train_step
from .updater import Updater, micro_batches
from .validation import Agreement

FIELDS = ("rank", "share", "margin", "safe")
UNLABELLED = -1.0  # in the field `safe`


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Bradley-Terry on every pair of a prompt's answers that are not tied; a mean over pairs, then over prompts.

    InstructGPT, https://arxiv.org/abs/2203.02155, eq. 1. `answers` is the most that a prompt has. With `margins` the
    scores of a pair must be apart by what its rating says (`losses.reward.SMALL_MARGINS`), and `safety` adds that times
    the classification loss of answers that are labelled safe or not: Llama 2, https://arxiv.org/abs/2307.09288. Where
    labellers score in [0, 1] and rate nothing, `margin_of_gap` times the difference of their scores is the margin: 1
    and 3 make the straight lines on which Llama 2's small and large margins lie.
    """

    answers: int = 2
    margins: Margins | None = None
    safety: float = 0.0
    margin_of_gap: float = 0.0

    def __post_init__(self) -> None:
        if self.answers < 2:
            raise ValueError(f"answers is {self.answers}: a comparison needs at least two")

    def loss(self, config: ModelConfig) -> Loss:
        """`loss(params, batch) -> (sum, weight, metrics)`; every prompt counts the same."""

        def compute(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
            scores = _scores(config, params, batch)
            sums = [self._pairs(scores, batch, distance) for distance in range(1, self.answers)]
            total, weight, metrics = jax.tree.map(lambda *x: jnp.sum(jnp.stack(x)), *sums)
            return total, weight, metrics

        return compute

    def _pairs(self, scores: jax.Array, batch: Any, distance: int) -> tuple[Any, ...]:
        """The pairs of each answer with the one `distance` branches further."""
        mask, segments, rank, safe = batch["mask"], batch["segments"], batch["rank"], batch["safe"]

        def other(values: jax.Array) -> jax.Array:
            return masked.sum_of_segment(values, mask, segments, wanted=segments + distance)

        theirs, their_rank, their_safe = other(scores), other(rank), other(safe)
        weights = mask * other(mask) * (rank != their_rank) * batch["share"]
        ours_better = rank > their_rank
        better, worse = jnp.where(ours_better, scores, theirs), jnp.where(ours_better, theirs, scores)
        margin = batch["margin"] + self.margin_of_gap * jnp.abs(rank - their_rank)
        value = reward.bradley_terry(better, worse, margin)
        if self.safety:
            labels = jnp.where(ours_better, safe, their_safe), jnp.where(ours_better, their_safe, safe)
            both = {"chosen_is_safe": labels[0], "rejected_is_safe": labels[1]}
            labelled = (safe != UNLABELLED) & (their_safe != UNLABELLED)
            value += jnp.where(labelled, self.safety * reward.safety_auxiliary(better, worse, **both), 0.0)
        accuracy = (better > worse).astype(jnp.float32)
        metrics = {"accuracy": masked.sum(accuracy, weights), "margin": masked.sum(better - worse, weights)}
        return masked.sum(value, weights), masked.weight(weights), metrics

    def fields(self, one: Ranking) -> dict[str, list[float]]:
        """What the batch holds of each answer to a prompt."""
        count = len(one.answers)
        if count > self.answers:
            raise ValueError(f"a prompt has {count} answers and answers is {self.answers}: raise it")
        pairs = sum(a != b for i, a in enumerate(one.scores) for b in one.scores[:i])
        if not pairs:
            raise ValueError(f"the scores {list(one.scores)} rank no answer above another: leave this prompt out")
        return {
            "rank": list(one.scores),
            "share": [1 / pairs] * count,
            "margin": [self._margin(one)] * count,
            "safe": list(one.safe or [UNLABELLED] * count),
        }

    def _margin(self, one: Ranking) -> float:
        if self.margins is None or not one.rating:
            return one.margin
        return self.margins._asdict()[one.rating.replace(" ", "_")]


@dataclass(frozen=True, kw_only=True)
class Pointwise:
    """Each answer by itself, with its score in [0, 1] as the label of sigma(score): safe or unsafe, right or wrong.

    The safety reward model of DeepSeek-R1, https://arxiv.org/abs/2501.12948, section 3.1.
    """

    def loss(self, config: ModelConfig) -> Loss:
        """`loss(params, batch) -> (sum, weight, metrics)`; every answer counts the same."""

        def compute(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
            scores, mask = _scores(config, params, batch), batch["mask"]
            right = ((scores > 0) == (batch["rank"] > 0.5)).astype(jnp.float32)
            metrics = {"accuracy": masked.sum(right, mask), "score": masked.sum(scores, mask)}
            return masked.sum(reward.pointwise(scores, batch["rank"]), mask), masked.weight(mask), metrics

        return compute

    def fields(self, one: Ranking) -> dict[str, list[float]]:
        """What the batch holds of each answer to a prompt."""
        if not all(0 <= label <= 1 for label in one.scores):
            raise ValueError(f"the labels {list(one.scores)} are not all in [0, 1], as a pointwise reward model needs")
        count = len(one.answers)
        nothing = {name: [0.0] * count for name in FIELDS}
        return {**nothing, "rank": list(one.scores)}


Objective = Ranked | Pointwise


def _scores(config: ModelConfig, params: Any, batch: Any) -> jax.Array:
    hidden, _ = transformer.apply(
        config, params, batch["tokens"], positions=batch["positions"], segments=batch["segments"]
    )
    return transformer.score(config, params, hidden)


def train_step(
    config: ModelConfig, optimizer: optax.GradientTransformation, objective: Objective, *, accumulate: int = 1
) -> Callable:
    """`step(state, batch) -> (state, metrics)`, pure; for the batch see `batch`. The config's output is "score"."""
    return make_train_step(objective.loss(config), optimizer, accumulate=accumulate)


def batch(tokenizer: Tokenizer, rankings: Sequence[Ranking], objective: Objective, *, length: int) -> Batch:
    """Compared answers packed into rows of `length` tokens, those to a prompt in one row; the mask is 1 on their ends.

    Raises:
        ValueError: for answers that do not fit in a row with their prompt, or that the objective cannot learn from.
    """
    groups = [at_end(preferences.group(tokenizer, one, **objective.fields(one))) for one in rankings]
    for one in groups:
        preferences.check_fits(one, length)
    return pack_groups(groups, length=length, fields=FIELDS).batch


def at_end(group: Group) -> Group:
    """The group with a mask that is 1 at the position that reads an answer's last token, and 0 elsewhere.

    A batch's positions predict: the one that reads the last token predicts what would come after it, so that a token
    is added there, which nothing reads.
    """

    def one(answer: Example) -> Example:
        size = len(answer.tokens)
        return dataclasses.replace(answer, tokens=[*answer.tokens, 0], mask=[0.0] * size + [1.0])

    return Group(prompt=group.prompt, answers=[one(answer) for answer in group.answers])


def scores(
    model: tuple[ModelConfig, Any], groups: Sequence[Group], compute: Compute, mesh: jax.sharding.Mesh
) -> np.ndarray:
    """A reward model's score of every answer [N], group by group; the answers as they are, ended or cut off."""
    packed = pack_groups([at_end(one) for one in groups], length=compute.row_tokens)
    found = score.examples(lambda micro: score.values(*model, micro), packed, compute, mesh)
    return np.asarray([values[-1] for values in found], np.float32)


def open_scoring(path: str, mesh: jax.sharding.Mesh, *, seed: int = 0) -> checkpoint.Model:
    """The reward model at `path`, or a language model's with a new scalar head."""
    model = checkpoint.open_model(path, mesh)
    if model.config.output == "score":
        return model
    config = model.config.replace(output="score")
    where = transformer.shardings(config, mesh)
    make = jax.jit(
        lambda params: transformer.with_score(model.config, params, jax.random.key(seed))[1], out_shardings=where
    )
    return model._replace(config=config, params=make(model.params))


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Train a reward model from `start`, a language model or a reward model, `batch_size` prompts a step.

    With `demonstrations`, scores are shifted in the end so that those (the first `limit`) have mean 0: the ranking loss
    leaves the constant free, and it decides what PPO makes of an answer that is cut off.
    """

    start: str
    data: Rankings | Paired | Blended
    steps: int
    objective: Objective = field(default_factory=Ranked)
    demonstrations: Files | Demonstrations | None = None
    limit: int = 512
    batch_size: int = 32
    optimizer: Optimizer = field(default_factory=lambda: AdamW(learning_rate=9e-6, schedule="cosine", final=0.1))
    compute: Compute = field(default_factory=Compute)
    validation: Agreement | None = None
    seed: int = 0

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Run to the end, from the newest checkpoint in `out`; the model is then in `out`/model."""
        mesh = mesh or meshes.make_mesh()
        config = self.compute.configure(self.result())
        tokenizer = checkpoint.open_tokenizer(self.start)
        order = Shuffled(self.data.open(), seed=self.seed)
        optimizer = self.optimizer.build(self.steps)
        updater = Updater(self.objective.loss(config), optimizer, mesh)

        def iterate(now: State, cursor: loop.Cursor, log: Log) -> tuple[State, loop.Cursor, Any]:
            first = cursor["iteration"] * self.batch_size
            with log.phase("data"):
                chosen = [order[first + i] for i in range(self.batch_size)]
                rows = batch(tokenizer, chosen, self.objective, length=self.compute.row_tokens)
            with log.phase("train"):
                now, metrics = updater.step(now, micro_batches(rows, self.compute.rows(mesh), mesh))
            return now, cursor, metrics

        def store(out: Path, now: State) -> None:
            params = self._normalized(config, now.params, tokenizer, mesh)
            checkpoint.save_model(out / "model", checkpoint.Model(self.result(), params, tokenizer))

        trained = loop.Trained(
            create=lambda: state.create(open_scoring(self.start, mesh, seed=self.seed).params, optimizer, mesh),
            abstract=lambda: state.abstract(config, optimizer, mesh),
            store=store,
        )
        validate = self.validation and self.validation.start(
            out, tokenizer, lambda params, groups: scores((config, params), groups, self.compute, mesh), store
        )
        with jax.set_mesh(mesh):
            loop.train(out, trained, steps=self.steps, compute=self.compute, iterate=iterate, validate=validate)

    def _normalized(self, config: ModelConfig, params: Any, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Any:
        """The parameters with a bias that gives the demonstrations the mean score 0 (InstructGPT, section 3.5)."""
        if self.demonstrations is None:
            return params
        shown = self.demonstrations.open()
        conversations = [chat.messages_of(shown[i]) for i in range(min(self.limit, len(shown)))]
        rankings = [Ranking(one[:-1], (one[-1:],), (1.0,)) for one in conversations]
        groups = [preferences.group(tokenizer, one) for one in rankings]
        mean = np.mean(scores((config, params), groups, self.compute, mesh), dtype=np.float64)
        bias = params["score_bias"]
        return {**params, "score_bias": jax.device_put(bias - jnp.float32(mean), bias.sharding)}

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """The compiled programs of this stage; the answers to every prompt fill a row."""
        config = self.compute.configure(self.result())
        optimizer, loss = self.optimizer.build(self.steps), self.objective.loss(config)
        batch = programs.abstract_batch(self.compute, mesh, dict.fromkeys(FIELDS, ()))
        tokens = self.batch_size * self.compute.row_tokens
        named = programs.training(loss, config, optimizer, batch, mesh, updates=self.steps, tokens=tokens)
        prompts = self.limit if self.demonstrations is not None else 0
        if self.validation:
            prompts += self.validation.limit * self.validation.times(self.steps)
        if prompts:
            plain = programs.abstract_batch(self.compute, mesh)
            named["score"] = programs.Program(
                function=score.values,
                static=(config,),
                arguments=(state.abstract_params(config, mesh), plain),
                calls=-(-prompts // self.compute.rows(mesh)),
                tokens=plain["tokens"].size,
            )
        return named

    def result(self) -> ModelConfig:
        """The shape of the model that the stage makes."""
        return checkpoint.open_config(self.start).replace(output="score")
