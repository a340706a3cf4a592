"""The 25 kinds of verifiable instructions of IFEval (https://arxiv.org/abs/2311.07911), by their published ids.

Each kind is a small function of the response and the instruction's arguments, with the meaning that its users know:
keywords match anywhere and in any case, words are runs of word characters, paragraphs are divided by ***. What the
reference leaves to trained models, the ends of sentences and the language, is told by rules here (`_sentences`,
`filters.language`).
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..filters.language import language as told
from ..task import Task, Verdict
from .guard import refusal
from .instructions import violations


def _compare(count: int, relation: str, wanted: int) -> bool:
    """The two relations of IFEval."""
    if relation not in ("at least", "less than"):
        raise ValueError(f"the relation is 'at least' or 'less than', not {relation!r}")
    return count >= wanted if relation == "at least" else count < wanted


# Keywords ----------------------------------------------------------------------------------------------------------


def _existence(text: str, *, keywords: list[str]) -> bool:
    return all(re.search(keyword, text, re.IGNORECASE) for keyword in keywords)


def _frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(len(re.findall(keyword, text, re.IGNORECASE)), relation, frequency)


def _forbidden(text: str, *, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letters(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


# Language and length -----------------------------------------------------------------------------------------------


_SAME_SCRIPT = {"mr": "hi", "ne": "hi", "bg": "ru", "uk": "ru", "fa": "ar", "ur": "ar"}  # told by script alone
_INDIC = {
    "bn": "\u0980-\u09ff", "pa": "\u0a00-\u0a7f", "gu": "\u0a80-\u0aff", "ta": "\u0b80-\u0bff", "te": "\u0c00-\u0c7f",
    "kn": "\u0c80-\u0cff", "ml": "\u0d00-\u0d7f",
}  # fmt: skip


def _language(text: str, *, language: str) -> bool:
    """A text in a few words of Latin script is taken for English; one without letters has any language."""
    if not any(letter.isalpha() for letter in text):
        return True
    indic = (code for code, block in _INDIC.items() if len(re.findall(f"[{block}]", text)) > len(text) / 3)
    return (next(indic, None) or told(text) or "en") == _SAME_SCRIPT.get(language, language)


_ABBREVIATIONS = re.compile(
    r"\b(?:mr|mrs|ms|dr|prof|st|mt|jr|sr|rev|gen|vs|etc|e\.g|i\.e|inc|ltd|vol|fig|al|[a-z])\.$", re.IGNORECASE
)


def _sentences(text: str) -> int:
    """The sentences of a text: they end with . ! or ?, but for abbreviations, initials, and a number that goes on."""
    pieces = re.findall(r"\S+", text)
    count, begun = 0, False
    for piece, after in zip(pieces, [*pieces[1:], ""], strict=True):
        begun = True
        goes_on = _ABBREVIATIONS.search(piece) or (re.fullmatch(r"\d+\.", piece) and after[:1].islower())
        if re.search(r"[.!?]+[\"'\u201d\u2019)\]*]*$", piece) and not goes_on:
            count, begun = count + 1, False
    return count + begun


def _num_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    return _compare(_sentences(text), relation, num_sentences)


def _num_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    if not all(part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == num_paragraphs


def _num_words(text: str, *, num_words: int, relation: str) -> bool:
    bare = "".join(letter for letter in text if not unicodedata.category(letter).startswith("M"))  # marks part no word
    return _compare(len(re.findall(r"\w+", bare)), relation, num_words)


def _first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = text.split("\n\n")
    filled = sum(bool(part.strip()) for part in parts)
    if filled != num_paragraphs or nth_paragraph > filled or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


# Content and format ------------------------------------------------------------------------------------------------


def _placeholders(text: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(text: str, *, postscript_marker: str) -> bool:
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(spaced.get(postscript_marker, re.escape(postscript_marker.lower())), text.lower()) is not None


def _bullets(text: str, *, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^*].*$", text, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", text, re.MULTILINE)) == num_bullets


def _constrained(text: str) -> bool:
    return any(f"My answer is {choice}." in text for choice in ("yes", "no", "maybe"))


def _highlights(text: str, *, num_highlights: int) -> bool:
    single = [part for part in re.findall(r"\*[^\n*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*([^\n*]*)\*\*", text) if part.strip()]
    return len(single) + len(double) >= num_highlights


def _sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter}\s?\d+\s?", text)) - 1 >= num_sections


def _json(text: str) -> bool:
    inside = re.sub(r"^```(?:json|Json|JSON)?|```$", "", text.strip()).strip()
    try:
        json.loads(inside)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


# Combinations, beginnings and ends, case, punctuation ---------------------------------------------------------------


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _repeat(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    return len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'


def _capital_words(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(word.isupper() for word in re.findall(r"[^\W_]+(?:['\u2019.-][^\W_]+)*", text))
    return _compare(count, capital_relation, capital_frequency)


def _capital(text: str) -> bool:
    return text.isupper() and _language(text, language="en")


def _lowercase(text: str) -> bool:
    return text.islower() and _language(text, language="en")


def _no_comma(text: str) -> bool:
    return "," not in text


KINDS: Mapping[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": _num_sentences,
    "length_constraints:number_paragraphs": _num_paragraphs,
    "length_constraints:number_words": _num_words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _capital,
    "change_case:english_lowercase": _lowercase,
    "punctuation:no_comma": _no_comma,
}


@dataclass(frozen=True)
class Instruction:
    """One instruction: its id and its arguments. A constraint like those of `constraints` and `formats`."""

    id: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def describe(self) -> str:
        return f"{self.id}({', '.join(f'{name}={value!r}' for name, value in self.arguments)})"

    def holds(self, response: str) -> bool:
        return KINDS[self.id](response, **dict(self.arguments))


@dataclass(frozen=True)
class IFEval:
    """1 where the response follows all instructions of the task, strictly as it is; else 0.

    `metadata["instruction_id_list"]` and `metadata["kwargs"]` are as in the published data set; arguments that are
    null there count as absent.
    """

    def check(self, task: Task) -> None:
        """A ValueError for an instruction that is unknown or lacks arguments."""
        for each in instructions(task):
            try:
                each.holds("text")
            except (TypeError, ValueError, re.error) as error:
                raise ValueError(f"task {task.id} has an instruction that cannot be checked: {each}: {error}") from None

    def __call__(self, task: Task, response: str) -> Verdict:
        demands = instructions(task)
        refused = refusal(task, response)
        if refused:
            return refused
        broken = violations(demands, response)
        return Verdict(0.0, f"broken: {'; '.join(broken)}") if broken else Verdict(1.0, "all instructions followed")


def instructions(task: Task) -> tuple[Instruction, ...]:
    """The instructions of a task; a ValueError where it has none, or one that is not of the 25 kinds."""
    ids, arguments = task.metadata.get("instruction_id_list"), task.metadata.get("kwargs")
    if not isinstance(ids, list) or not isinstance(arguments, list) or not ids or len(ids) != len(arguments):
        raise ValueError(f'task {task.id} needs "instruction_id_list" and "kwargs", two lists of the same length')
    unknown = [each for each in ids if each not in KINDS]
    if unknown:
        raise ValueError(f"task {task.id} has the unknown instruction {unknown[0]!r}: choose of {', '.join(KINDS)}")
    return tuple(
        Instruction(each, tuple((name, value) for name, value in (given or {}).items() if value is not None))
        for each, given in zip(ids, arguments, strict=True)
    )
