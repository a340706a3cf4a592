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
from .verify.maths import boxed

try:
    import reasoning_gym
except ImportError as error:
    raise ImportError("ReasoningGym needs the reasoning-gym package: pip install 'posttrain[tasks]'") from error

ANSWER_TAGS = "Give the final answer inside <answer> and </answer>."
AUDITED_ITEMS = 3
GARBAGE = "zxqj garbage answer"

# Items differ between two processes with the same seed (60 items, two string hash seeds, reasoning-gym 0.1.25).
UNSTABLE = (
    "codeio",
    "intermediate_integration",
    "isomorphic_strings",
    "knight_swap",
    "list_functions",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
)

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
        score = float(_dataset(self.name, self.config).score_answer(answer, dict(task.metadata["entry"])))
        if score >= 1.0 - 1e-6:
            return Verdict(1.0, "correct")
        return Verdict(0.0, f"answered {answer[:40]!r}, expected {expected[:40]!r}")


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """`size` tasks of the reasoning-gym generator `name`, with its `config` (the generator's own settings).

    `suffix` is put under every question, for instance ANSWER_TAGS. Refused with the reason: a generator that is not
    known, whose items differ between processes, that gives no reference answer, or whose scorer fails an audit on the
    first items (full marks for the reference answer, not for garbage, blanks or the question itself).
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
        if self.name in UNSTABLE:
            raise ValueError(f"the generator {self.name!r} gives other items in every process: choose another")
        if self.size < 1:
            raise ValueError(f"ReasoningGym needs a size of at least 1, got {self.size}")
        if {"size", "seed"} & set(self.config):
            raise ValueError("give size and seed as ReasoningGym's own settings, not in its config")
        for index in range(min(AUDITED_ITEMS, self.size)):
            _audit(self[index], self.name)

    @property
    def domain(self) -> str:
        return f"reasoning_gym/{self.name}"

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
    for junk in (GARBAGE, "", "0 0 0", "True", str(task.messages[-1]["content"])):
        if junk.strip() == task.answer.strip():
            continue
        try:
            score = scorer(task, junk).score
        except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, AttributeError):
            continue  # a scorer that raises is an error verdict of 0 in the pool
        if score == 1.0:
            raise ValueError(f"the scorer of {name!r} gives full marks to {junk[:40]!r}, expected {task.answer[:40]!r}")


@lru_cache(maxsize=16)
def _dataset(name: str, config: str):
    return reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(config))
