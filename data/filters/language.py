"""Filters by language, told by script and, among languages in Latin script, by their most frequent words.

Small and sure rather than complete: a text in few words, in code or in formulas has no language here, and passes.
"""

import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass

from ..row import Row, asked, written
from .funnel import RowFilter

# The first character of a block of letters and its script, in order; None between scripts that matter here.
_BLOCKS: tuple[tuple[int, str | None], ...] = (
    (0x0041, "Latin"),
    (0x0250, None),
    (0x0370, "Greek"),
    (0x0400, "Cyrillic"),
    (0x0530, "Armenian"),
    (0x0590, "Hebrew"),
    (0x0600, "Arabic"),
    (0x0700, None),
    (0x0750, "Arabic"),
    (0x0780, None),
    (0x0900, "Devanagari"),
    (0x0980, "Other Indic"),
    (0x0E00, "Thai"),
    (0x0E80, None),
    (0x10A0, "Georgian"),
    (0x1100, "Hangul"),
    (0x1200, None),
    (0x1E00, "Latin"),
    (0x1F00, "Greek"),
    (0x2000, None),
    (0x3040, "Kana"),
    (0x3100, None),
    (0x3400, "Han"),
    (0xA000, None),
    (0xAC00, "Hangul"),
    (0xD7B0, None),
    (0xF900, "Han"),
    (0xFB00, None),
    (0xFF66, "Kana"),
    (0xFFA0, None),
    (0x20000, "Han"),
    (0x32000, None),
)
_STARTS = [start for start, _ in _BLOCKS]
_LANGUAGES = {  # the language that a script is taken for: the one with most text in it
    "Han": "zh",
    "Kana": "ja",
    "Hangul": "ko",
    "Cyrillic": "ru",
    "Greek": "el",
    "Arabic": "ar",
    "Hebrew": "he",
    "Devanagari": "hi",
    "Thai": "th",
    "Armenian": "hy",
    "Georgian": "ka",
}
# Without words that English has too (Dutch "is", Italian "per", Portuguese "do", Polish "to"): in a test with 12,473
# English answers to maths problems they made 57 Italian, Dutch or Spanish. And without words of one letter, which are
# variables as well. With neither, none of the 12,473 is taken for another language and 760 are unclear.
_FREQUENT = {
    "en": "the of and to is that it for was with as are this be on have not from they which you we what if how in an "
    "each he she his her has had so there then than or at by do no per will would can",
    "de": "der die und das ist nicht ein eine den mit sich auf für dem von zu wir wird auch wie sind dass im es wenn",
    "fr": "le la les des et est une un que pour dans qui pas sur avec il elle nous vous ce sont du au cette donc",
    "es": "el los las es una un que para con del se lo como más pero su está son esta si este entonces la en de",
    "it": "il gli di che una un non sono della del si più ma questo nel alla anche quindi ci la due dei perché",
    "pt": "os uma um que para por com não da em se como mais seu são na está isso então ou porque ao pelo",
    "nl": "de het een en van dat op te zijn niet voor aan om maar ook als dan wordt deze bij naar want dit ze",
    "pl": "na się nie jest że jak po od są który dla przez tym tak czy być więc oraz ma jego tego które",
}
_WORDS = {name: frozenset(words.split()) for name, words in _FREQUENT.items()}
_LETTERS = re.compile(r"[^\W\d_]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_LETTER = re.compile(r"[^\W\d_]")
# Formulas are bounded, or a loop of "\\[" that none closes would take quadratic time.
_NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.{0,2000}?\$\$|\$[^$\n]*\$|\\\[.{0,2000}?\\\]|\\\(.{0,2000}?\\\)|\\[A-Za-z]+|https?://\S+",
    re.DOTALL,
)
MIN_WORDS = 8  # fewer have no language
MIN_SHARE = 0.15  # of the words must be frequent ones; prose of the eight languages has 25% and more
MARGIN = 1.5  # how many times as many frequent words as the next language's a language needs


def scripts(text: str) -> Counter[str]:
    """How many letters of the text are of each script; letters of scripts without a name here count as "other"."""
    if text.isascii():
        letters = sum(map(len, _LETTERS.findall(text)))
        return Counter(Latin=letters) if letters else Counter()
    found: Counter[str] = Counter()
    for letter, count in Counter(_LETTER.findall(text)).items():
        place = bisect_right(_STARTS, ord(letter)) - 1
        found[(_BLOCKS[place][1] if place >= 0 else None) or "other"] += count
    return found


def language(text: str) -> str | None:
    """ISO 639-1 code of the language that most of the text's prose is in, or None where that is not clear.

    Code, formulas and addresses do not count. Knows en, de, fr, es, it, pt, nl, pl by their words and eleven other
    languages by their scripts (all Cyrillic is "ru", all Devanagari "hi").
    """
    prose = _NOT_PROSE.sub(" ", text)
    letters = scripts(prose)
    total = letters.total()
    if not total:
        return None
    # Japanese mixes scripts; Chinese has no Kana.
    if letters["Han"] + letters["Kana"] > total / 2:
        return "ja" if letters["Kana"] > 0.1 * letters["Han"] else "zh"
    script, count = max(letters.items(), key=lambda item: (item[1], item[0]))
    if count <= total / 2:
        return None
    return _latin(prose) if script == "Latin" else _LANGUAGES.get(script)


def _latin(prose: str) -> str | None:
    words = Counter(_WORD.findall(prose.casefold()))
    if words.total() < MIN_WORDS:
        return None
    hits = {name: sum(words[word] for word in frequent) for name, frequent in _WORDS.items()}
    (best, most), (_, next_most) = sorted(hits.items(), key=lambda item: (-item[1], item[0]))[:2]
    return best if most >= MIN_SHARE * words.total() and most >= MARGIN * next_most else None


@dataclass(frozen=True, kw_only=True)
class Scripts(RowFilter):
    """Drop rows in which a share of `max_foreign` of the assistant's letters, or more, is of a script not allowed.

    Olmo 3 drops at 5% Chinese characters (https://arxiv.org/abs/2512.13961 A.7); here any script but those allowed.
    Greek is allowed by default, for formulas.
    """

    allowed: tuple[str, ...] = ("Latin", "Greek")
    max_foreign: float = 0.05

    def __post_init__(self):
        known = {script for _, script in _BLOCKS if script}
        if not set(self.allowed) <= known:
            raise ValueError(f"Scripts allows {sorted(set(self.allowed) - known)}; choose among {sorted(known)}")

    def reason(self, row: Row) -> str | None:
        found = scripts(written(row))
        foreign = Counter({script: count for script, count in found.items() if script not in self.allowed})
        if not foreign or foreign.total() < self.max_foreign * found.total():
            return None
        names = ", ".join(sorted(foreign))
        return f"{foreign.total() / found.total():.0%} of its letters are of other scripts ({names})"


@dataclass(frozen=True, kw_only=True)
class Languages(RowFilter):
    """Drop rows whose response is clearly in a language that is not among `allowed` (ISO 639-1)."""

    allowed: tuple[str, ...] = ("en",)

    def __post_init__(self):
        known = {*_FREQUENT, *_LANGUAGES.values()}
        if not set(self.allowed) <= known:
            raise ValueError(f"Languages allows {sorted(set(self.allowed) - known)}; choose among {sorted(known)}")

    def reason(self, row: Row) -> str | None:
        found = language(written(row))
        return f"is in {found}" if found is not None and found not in self.allowed else None


@dataclass(frozen=True, kw_only=True)
class PromptLanguage(RowFilter):
    """Drop rows that answer, thinking included, in a language that is clearly not the prompt's.

    DeepSeek-R1 filters chains of thought with mixed languages: https://arxiv.org/abs/2501.12948 §2.3.1 and §2.3.3. A
    prompt that asks for a translation is no fit for this filter: keep it to other domains by `InDomains`.
    """

    def reason(self, row: Row) -> str | None:
        wanted, found = language(asked(row)), language(written(row))
        return f"answers in {found} to {wanted}" if wanted and found and wanted != found else None
