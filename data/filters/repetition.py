"""Filters of texts that go round in circles.

Olmo 3 drops a row in which a sentence or a paragraph occurs ten times, or a phrase fifty times:
https://arxiv.org/abs/2512.13961 §4.2.1 and A.7. Short pieces ("Yes.", "Wait, no.") do not count, and neither do
sentences and paragraphs inside code fences, where repeated lines are no fault.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..row import Row, written
from .funnel import RowFilter

_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|[。！？]|\n+")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


@dataclass(frozen=True, kw_only=True)
class RepeatedSentences(RowFilter):
    """Drop a row in which a sentence of at least `min_characters` occurs `limit` times."""

    limit: int = 10
    min_characters: int = 10

    def reason(self, row: Row) -> str | None:
        return _repeated(_SENTENCE.split(_FENCED.sub("\n", written(row))), "sentence", self.limit, self.min_characters)


@dataclass(frozen=True, kw_only=True)
class RepeatedParagraphs(RowFilter):
    """Drop a row in which a paragraph of at least `min_characters` occurs `limit` times."""

    limit: int = 10
    min_characters: int = 20

    def reason(self, row: Row) -> str | None:
        paragraphs = re.split(r"\n\s*\n", _FENCED.sub("\n\n", written(row)))
        return _repeated(paragraphs, "paragraph", self.limit, self.min_characters)


@dataclass(frozen=True, kw_only=True)
class RepeatedPhrases(RowFilter):
    """Drop a row in which a phrase of `words` words occurs `limit` times, or a run of letters repeats as often.

    A character of Chinese, Japanese or Korean counts as a word. The run catches loops without blanks ("hahaha...").
    The length of a phrase is not published; 8 words are the length of the n-grams of decontamination.
    """

    words: int = 8
    limit: int = 50

    def reason(self, row: Row) -> str | None:
        text = written(row)
        words = _WORD.findall(text.casefold())
        if len(words) - self.words + 1 >= self.limit:
            phrases = Counter(zip(*(words[start:] for start in range(self.words)), strict=False))
            phrase, count = min(phrases.items(), key=lambda item: (-item[1], item[0]))
            if count >= self.limit:
                return f"a phrase occurs {count} times: {' '.join(phrase)!r:.60}"
        run = re.search(rf"([^\W\d_]{{1,20}}?)\1{{{self.limit - 1},}}", text)
        return f"a run of letters repeats {len(run[0]) // len(run[1])} times: {run[1]!r}" if run else None


def _repeated(pieces: Iterable[str], name: str, limit: int, min_characters: int) -> str | None:
    even = (" ".join(piece.casefold().split()) for piece in pieces)
    counts = Counter(piece for piece in even if len(piece) >= min_characters)
    if not counts:
        return None
    piece, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return f"a {name} occurs {count} times: {piece!r:.60}" if count >= limit else None
