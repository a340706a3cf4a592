"""Answers that were compared: a prompt, some answers to it, and how good each was found to be.

Pairs, rankings of several answers and labels of single ones are all a `Ranking`, so that every objective reads them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import chat, columns, mixture, shards, source
from .pack import Example, Group
from .shuffle import Indexable
from .source import Record
from .task import Message
from .tokenizer import Tokenizer

RATINGS = ("significantly better", "better", "slightly better", "negligibly better")
"""How much better the chosen answer of a pair was found: Llama 2, https://arxiv.org/abs/2307.09288, section 3.2.1."""


class Ranking(NamedTuple):
    """A prompt [messages], K answers [messages each], and their K scores: a higher one is better, equal ones a tie.

    A pair is two answers with the scores 1 and 0, the chosen one first. `margin` and `rating` say how far apart a pair
    is, `safe` holds 1 or 0 for each answer; all three may be missing.
    """

    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    scores: tuple[float, ...]
    margin: float = 0.0
    rating: str = ""
    safe: tuple[float, ...] = ()


def ranking(record: Record) -> Ranking:
    """A record in one of the field's formats; prompts and answers are texts or lists of messages.

        {"prompt", "chosen", "rejected"}            a pair; may have "margin", "rating" (see `RATINGS`), and
                                                    "chosen_is_safe" with "rejected_is_safe"
        {"chosen", "rejected"}                      the same as two whole conversations that begin alike
        {"prompt", "responses", "scores"}           any number of answers
        {"prompt", "response" or "completion", "label"}  one answer, good (true, 1) or bad (false, 0)

    Raises ValueError that says what is missing.
    """
    if "chosen" in record or "rejected" in record:
        return _pair(record)
    if "responses" in record and "prompt" in record:
        answers, scores = record["responses"], record.get("scores")
        if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores) or not answers:
            raise ValueError(f"it has {scores!r:.60} as scores; give a list with one number for each of its responses")
        return Ranking(
            source.messages(record["prompt"], "user"),
            tuple(source.messages(answer, "assistant") for answer in answers),
            tuple(_number(score, "a score") for score in scores),
        )
    answer = next((key for key in ("response", "completion") if key in record), None)
    if answer and "prompt" in record and "label" in record:
        prompt, said = source.messages(record["prompt"], "user"), source.messages(record[answer], "assistant")
        return Ranking(prompt, (said,), (_number(record["label"], "label"),))
    raise ValueError(
        f"it has the keys {sorted(record)} and needs prompt with chosen and rejected, with responses and scores, or "
        "with response and label"
    )


def _pair(record: Record) -> Ranking:
    prompt, chosen, rejected = source.preference(record)
    if chosen == rejected:
        raise ValueError("its chosen and its rejected answer are the same; leave it out")
    rating = str(record.get("rating") or "")
    if rating and rating not in RATINGS:
        raise ValueError(f"its rating is {rating!r} and none of {', '.join(RATINGS)}")
    labels = [record[key] for key in ("chosen_is_safe", "rejected_is_safe") if key in record]
    safe = tuple(_number(label, "a safety label") for label in labels)
    if len(safe) == 1:
        raise ValueError("it has a safety label for one of its answers; give chosen_is_safe and rejected_is_safe")
    margin = _number(record.get("margin") or 0.0, "margin")
    return Ranking(prompt, (chosen, rejected), (1.0, 0.0), margin, rating, safe)


def _number(value: Any, name: str) -> float:
    if not isinstance(value, bool | int | float) or not np.isfinite(value):
        raise ValueError(f"it has {value!r:.40} as {name}; give a number")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class Rankings:
    """Pairs, rankings or labels in JSON Lines, Parquet or ArrayRecord files (see `ranking`).

    With `safe_from`, answers that no label says more of count as safe if they scored so much, else as unsafe.
    """

    paths: tuple[str, ...]
    max_malformed: float = 0.01
    safe_from: float | None = None

    def open(self) -> Indexable[Ranking]:
        """The records; raises for files that are missing, empty or too malformed."""
        return source.read(*self.paths, parse=self._ranking, max_malformed=self.max_malformed)

    def _ranking(self, record: Record) -> Ranking:
        one = ranking(record)
        if self.safe_from is None or one.safe:
            return one
        return one._replace(safe=tuple(float(score >= self.safe_from) for score in one.scores))


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Pairs made of generated rows: the folders of stages that `pair` them (see `pairs`, `shards.write_pairs`)."""

    folders: tuple[str, ...]

    def open(self) -> Indexable[Ranking]:
        """The pairs; raises for folders that are missing or whose files are not what was written."""
        files = [file for folder in self.folders for file in shards.paths(Path(folder) / "pairs", "pairs")]
        return source.read(*files, parse=_stored_pair)


@dataclass(frozen=True, kw_only=True)
class Blended:
    """All of `main`, and of `others` so many that they are `share` of the whole, spread evenly.

    Llama 2 mixes helpfulness comparisons into its safety reward model's so, and the other way round:
    https://arxiv.org/abs/2307.09288, section 3.2.2.
    """

    main: Rankings | Paired
    others: Rankings | Paired
    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}: what the others are of the whole lies between 0 and 1")

    def open(self) -> Indexable[Ranking]:
        """The comparisons; raises as its parts do."""
        main = self.main.open()
        return mixture.Bounded(
            {"main": main, "others": self.others.open()},
            weights={"main": 1 - self.share, "others": self.share},
            size=round(len(main) / (1 - self.share)),
            seed=self.seed,
        )


def _stored_pair(record: Record) -> Ranking:
    prompt, chosen, rejected = columns.preference(record)
    return Ranking(prompt, (chosen, rejected), (1.0, 0.0))


def group(tokenizer: Tokenizer, ranking: Ranking, **fields: Sequence[Any]) -> Group:
    """The prompt's tokens and each answer's, its end of turn the last, with a mask of what the assistant chose.

    `fields` hold one value, or one array per token, for each answer. Raises ValueError for an answer in which the
    assistant says nothing.
    """
    before = sum(message["role"] == "assistant" for message in ranking.prompt)
    prompt: list[int] = []
    examples = []
    for index, answer in enumerate(ranking.answers):
        tokens, mask = chat.render_with_mask(tokenizer, (*ranking.prompt, *answer))
        chosen = np.flatnonzero(mask)
        begins = [i for i in chosen if i == 0 or not mask[i - 1]]
        if len(begins) <= before:
            raise ValueError(f"answer {index} has no assistant's turn (it begins {str(answer[0])[:60]!r}); add one")
        start, stop = int(begins[before]), int(chosen[-1]) + 1
        if index and tokens[:start] != prompt:
            raise ValueError("the chat template writes a prompt differently for two answers to it; use another one")
        prompt = tokens[:start]
        values: Mapping[str, Any] = {name: value[index] for name, value in fields.items()}
        examples.append(Example(tokens=tokens[start:stop], mask=mask[start:stop], fields=values))
    return Group(prompt=prompt, answers=examples)


def check_fits(group: Group, length: int) -> None:
    """Raise ValueError unless the prompt and all answers to it fit in one row of `length` tokens."""
    size = len(group.prompt) - 1 + sum(len(answer.tokens) for answer in group.answers)
    if size > length:
        raise ValueError(
            f"a prompt and the {len(group.answers)} answers that are compared take {size} tokens and a row has "
            f"{length}: raise row_tokens or leave them out"
        )
