"""Decontamination: no row that holds a question of an evaluation set.

The rule is Tulu 3's (https://arxiv.org/abs/2411.15124 §3.2; Olmo 3 uses it too, https://arxiv.org/abs/2512.13961 A.7):
a question matches if 8-grams that it shares with the row cover more than half of its tokens. GPT-3 took a single common
13-gram (https://arxiv.org/abs/2005.14165 appendix C): that misses questions shorter than 13 words and questions with
one word in twelve changed, and drops a row for one quotation in common with a long question. Tulu 3 removes questions'
rows only where a training set matches over 2% of an evaluation set; here every row that matches goes. From GPT-3 comes
the exception for boilerplate ("reason step by step and put your final answer in a box"): n-grams in more than ten
questions of an evaluation set do not count; without it, one such instruction would match every row that has it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..row import Row, text_of
from ..task import Message, TaskSource
from .duplicates import tokens
from .funnel import RowFilter

Gram = tuple[str, ...]


class _Question(NamedTuple):
    name: str
    words: Gram


class _Index(NamedTuple):
    """The questions; the n-grams that count, with their places; what those cover; short and whole questions."""

    questions: list[_Question]
    grams: dict[Gram, list[tuple[int, int]]]
    coverable: list[int]
    short: dict[Gram, list[int]]
    whole: dict[Gram, int]


@dataclass(frozen=True, kw_only=True)
class Decontaminated(RowFilter):
    """Drop rows any message of which, asked or answered, holds a question of any evaluation set.

    A question of fewer than `n` tokens matches where it occurs as a whole; one of fewer than n/2 only where it is a
    whole message. The evaluation sets are read at the first row and their n-grams kept in memory.
    """

    evaluations: tuple[TaskSource, ...]
    n: int = 8
    overlap: float = 0.5
    max_questions: int = 10

    def __post_init__(self):
        if not self.evaluations:
            raise ValueError("Decontaminated has no evaluation set; name every set that the model is evaluated on")
        if self.n < 2 or not 0.0 <= self.overlap < 1.0 or self.max_questions < 1:
            raise ValueError(
                f"Decontaminated has n={self.n}, overlap={self.overlap}, max_questions={self.max_questions}; "
                "give n >= 2, 0 <= overlap < 1 and max_questions >= 1"
            )

    def reason(self, row: Row) -> str | None:
        index = self._index
        covered: defaultdict[int, set[int]] = defaultdict(set)
        for message in (*row.prompt, *row.response):
            for text in (text_of(message), str(message.get("reasoning_content") or "")):
                words = tokens(text)
                held = index.whole.get(tuple(words)) if words else None
                held = self._held(words) if held is None else held
                if held is not None:
                    return f"holds the whole of {index.questions[held].name}"
                for gram in _grams(words, self.n):
                    for question, start in index.grams.get(gram, ()):
                        covered[question].update(range(start, start + self.n))
        shares = {question: len(found) / index.coverable[question] for question, found in covered.items()}
        worst = min(shares, key=lambda question: (-shares[question], question), default=None)
        if worst is None or shares[worst] <= self.overlap:
            return None
        return f"holds {shares[worst]:.0%} of {index.questions[worst].name}"

    def _held(self, words: Sequence[str]) -> int | None:
        """A short question that occurs among the words, if there is one."""
        if not self._index.short:
            return None
        for start, gram in enumerate(_grams(words, self.n // 2)):
            for question in self._index.short.get(gram, ()):
                whole = self._index.questions[question].words
                if tuple(words[start : start + len(whole)]) == whole:
                    return question
        return None

    @cached_property
    def _index(self) -> _Index:
        index = _Index([], {}, [], {}, {})
        for source in self.evaluations:
            _add(index, _questions(source), self.n, self.max_questions)
        return index


def _questions(source: TaskSource) -> list[_Question]:
    found = []
    for number in range(len(source)):
        task = source[number]
        words = tuple(tokens(_asked(task.messages)))
        if words:
            found.append(_Question(f"task {task.id} of {task.domain}", words))
    if not found:
        raise ValueError(f"the evaluation set of {source.domain!r} has no question with words; check its files")
    return found


def _asked(messages: Sequence[Message]) -> str:
    return "\n".join(text_of(message) for message in messages if message["role"] not in ("system", "assistant"))


def _add(index: _Index, questions: Sequence[_Question], n: int, max_questions: int) -> None:
    common = Counter(gram for question in {q.words for q in questions} for gram in set(_grams(question, n)))
    for question in questions:
        if question.words in index.whole:
            continue
        number = len(index.questions)
        index.questions.append(question)
        index.whole[question.words] = number
        if n // 2 <= len(question.words) < n:
            index.short.setdefault(question.words[: n // 2], []).append(number)
        covers: set[int] = set()
        for start, gram in enumerate(_grams(question.words, n)):
            if common[gram] <= max_questions:
                index.grams.setdefault(gram, []).append((number, start))
                covers.update(range(start, start + n))
        index.coverable.append(len(covers))


def _grams(words: Sequence[str], n: int) -> Iterable[Gram]:
    return zip(*(words[start:] for start in range(n)), strict=False)
