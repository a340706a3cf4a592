"""Demands on what a response says that a program can check: case, length, words, letters (`formats` has the layout).

Each says itself in a sentence. `holds` gets the response without blanks at its ends. A word is a run of letters,
digits, apostrophes and hyphens; a sentence ends with . ! or ? before a blank or the end.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def words(text: str) -> list[str]:
    """The words of a text in order."""
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """The sentences of a text; one that lacks its final mark counts."""
    return [part for part in re.split(r"(?<=[.!?])[\"'\u201d)]*\s+", text.strip()) if words(part)]


def number_of(count: int, noun: str) -> str:
    """ "three words", "one word": a count and a noun."""
    return f"{_COUNTS[count] if count < len(_COUNTS) else count} {noun}{'' if count == 1 else 's'}"


def _contains(text: str, word: str) -> bool:
    return _occurrences(text, word) > 0


def _occurrences(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _listed(items: tuple[str, ...]) -> str:
    return ", ".join(f"'{item}'" for item in items)


@lru_cache(maxsize=1024)
def _any_of(accepted: tuple[str, ...]) -> re.Pattern[str]:
    alternatives = "|".join(map(re.escape, accepted))
    return re.compile(rf"(?<!\w)(?:{alternatives})(?:s|es)?(?!\w)", re.IGNORECASE)


@dataclass(frozen=True)
class AllLowercase:
    """No capital letter, and at least one letter."""

    def describe(self) -> str:
        return "Answer in lowercase letters only."

    def holds(self, response: str) -> bool:
        return any(letter.isalpha() for letter in response) and response == response.lower()


@dataclass(frozen=True)
class AllCapitals:
    """No lowercase letter, and at least one letter."""

    def describe(self) -> str:
        return "Answer in ALL CAPITAL letters."

    def holds(self, response: str) -> bool:
        return any(letter.isalpha() for letter in response) and response == response.upper()


@dataclass(frozen=True)
class WordsExactly:
    """That many words."""

    count: int

    def describe(self) -> str:
        return f"Answer in exactly {number_of(self.count, 'word')}."

    def holds(self, response: str) -> bool:
        return len(words(response)) == self.count


@dataclass(frozen=True)
class WordsAtLeast:
    """That many words or more."""

    count: int

    def describe(self) -> str:
        return f"Use at least {number_of(self.count, 'word')}."

    def holds(self, response: str) -> bool:
        return len(words(response)) >= self.count


@dataclass(frozen=True)
class WordsAtMost:
    """That many words or fewer, and at least one."""

    count: int

    def describe(self) -> str:
        return f"Use at most {number_of(self.count, 'word')}."

    def holds(self, response: str) -> bool:
        return 0 < len(words(response)) <= self.count


@dataclass(frozen=True)
class SentencesExactly:
    """That many sentences, the last one ended by its mark."""

    count: int

    def describe(self) -> str:
        return f"Answer in exactly {number_of(self.count, 'sentence')}."

    def holds(self, response: str) -> bool:
        return len(sentences(response)) == self.count and response.rstrip("\"'\u201d)")[-1:] in (".", "!", "?")


@dataclass(frozen=True)
class IncludeKeywords:
    """Every keyword occurs as a word of its own, in any case."""

    keywords: tuple[str, ...]

    def describe(self) -> str:
        return f"Include the word{'' if len(self.keywords) == 1 else 's'} {_listed(self.keywords)}."

    def holds(self, response: str) -> bool:
        return all(_contains(response, word) for word in self.keywords)


@dataclass(frozen=True)
class KeywordAtLeast:
    """The keyword occurs that often or more, in any case."""

    keyword: str
    count: int

    def describe(self) -> str:
        return f"Use the word '{self.keyword}' at least {number_of(self.count, 'time')}."

    def holds(self, response: str) -> bool:
        return _occurrences(response, self.keyword) >= self.count


@dataclass(frozen=True)
class OnTopic:
    """Names at least one of the accepted answers (or its plural). The question says it, so it describes nothing."""

    accepted: tuple[str, ...]

    def describe(self) -> str:
        return ""

    def holds(self, response: str) -> bool:
        return _any_of(self.accepted).search(response) is not None


@dataclass(frozen=True)
class ForbidWords:
    """None of the words occurs, in any case."""

    forbidden: tuple[str, ...]

    def describe(self) -> str:
        return f"Do not use the word{'' if len(self.forbidden) == 1 else 's'} {_listed(self.forbidden)}."

    def holds(self, response: str) -> bool:
        return not any(_contains(response, word) for word in self.forbidden)


@dataclass(frozen=True)
class StartsWith:
    """Begins with the phrase, in its exact case, and something follows."""

    phrase: str

    def describe(self) -> str:
        return f"Start your answer with '{self.phrase}'."

    def holds(self, response: str) -> bool:
        rest = response.removeprefix(self.phrase)
        return rest != response and bool(words(rest)) and not (self.phrase[-1].isalnum() and rest[0].isalnum())


@dataclass(frozen=True)
class EndsWith:
    """Ends with the phrase, in its exact case, and something precedes it."""

    phrase: str

    def describe(self) -> str:
        return f"End your answer with '{self.phrase}'."

    def holds(self, response: str) -> bool:
        rest = response.removesuffix(self.phrase)
        return rest != response and bool(words(rest)) and not (self.phrase[0].isalnum() and rest[-1].isalnum())


@dataclass(frozen=True)
class LetterAtLeast:
    """The letter occurs that often or more, in any case."""

    letter: str
    count: int

    def describe(self) -> str:
        return f"Use the letter '{self.letter}' at least {number_of(self.count, 'time')}."

    def holds(self, response: str) -> bool:
        return response.lower().count(self.letter.lower()) >= self.count


@dataclass(frozen=True)
class WithoutLetter:
    """The letter does not occur, in any case; some word does."""

    letter: str

    def describe(self) -> str:
        return f"Do not use the letter '{self.letter}'."

    def holds(self, response: str) -> bool:
        return bool(words(response)) and self.letter.lower() not in response.lower()


@dataclass(frozen=True)
class NoCommas:
    """Has a word and no comma."""

    def describe(self) -> str:
        return "Do not use any commas."

    def holds(self, response: str) -> bool:
        return bool(words(response)) and "," not in response


@dataclass(frozen=True)
class NoDigits:
    """Has a word and no digit."""

    def describe(self) -> str:
        return "Do not use any digits."

    def holds(self, response: str) -> bool:
        return bool(words(response)) and not any(letter.isdigit() for letter in response)


@dataclass(frozen=True)
class CapitalWordsAtLeast:
    """That many words of two or more letters in capitals, or more."""

    count: int

    def describe(self) -> str:
        return f"Write at least {number_of(self.count, 'word')} in all capital letters."

    def holds(self, response: str) -> bool:
        return sum(word.isupper() and len(word) > 1 for word in words(response)) >= self.count
