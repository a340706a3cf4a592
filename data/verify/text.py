"""A verifier for answers that are one short text."""

import unicodedata
from dataclasses import dataclass

from ..task import Task, Verdict
from .guard import gold, refusal

_QUOTES = " \"'`\u201c\u201d\u2018\u2019"


@dataclass(frozen=True)
class ExactText:
    """1 where the response is the task's answer, up to case, spacing, quotes around it and final periods; else 0."""

    def __call__(self, task: Task, response: str) -> Verdict:
        refused = refusal(task, response)
        if refused:
            return refused
        if normalised(response) == normalised(gold(task)):
            return Verdict(1.0, "correct")
        return Verdict(0.0, f"answered {response.strip()[:40]!r}, expected {gold(task)[:40]!r}")


def normalised(text: str) -> str:
    """Case folded, Unicode NFKC, runs of blanks as one, without quotes around it and final periods."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.lstrip(_QUOTES).rstrip(_QUOTES + ".")
