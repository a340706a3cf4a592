"""A verifier for multiple choice: which letter does the response commit to."""

import re
from dataclasses import dataclass

from ..task import Task, Verdict
from .guard import gold, refusal
from .maths import boxed

# "The answer is A dog": a capital A before a word is no choice, but for the words that go on after one.
_NO_ARTICLE = r"(?<!A(?=\s+(?!because|since|as|and|or|is|for)[a-z]))"


@dataclass(frozen=True)
class Choice:
    """1 where the letter that the response commits to is the task's answer; else 0.

    Read in this order: the letter in the last \\boxed{}; the letter after "answer is", "answer:" or "choice is"; a
    response that is the letter alone, or begins with it and a mark: "B", "(B)", "B. Paris", "**B**"; the only
    letter written with a mark, as in "so (B) must be true". A response that names several in the same way commits to
    none. A bare capital in running text does not count: "A" is also a word.
    """

    letters: str = "ABCD"

    def __post_init__(self):
        if not re.fullmatch("[A-Z]{2,26}", self.letters) or len(set(self.letters)) != len(self.letters):
            raise ValueError(f"letters must be two or more distinct capitals such as 'ABCD', got {self.letters!r}")

    def __call__(self, task: Task, response: str) -> Verdict:
        expected = gold(task).strip().strip("().").upper()
        if len(expected) != 1 or expected not in self.letters:
            raise ValueError(f"the answer {task.answer!r} of task {task.id} is not one of the letters {self.letters}")
        refused = refusal(task, response)
        if refused:
            return refused
        found = chosen_letter(response, self.letters)
        if found is None:
            return Verdict(0.0, "no single choice in the response")
        if found == expected:
            return Verdict(1.0, "correct")
        return Verdict(0.0, f"chose {found}, expected {expected}")


def chosen_letter(response: str, letters: str = "ABCD") -> str | None:
    """The one letter of `letters` that the response commits to; None where it commits to none or several."""
    content = boxed(response)
    if content is not None:
        match = re.fullmatch(rf"\(?([{letters}])[).]?", re.sub(r"\\text|[{}\s]", "", content))
        return match[1] if match else None
    text = re.sub(r"[*_`]", "", response).strip()
    committed = rf"([{letters}])(?![\w']){_NO_ARTICLE}(?!\s*(?:or|and|,|/)\s*\(?[{letters}]\b)"
    stated = set(re.findall(rf"\b(?i:answer|choice)(?:\s+(?i:is))?\s*:?\s*\(?{committed}", text))
    if stated:
        return stated.pop() if len(stated) == 1 else None
    if re.fullmatch(rf"\(?[{letters}][).:]?", text, re.I):
        return text.strip("().:").upper()
    marked = set(re.findall(rf"(?<!\w)(?:\(([{letters}])\)|([{letters}])[).:](?!\w))", text))
    found = {first or second for first, second in marked}
    return found.pop() if len(found) == 1 else None
