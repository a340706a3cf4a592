"""A verifier for answers that are formulas, compared by the math-verify package."""

import re
from dataclasses import dataclass

from ..task import Task, Verdict
from .guard import gold, refusal
from .maths import boxed

try:
    import math_verify
except ImportError as error:
    raise ImportError("MathVerify needs the math-verify package: pip install 'posttrain[tasks]'") from error

_CONCLUSION = re.compile(r"(?:answer\s*(?:is\s*:?|:|=)|####)", re.IGNORECASE)
_WORD = re.compile(r"(?<=\s)[A-Za-z]{3,}|[A-Za-z]{3,}(?=\s)")
_FORMULA = re.compile(r"\$([^$]+)\$")
MAX_ANSWER = 1000  # characters; a longer formula is no final answer, and parsing it can take minutes


@dataclass(frozen=True)
class MathVerify:
    """1 where the response's final answer is mathematically equal to the task's answer; else 0.

    The final answer is the last \\boxed{...}; without one, what follows the last "answer is", "answer:" or "####";
    without these, the last line that is not blank. An expression that the question asks to work out, given back as it
    stands, is no answer. Run it in a VerifierPool: comparing a tower of powers does not end
    by itself, and math-verify's own time limit is off because its alarm signal fails outside the main thread.
    """

    def __call__(self, task: Task, response: str) -> Verdict:
        refused = refusal(task, response)
        if refused:
            return refused
        expected = _parsed(final_answer(gold(task)))
        if not expected:
            raise ValueError(f"the answer {task.answer!r} of task {task.id} is no formula that math-verify can read")
        candidate = final_answer(response)
        if len(candidate) > MAX_ANSWER:
            return Verdict(0.0, f"the final answer has {len(candidate)} characters, more than {MAX_ANSWER}")
        found = _parsed(candidate)
        if not found:
            return Verdict(0.0, "no formula in the final answer")
        if _restates(task, candidate):
            return Verdict(0.0, "repeats an expression of the question")
        if math_verify.verify(expected, found, timeout_seconds=0):
            return Verdict(1.0, "correct")
        return Verdict(0.0, f"answered {candidate[:40]}, expected {gold(task)[:40]}")


def final_answer(text: str) -> str:
    """The last \\boxed{} content, else the text after the last "answer is" or "####", else the last line with text."""
    content = boxed(text)
    if content is not None:
        return content.strip()
    conclusions = list(_CONCLUSION.finditer(text))
    if conclusions:
        text = text[conclusions[-1].end() :].strip()
        return text.splitlines()[0].strip() if text else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _restates(task: Task, candidate: str) -> bool:
    """Whether a final answer is what the question asks to work out: "evaluate 2 + 3" is not answered by 2 + 3.

    An expression that the question has and that is more than a number; the answer itself may stand in the question.
    """
    found = _plain(_FORMULA.findall(candidate)[-1] if _FORMULA.search(candidate) else candidate)
    asked = _plain(" ".join(str(message["content"]) for message in task.messages))
    is_expression = len(found) > 4 and re.search(r"[-+*/^_\\]", found) is not None
    return is_expression and found != _plain(final_answer(gold(task))) and found in asked


def _plain(formula: str) -> str:
    return re.sub(r"\\left|\\right|\\[,;!]|[$\s]", "", formula).rstrip(".")


def _parsed(answer: str) -> list:
    """math-verify's reading of a final answer: what it finds in a sentence, else all of it as LaTeX."""
    answer = answer.replace("\\$", "")  # the dollar of a price
    is_sentence = _WORD.search(re.sub(r"\\[a-zA-Z]+(\{[a-zA-Z ]*\})?", "", answer))
    has_latex = "$" in answer or "\\(" in answer or "\\[" in answer
    text = answer if is_sentence or has_latex else f"\\boxed{{{answer}}}"
    return math_verify.parse(text, parsing_timeout=0)
