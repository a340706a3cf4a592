"""Rewards for how a response is given, and verifiers put together: its layout, its language, its citations."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..filters.language import language, scripts
from ..row import CLOSE, OPEN, thought
from ..task import Task, Verdict
from .guard import refusal

Verifier = Callable[[Task, str], Verdict]
_QUOTED = re.compile(r"[\"\u201c]([^\"\u201c\u201d]+)[\"\u201d][.,;:]?\s*\[([\w.-]+)\]")
_CITED = re.compile(r"\[([\w.-]+)\]")
_NOT_PROSE = re.compile(rf"```.*?```|`[^`\n]*`|\$[^$\n]*\$|{OPEN}|{CLOSE}", re.DOTALL)
MIN_QUOTE = 12  # characters; a shorter quotation occurs anywhere


@dataclass(frozen=True)
class ThinkingFormat:
    """1 for `<think>...</think>` once and at the beginning, with text in it and an answer after it; else 0.

    The format reward of DeepSeek-R1 (https://arxiv.org/abs/2501.12948, section 2.2.2). With `answer_tags` the answer
    has to be in `<answer>...</answer>`, and nothing beside it.
    """

    answer_tags: bool = False

    def __call__(self, task: Task, response: str) -> Verdict:
        refused = refusal(task, response)
        if refused:
            return refused
        parts = thought({"role": "assistant", "content": response})
        if parts.fault or parts.thinking is None or not response.lstrip().startswith(OPEN):
            return Verdict(0.0, parts.fault or "no thinking at the beginning")
        if not re.search(r"\w", parts.thinking):
            return Verdict(0.0, "its thinking is empty")
        answer = parts.answer.strip()
        if self.answer_tags:
            match = re.fullmatch(r"<answer>((?:(?!</?answer>).)*)</answer>", answer, re.DOTALL)
            answer = match[1] if match else ""
        return Verdict(1.0, "well formed") if re.search(r"\w", answer) else Verdict(0.0, "no answer after the thinking")


@dataclass(frozen=True)
class InLanguage:
    """1 where the response, thinking included, is in the language (ISO 639-1); else 0.

    Against thinking that switches languages (the language-consistency reward of DeepSeek-R1). `share` of its letters,
    code and formulas aside, have to be in the script of the language. A response too short to tell fails.
    """

    code: str
    share: float = 0.9

    def __post_init__(self):
        if not re.fullmatch("[a-z]{2}", self.code) or not 0.5 < self.share <= 1.0:
            raise ValueError(f"give a code such as 'en' and a share above 0.5, got {self.code!r} and {self.share}")

    def __call__(self, task: Task, response: str) -> Verdict:
        refused = refusal(task, response)
        if refused:
            return refused
        text = _NOT_PROSE.sub(" ", response)
        found = language(text)
        if found != self.code:
            return Verdict(0.0, f"its language is {found or 'not clear'}, not {self.code}")
        letters = scripts(text)
        own = sum(letters[script] for script in _OWN.get(self.code, ())) or max(letters.values())
        if own < self.share * letters.total():
            return Verdict(0.0, f"{own / letters.total():.0%} of its letters are in the script of {self.code}")
        return Verdict(1.0, f"in {self.code}")


_OWN = {"ja": ("Han", "Kana"), "zh": ("Han",), "ko": ("Hangul", "Han")}


@dataclass(frozen=True)
class Citations:
    """1 where the response cites tool output and every citation is true; else 0.

    A citation is a quotation with its source: "text of at least twelve characters" [id]. The source is a tool message
    of the task, by its `tool_call_id`, or by its number among them, from 1. The quoted text has to occur there, blanks
    aside. Every [id] of the response has to name a source, and at least `minimum` quotations are wanted.
    """

    minimum: int = 1

    def check(self, task: Task) -> None:
        """A ValueError for a task without tool output."""
        _sources(task)

    def __call__(self, task: Task, response: str) -> Verdict:
        sources = _sources(task)
        refused = refusal(task, response)
        if refused:
            return refused
        unknown = [mark for mark in _CITED.findall(response) if mark not in sources]
        if unknown:
            return Verdict(0.0, f"there is no source [{unknown[0][:40]}]")
        quotations = [(_plain(quoted), mark) for quoted, mark in _QUOTED.findall(response)]
        for quoted, mark in quotations:
            if len(quoted) < MIN_QUOTE or quoted not in sources[mark]:
                return Verdict(0.0, f"[{mark}] does not say {quoted[:60]!r}")
        if len(set(quotations)) < self.minimum:
            return Verdict(0.0, f"{len(set(quotations))} quotations, at least {self.minimum} wanted")
        return Verdict(1.0, f"{len(quotations)} quotations hold")


def _sources(task: Task) -> dict[str, str]:
    """The tool output of a task by the names that citations may use."""
    messages = [message for message in task.messages if message["role"] == "tool"]
    if not messages:
        raise ValueError(f"task {task.id} has no tool message whose output could be cited")
    found = {str(number): _plain(str(message["content"])) for number, message in enumerate(messages, start=1)}
    return found | {str(m["tool_call_id"]): _plain(str(m["content"])) for m in messages if m.get("tool_call_id")}


def _plain(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class AfterThinking:
    """What another verifier says of the answer, without the thinking before it; 0 where the thinking never ends."""

    verifier: Verifier

    def __call__(self, task: Task, response: str) -> Verdict:
        parts = thought({"role": "assistant", "content": response})
        return Verdict(0.0, parts.fault) if parts.fault else self.verifier(task, parts.answer)


@dataclass(frozen=True)
class Weighted:
    """The weighted mean of what several verifiers say: say 0.9 for being right and 0.1 for the format."""

    verifiers: tuple[Verifier, ...]
    weights: tuple[float, ...]

    def __post_init__(self):
        if len(self.verifiers) != len(self.weights) or not self.verifiers or min(self.weights) <= 0:
            raise ValueError(f"give each verifier a weight above 0, got {len(self.verifiers)} and {self.weights}")

    def __call__(self, task: Task, response: str) -> Verdict:
        verdicts = [verifier(task, response) for verifier in self.verifiers]
        total = sum(weight * verdict.score for weight, verdict in zip(self.weights, verdicts, strict=True))
        return Verdict(total / sum(self.weights), "; ".join(verdict.reason for verdict in verdicts))


@dataclass(frozen=True)
class Every:
    """The least that several verifiers say: right, and in the wanted form."""

    verifiers: tuple[Verifier, ...]

    def __post_init__(self):
        if not self.verifiers:
            raise ValueError("at least one verifier is needed: with none, every response would pass")

    def __call__(self, task: Task, response: str) -> Verdict:
        return min((verifier(task, response) for verifier in self.verifiers), key=lambda verdict: verdict.score)
