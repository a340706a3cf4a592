"""Tasks from the generators of the reasoning-gym package, behind scorers that are checked before they are believed."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from .task import Task, Verdict
from .tasks import build_task, check_index, prompt_messages
from .verify.guard import gold, refusal
from .verify.maths import boxed, final_number

try:
    import reasoning_gym
except ImportError as error:
    raise ImportError("ReasoningGym needs the reasoning-gym package: pip install 'posttrain[tasks]'") from error

ANSWER_TAGS = "Give the final answer inside <answer> and </answer>."
AUDITED_ITEMS = 3
JUNK = ("zxqj garbage answer", "", "0", "31337", "nan", "True", "no", "[]")

_UNSTABLE = "its items differ between processes with the same seed"
# Found with reasoning-gym 0.1.25: 60 items, two string hash seeds; and every item's answer given to every other item.
REFUSED = {
    "codeio": _UNSTABLE,
    "intermediate_integration": _UNSTABLE,
    "isomorphic_strings": _UNSTABLE,
    "knight_swap": _UNSTABLE,
    "list_functions": _UNSTABLE,
    "polynomial_multiplication": _UNSTABLE,
    "ransom_note": _UNSTABLE,
    "word_ladder": _UNSTABLE,
    "puzzle24": "its scorer does not look at which numbers an answer uses",
    "composite": "it only combines other generators: use a Mixture",
}

# Their scorers hand the answer to eval() or to sympy.parse_expr(), which is eval() too.
EVALUATED = ("binary_matrix", "countdown", "n_queens", "simple_integration", "spiral_matrix", "string_insertion")
_FUNCTION = re.compile(r"\b(?:sin|cos|tan|exp|log|ln|sqrt)\s*(?=\()")
# Without calls, attributes and dunders an expression can cost time and memory, which the pool bounds, and nothing else.
_UNSAFE = re.compile(r"""[^\x00-\x7f]|\\|__|\.\s*[A-Za-z_]|[\w\])}'"]\s*\(""")

_CONCLUSION = re.compile(r"\banswer(?:\s+is)?\s*[:=]?\s*(?=\S)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])-?[0-9]+(?:\.[0-9]+)?(?![\w]|\.[0-9])")


@dataclass(frozen=True)
class ReasoningGymScore:
    """1 where the generator's own scorer gives the extracted answer full marks; else 0.

    Nothing in between: many scorers give every wrong answer 0.01 or 0.05, some give more for longer junk.
    """

    name: str
    config: str = "{}"  # JSON

    def __call__(self, task: Task, response: str) -> Verdict:
        refused = refusal(task, response)
        if refused:
            return refused
        expected = gold(task)
        answer = extracted_answer(response, expected)
        if self.name in EVALUATED and _UNSAFE.search(_FUNCTION.sub("", answer)):
            return Verdict(0.0, f"answered {answer[:40]!r}, which the scorer would evaluate as code")
        score = float(_dataset(self.name, self.config).score_answer(answer, dict(task.metadata["entry"])))
        if score >= 1.0 - 1e-6:
            return Verdict(1.0, "correct")
        return Verdict(0.0, f"answered {answer[:40]!r}, expected {expected[:40]!r}")


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """`size` tasks of the reasoning-gym generator `name`, with its `config` (the generator's own settings).

    `suffix` is put under every question, for instance ANSWER_TAGS. A ValueError refuses a generator that is not known,
    that is known to be broken (`REFUSED`), that gives no reference answer, or whose scorer fails an audit on the first
    items: full marks for the reference answer, not for junk or for the question itself.
    """

    name: str
    size: int = 500
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    suffix: str = ""

    def __post_init__(self):
        if self.name not in reasoning_gym.factory.DATASETS:
            raise ValueError(f"reasoning-gym {reasoning_gym.__version__} has no generator {self.name!r}")
        if self.name in REFUSED:
            raise ValueError(f"the generator {self.name!r} cannot be used: {REFUSED[self.name]}")
        if self.size < 1:
            raise ValueError(f"ReasoningGym needs a size of at least 1, got {self.size}")
        if {"size", "seed"} & set(self.config):
            raise ValueError("give size and seed as ReasoningGym's own settings, not in its config")
        for index in range(min(AUDITED_ITEMS, self.size)):
            _audit(self[index], self.name)

    @property
    def domain(self) -> str:
        return self.name

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Task:
        entry = self._items[check_index(index, self.size)]
        question = entry["question"] + (f"\n{self.suffix}" if self.suffix else "")
        return build_task(
            self.domain,
            prompt_messages(question, self.system),
            ReasoningGymScore(self.name, json.dumps(dict(self.config), sort_keys=True)),
            answer=entry["answer"],
            metadata={"entry": entry},
        )

    @cached_property
    def _items(self):
        return reasoning_gym.create_dataset(self.name, size=self.size, seed=self.seed, **self.config)


def extracted_answer(response: str, expected: str) -> str:
    """The part of a response that a scorer is to see.

    The last <answer>...</answer>, else the last \\boxed{}, else what follows the last "answer is" or "answer:",
    else all of it. Where the reference answer is a number, the last number of that part.
    """
    tagged = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
    content = boxed(response)
    if tagged:
        answer = tagged[-1]
    elif content is not None:
        answer = content
    else:
        answer = response[max((match.end() for match in _CONCLUSION.finditer(response)), default=0) :]
    answer = answer.strip()
    if _NUMBER.fullmatch(expected.strip()):
        numbers = _NUMBER.findall(answer)
        return numbers[-1] if numbers else answer
    return answer


def _audit(task: Task, name: str) -> None:
    """A ValueError unless the verifier tells the reference answer from garbage."""
    if task.answer is None or not isinstance(task.answer, str):
        raise ValueError(f"the generator {name!r} gives no reference answer, so its scorer cannot be checked")
    scorer = task.verifier
    if not task.answer.strip() or scorer(task, task.answer).score != 1.0:
        raise ValueError(f"the scorer of {name!r} does not accept its own reference answer {task.answer[:80]!r}")
    for junk in (*JUNK, str(task.messages[-1]["content"])):
        if _same(junk, task.answer):
            continue
        try:
            score = scorer(task, junk).score
        except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, AttributeError, SyntaxError):
            continue  # a scorer that raises is an error verdict of 0 in the pool
        if score == 1.0:
            raise ValueError(f"the scorer of {name!r} gives full marks to {junk[:40]!r}, expected {task.answer[:40]!r}")


def _same(junk: str, answer: str) -> bool:
    number = final_number(junk)
    return junk.casefold() == answer.strip().casefold() or (number is not None and number == final_number(answer))


@lru_cache(maxsize=16)
def _dataset(name: str, config: str):
    return reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(config))
