"""Near-duplicates: prompts that ask nearly the same, by MinHash over the whole set, and answers that say the same.

Likeness is the Jaccard index of the sets of 5-word shingles. MinHash only proposes pairs, with FineWeb's 112 hashes in
14 bands of 8 (https://arxiv.org/abs/2406.17557 §3.4: a likeness of 0.75 is proposed in 77% of cases, 0.8 in 92%, 0.85
in 99%); the exact index then decides, so that nothing is dropped by a collision of hashes.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import datasketch

from .. import streams
from ..row import Row, asked, written
from .funnel import Filter, Judge, PromptFilter

BANDS, ROWS_PER_BAND = 14, 8
_TOKEN = re.compile(
    r"\d+(?:\.\d+)?|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[-+*/=<>^%]"
)


def tokens(text: str) -> list[str]:
    """Words, numbers and operators, case folded; a character of Chinese, Japanese or Korean is a word."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def shingles(text: str, size: int) -> frozenset[tuple[str, ...]]:
    """The runs of `size` tokens; a shorter text is one shingle, so that it is like its equals only."""
    words = tokens(text)
    if len(words) <= size:
        return frozenset([tuple(words)])
    return frozenset(zip(*(words[start:] for start in range(size)), strict=False))


def jaccard(a: frozenset, b: frozenset) -> float:
    """The share of common elements; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 1.0


@dataclass(frozen=True, kw_only=True)
class NearDuplicatePrompts(Filter):
    """Keep the rows of one prompt out of each crowd of near-duplicates: that whose prompt_id comes first.

    All answers to a prompt stay together. A system message does not count. A prompt is dropped if it is like a kept
    one, so that no two kept prompts are (up to what MinHash misses) and a second run drops none. Of each kept prompt
    its text and its place in 14 tables are held in memory: some 5 kB.
    """

    threshold: float = 0.75
    words: int = 5

    def __post_init__(self):
        _check_threshold(self.threshold)

    def begin(self) -> Judge:
        """See `Filter`."""
        kept: dict[str, str] = {}
        index = datasketch.MinHashLSH(num_perm=BANDS * ROWS_PER_BAND, params=(BANDS, ROWS_PER_BAND))

        def judge(rows: Sequence[Row]) -> list[str | None]:
            texts: dict[str, str] = {}
            for row in sorted(rows, key=streams.order):
                texts.setdefault(row.prompt_id, asked(row))
            why: dict[str, str] = {}
            for (prompt, text), sketch in zip(texts.items(), self._sketches(texts.values()), strict=True):
                likeness = {str(other): self._likeness(text, kept[str(other)]) for other in index.query(sketch)}
                best = min(likeness, key=lambda other: (-likeness[other], other), default=None)
                if best is not None and likeness[best] >= self.threshold:
                    why[prompt] = f"its prompt is like {best} (Jaccard {likeness[best]:.2f})"
                else:
                    index.insert(prompt, sketch)
                    kept[prompt] = text
            return [why.get(row.prompt_id) for row in rows]

        return judge

    def _sketches(self, texts: Iterable[str]) -> Iterator[datasketch.MinHash]:
        encoded = ([" ".join(shingle).encode() for shingle in shingles(text, self.words)] for text in texts)
        # The scheme is named because another default would make other sets of rows.
        return datasketch.MinHash.generator(encoded, num_perm=BANDS * ROWS_PER_BAND, seed=1, scheme="affine64")

    def _likeness(self, a: str, b: str) -> float:
        # Shingles are made again for the few pairs that are proposed: those of all prompts would fill the memory.
        return jaccard(shingles(a, self.words), shingles(b, self.words))


@dataclass(frozen=True, kw_only=True)
class NearDuplicateResponses(PromptFilter):
    """Keep, of a prompt's near-identical answers, the one whose id comes first. Compares all pairs of a prompt."""

    threshold: float = 0.75
    words: int = 5

    def __post_init__(self):
        _check_threshold(self.threshold)

    def prompt_reasons(self, rows: Sequence[Row]) -> list[str | None]:
        kept: dict[str, frozenset] = {}
        why: dict[str, str] = {}
        for row in sorted(rows, key=lambda row: row.id):
            found = shingles(written(row), self.words)
            likeness = {other: jaccard(found, theirs) for other, theirs in kept.items()}
            best = max(likeness, key=lambda other: likeness[other], default=None)
            if best is not None and likeness[best] >= self.threshold:
                why[row.id] = f"answers like {best} (Jaccard {likeness[best]:.2f})"
            else:
                kept[row.id] = found
        return [why.get(row.id) for row in rows]


def _check_threshold(threshold: float) -> None:
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"near-duplicates have a threshold of {threshold}; give a Jaccard index in (0, 1]")
