"""Filters of phrases that a student should not learn: refusals, other models' names, dates of somebody's knowledge.

English phrases only, and few: each is one by which a model speaks of itself, so that a text *about* OpenAI or about an
update in 2023 passes. The kinds are Olmo 3's (https://arxiv.org/abs/2512.13961 §4.2.1 and A.7).
"""

import re
from dataclasses import dataclass

from ..row import Row, answered, written
from .funnel import RowFilter

_APOSTROPHES = str.maketrans("’ʼ", "''")
_CANNOT = r"i (?:can(?:'t|not| not)|won't|am (?:not able|unable))"
_HELP = r"(?:help|assist|comply|fulfil+|provide|do that|support|engage|answer (?:this|that)|with)\b"
_REFUSAL = re.compile(
    r"\b(?:"
    + "|".join(
        [
            rf"i(?:'m| am) (?:(?:very|so|truly|really) )?(?:sorry|afraid),? (?:but )?(?:(?:that )?{_CANNOT}|as an ai)",
            rf"i (?:can(?:'t|not| not)|won't|will not|must (?:decline|refuse)) (?:to )?{_HELP}",
            rf"i(?:'m| am) (?:unable|not able) to {_HELP}",
            r"i (?:must|have to|need to) (?:respectfully )?(?:decline|refuse)",
            rf"i apologi[sz]e,? but {_CANNOT}",
        ]
    )
    + ")",
    re.IGNORECASE,
)
_MODELS = (
    "ChatGPT|GPT-?[345o][\\w.-]*|OpenAI|Claude|Anthropic|Gemini|Bard|Google DeepMind|Google AI|Qwen\\w*|Tongyi|"
    "Alibaba(?: Cloud)?|DeepSeek[\\w-]*|Llama|Meta AI|Mistral(?: AI)?|Cohere|Grok|xAI|Kimi|Moonshot(?: AI)?|"
    "ChatGLM|Zhipu(?: AI)?|Perplexity|Phi-?\\d?|Tülu|Olmo|SmolLM\\w*"
)
_MADE = r"(?:made|developed|created|trained|built|designed|provided)"
_IS = r"(?i:i(?:'m| am))"
# A name as it is written, all else in any case: "I am phi" is no model, nor is "I am Claude Monet".
_CLAIMS = tuple(
    map(
        re.compile,
        [
            rf"\b(?:{_IS}|(?i:my name is|call me|you(?:'re| are) (?:talking|speaking|chatting) (?:to|with))),? "
            rf"(?P<name>{_MODELS})\b(?! [A-Z][a-z])",
            rf"\b(?:{_IS}|(?i:i was))(?:,? [\w'-]+){{0,9}}?,? (?i:{_MADE} by)(?: [\w'-]+){{0,2}}? "
            rf"(?P<name>{_MODELS})\b",
            rf"\b{_IS}(?: [\w'-]+){{1,5}}? (?i:model|assistant|chatbot|ai),? (?i:from|of|by|called|named) "
            rf"(?P<name>{_MODELS})\b",
        ],
    )
)
_AI = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model|ai (?:assistant|language model))\b",
    re.IGNORECASE,
)
_WHEN = r"(?:last|latest|most recent|current)"
_DATED = re.compile(
    r"\b(?:"
    + "|".join(
        [
            rf"(?:my|our) (?:{_WHEN} )?(?:knowledge|training(?: data)?|information) (?:cut-? ?off|update)",
            r"(?:my|our) (?:knowledge|training(?: data)?|information) (?:only )?"
            r"(?:goes|extends|is current|ends|includes information)\b",
            rf"as of my (?:{_WHEN} )?(?:knowledge|training|update|data)",
            r"(?:knowledge|training(?: data)?) cut-? ?off (?:date )?(?:is|was|of|in)",
            r"i was (?:last )?(?:trained|updated) (?:on data )?(?:(?:up )?(?:until|till|to|through)|in (?:\w+ )?\d{4})",
            r"i (?:do not|don't) have (?:access to )?(?:real-? ?time|up-?to-?date|current) "
            r"(?:information|data|knowledge)",
        ]
    )
    + ")",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Refusals(RowFilter):
    """Drop rows whose answer begins by refusing: a refusal in its first `characters`, thinking not counted.

    For prompts that deserve an answer; leave prompts that ought to be refused out of its domains by `InDomains`.
    """

    characters: int = 200

    def reason(self, row: Row) -> str | None:
        found = _REFUSAL.search(_plain(answered(row)[: self.characters]))
        return f"refuses: {found[0]!r}" if found else None


@dataclass(frozen=True, kw_only=True)
class Identity(RowFilter):
    """Drop rows in which the assistant calls itself by the name of a model or maker, or speaks "as an AI".

    `own` are names that it may call itself by.
    """

    own: tuple[str, ...] = ()

    def reason(self, row: Row) -> str | None:
        text = _plain(written(row))
        own = {name.casefold() for name in self.own}
        for found in (match for claim in _CLAIMS for match in claim.finditer(text)):
            if found["name"].casefold() not in own:
                return f"speaks as {found['name']}: {found[0]!r:.60}"
        found = _AI.search(text)
        return f"speaks as an AI: {found[0]!r}" if found else None


@dataclass(frozen=True, kw_only=True)
class KnowledgeDates(RowFilter):
    """Drop rows in which the assistant speaks of the date up to which it knows the world, or of what it cannot know."""

    def reason(self, row: Row) -> str | None:
        found = _DATED.search(_plain(written(row)))
        return f"dates its knowledge: {found[0]!r:.60}" if found else None


def _plain(text: str) -> str:
    """With straight apostrophes and single blanks, as the patterns have them."""
    return " ".join(text.translate(_APOSTROPHES).split())
