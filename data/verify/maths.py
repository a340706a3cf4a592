"""Verifiers for answers that are one number, compared as exact rationals.

What counts as the answer: the number in the last `\\boxed{...}` where the response has one, otherwise the last number
of the response. The last, because models restate the question and work before they conclude; only one, so that
listing candidates earns nothing. Integers, decimals, exponents (1.5e3), thousands separators (1,234), slash
fractions (3/4) and LaTeX fractions are read; 0.5, 1/2 and \\frac{1}{2} are the same number. Units, currency and percent
signs are skipped. A mixed number (1 1/2) reads as its fraction.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from ..task import Task, Verdict
from .guard import gold, refusal

# At most 300 digits and a two-digit exponent: a page of digits must not become work.
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,300})"
_NUMBER = re.compile(
    rf"(?<![0-9])(?P<sign>(?<![\w)\]}}.])[-+])?\$?"
    rf"(?P<top>{_DIGITS}(?:\.[0-9]{{1,300}})?|(?<!\w)\.[0-9]{{1,300}})"
    r"(?P<exponent>[eE][-+]?[0-9]{1,2}(?![0-9]))?"
    r"(?:\s?/\s?(?P<bottom>[0-9]{1,300}))?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?[0-9]{1,300})\s*\}\s*\{\s*([0-9]{1,300})\s*\}")
_TRANSLATION = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00a0": " ", "\u202f": " "})


@dataclass(frozen=True)
class FinalNumber:
    """1 where the number in the last \\boxed{}, else the response's last number, equals the task's answer; else 0."""

    def __call__(self, task: Task, response: str) -> Verdict:
        return refusal(task, response) or _compare(task, final_number(response))


@dataclass(frozen=True)
class BoxedNumber:
    """1 where the last \\boxed{} of the response holds a number equal to the task's answer; else 0."""

    def __call__(self, task: Task, response: str) -> Verdict:
        content = boxed(response)
        if content is None:
            return refusal(task, response) or Verdict(0.0, "no \\boxed{} answer")
        return refusal(task, response) or _compare(task, last_number(content))


def _compare(task: Task, found: Fraction | None) -> Verdict:
    expected = final_number(gold(task))
    if expected is None:
        raise ValueError(f"the answer {task.answer!r} of task {task.id} holds no number")
    if found is None:
        return Verdict(0.0, "no number in the response")
    if found == expected:
        return Verdict(1.0, "correct")
    return Verdict(0.0, f"answered {_show(found)}, expected {_show(expected)}")


def final_number(text: str) -> Fraction | None:
    """The number in the last \\boxed{} where there is one, else the last number of the text; None without any."""
    content = boxed(text)
    return last_number(text if content is None else content)


def last_number(text: str) -> Fraction | None:
    """The last number of a text as an exact rational; None where there is none."""
    text = _LATEX_FRACTION.sub(r" \1/\2 ", text.translate(_TRANSLATION))
    value = None
    for match in _NUMBER.finditer(text):
        number = Fraction(match["top"].replace(",", "") + (match["exponent"] or ""))
        bottom = int(match["bottom"] or 1)
        if bottom:
            value = (-number if "-" in (match["sign"] or "") else number) / bottom
    return value


def boxed(text: str) -> str | None:
    """The content of the last complete \\boxed{...}, braces balanced; None where there is none."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        depth = 0
        for position in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : position]
        end = start
    return None


def _show(value: Fraction) -> str:
    shown = str(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
