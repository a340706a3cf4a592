"""Demands on the layout of a response that a program can check: quotes, brackets, bullets, JSON, titles, parts."""

import json
import re
from dataclasses import dataclass

from .constraints import number_of, words


@dataclass(frozen=True)
class InDoubleQuotes:
    """One pair of double quotes around everything, none inside."""

    def describe(self) -> str:
        return "Put your whole answer in double quotation marks."

    def holds(self, response: str) -> bool:
        inside = response[1:-1]
        return response[0] == response[-1] == '"' and '"' not in inside and bool(words(inside))


@dataclass(frozen=True)
class InBrackets:
    """One pair of square brackets around everything, none inside."""

    def describe(self) -> str:
        return "Put your whole answer in square brackets."

    def holds(self, response: str) -> bool:
        return re.fullmatch(r"\[[^\[\]]*\]", response) is not None and bool(words(response))


@dataclass(frozen=True)
class BulletsExactly:
    """That many lines that begin with '* ' or '- '."""

    count: int

    def describe(self) -> str:
        return f"Write exactly {number_of(self.count, 'bullet point')}, each on its own line beginning with '* '."

    def holds(self, response: str) -> bool:
        return len(re.findall(r"^\s*[*-] +\S", response, re.MULTILINE)) == self.count


@dataclass(frozen=True)
class JsonFormat:
    """One JSON object that is not empty; a code fence around it is allowed."""

    def describe(self) -> str:
        return "Answer with a JSON object and nothing else."

    def holds(self, response: str) -> bool:
        fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", response, re.DOTALL)
        try:
            value = json.loads(fenced[1] if fenced else response)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and bool(value)


@dataclass(frozen=True)
class TitleInAngles:
    """A title in <<...>>, and an answer beside it."""

    def describe(self) -> str:
        return "Give your answer a title in double angle brackets, such as <<my title>>."

    def holds(self, response: str) -> bool:
        match = re.search(r"<<([^<>\n]+)>>", response)
        return match is not None and bool(words(match[1])) and bool(words(response.replace(match[0], "")))


@dataclass(frozen=True)
class TwoResponses:
    """Two different answers with ****** between them."""

    def describe(self) -> str:
        return "Give two different answers, separated by six asterisks: ******"

    def holds(self, response: str) -> bool:
        parts = [part.strip() for part in response.split("******")]
        return len(parts) == 2 and all(words(part) for part in parts) and parts[0].lower() != parts[1].lower()


@dataclass(frozen=True)
class PlaceholdersAtLeast:
    """That many placeholders in square brackets or more."""

    count: int

    def describe(self) -> str:
        return f"Include at least {number_of(self.count, 'placeholder')} in square brackets, such as [name]."

    def holds(self, response: str) -> bool:
        return len(re.findall(r"\[[^\[\]\n]*\w[^\[\]\n]*\]", response)) >= self.count


@dataclass(frozen=True)
class HighlightsAtLeast:
    """That many highlights with asterisks or more."""

    count: int

    def describe(self) -> str:
        return f"Highlight at least {number_of(self.count, 'part')} of your answer with asterisks, like *this*."

    def holds(self, response: str) -> bool:
        return len(re.findall(r"(?<!\*)\*{1,2}(?=\S)[^*\n]*\w[^*\n]*\*{1,2}(?!\*)", response)) >= self.count


@dataclass(frozen=True)
class ParagraphsExactly:
    """That many paragraphs with lines of *** between them."""

    count: int

    def describe(self) -> str:
        return f"Write exactly {number_of(self.count, 'paragraph')}, separated by the line ***."

    def holds(self, response: str) -> bool:
        parts = re.split(r"\n\s*\*\*\*\s*\n", response)
        return len(parts) == self.count and all(words(part) for part in parts)


@dataclass(frozen=True)
class Postscript:
    """A 'P.S.' with words before and after it."""

    def describe(self) -> str:
        return "At the end, add a postscript that begins with 'P.S.'."

    def holds(self, response: str) -> bool:
        before, mark, after = response.rpartition("P.S.")
        return bool(mark and words(before) and words(after))
