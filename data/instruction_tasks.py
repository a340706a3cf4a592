"""Short questions with constraints on the form of the answer, for models that can answer in a dozen tokens."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import NamedTuple

import numpy as np

from .instruction_topics import TOPICS
from .task import Task
from .tasks import build_task, check_index, prompt_messages
from .verify import constraints, formats
from .verify.instructions import Constraint, Follow, describe, violations

TRIED_WORDS = 12  # accepted answers tried for one that passes
QUESTIONS = ("Name {}.", "Tell me the name of {}.", "Give me an example of {}.", "What is the name of {}?")


class Case(NamedTuple):
    """A constraint, and a way to make a plain answer satisfy it."""

    constraint: Constraint
    rewrite: Callable[[str], str]


def _padded(count: int, answer: str) -> str:
    openings = ("", "Perhaps ", "I choose ", "I would choose ", "I would gladly choose ")
    missing = count - len(constraints.words(answer))
    return openings[missing] + answer if 0 <= missing < len(openings) else answer


_LONG = "If you ask me about it, then I would say that my answer is {}"

KINDS: dict[str, tuple[Case, ...]] = {
    "capitals": (Case(constraints.AllCapitals(), str.upper),),
    "lowercase": (Case(constraints.AllLowercase(), str.lower),),
    "words_exactly": tuple(Case(constraints.WordsExactly(count), partial(_padded, count)) for count in (2, 3, 4, 5)),
    "words_at_least": tuple(Case(constraints.WordsAtLeast(count), _LONG.format) for count in (6, 8, 10)),
    "words_at_most": tuple(Case(constraints.WordsAtMost(count), str) for count in (2, 3, 4)),
    "sentences": (Case(constraints.SentencesExactly(2), "{}. That is my answer.".format),),
    "keyword": tuple(
        Case(constraints.IncludeKeywords((word,)), f"{{}} {word}".format) for word in ("because", "today", "very", "my")
    ),
    "start_with": tuple(
        Case(constraints.StartsWith(phrase), f"{phrase} {{}}".format)
        for phrase in ("Sure,", "My answer:", "Well,", "Hello!")
    ),
    "end_with": tuple(
        Case(constraints.EndsWith(phrase), f"{{}}. {phrase}".format)
        for phrase in ("Done.", "That is all.", "Thank you.", "The end.")
    ),
    "without_letter": tuple(Case(constraints.WithoutLetter(letter), str) for letter in "eaoi"),
    "quotes": (Case(formats.InDoubleQuotes(), '"{}"'.format),),
    "brackets": (Case(formats.InBrackets(), "[{}]".format),),
    "bullets": (Case(formats.BulletsExactly(2), "* {0}\n* {0}".format),),
    "highlight": (Case(formats.HighlightsAtLeast(1), "*{}*".format),),
    "title": (Case(formats.TitleInAngles(), "<<Answer>> {}".format),),
    "json": (Case(formats.JsonFormat(), lambda answer: json.dumps({"answer": answer})),),
    "two_answers": (Case(formats.TwoResponses(), "{} ****** I do not know".format),),
    "postscript": (Case(formats.Postscript(), "{}. P.S. I like it.".format),),
}
ALL_KINDS = tuple(KINDS)


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """ "Name a fruit. Answer in ALL CAPITAL letters.": a topic, and `num_constraints` constraints of different kinds.

    Each kind of constraint (see `ALL_KINDS`) meets every topic in four wordings, about 200 prompts; with two
    constraints a prompt, each pair of kinds does. The answer must name something of the topic and satisfy all
    constraints, so that a policy cannot collapse to one text. Every task comes with an answer that passes; combinations
    without any are left out. The order is seeded.
    """

    kinds: tuple[str, ...] = ALL_KINDS
    num_constraints: int = 1
    system: str | None = "Answer briefly."
    seed: int = 0

    def __post_init__(self):
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds or len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"Instructions kinds must be distinct ones of {', '.join(ALL_KINDS)}, got {self.kinds}")
        if not 1 <= self.num_constraints <= min(2, len(self.kinds)):
            raise ValueError(
                f"Instructions num_constraints must be 1, or 2 with at least two kinds, got {self.num_constraints} "
                f"with {len(self.kinds)} kinds"
            )

    @property
    def domain(self) -> str:
        return "instructions"

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Task:
        question, demands, topic, answer = self._prompts[check_index(index, len(self))]
        prompt = f"{question} {describe(demands)}"
        return build_task(
            self.domain,
            prompt_messages(prompt, self.system),
            Follow((constraints.OnTopic(TOPICS[topic]), *demands)),
            answer=answer,
        )

    @cached_property
    def _prompts(self) -> list[tuple[str, tuple[Constraint, ...], str, str]]:
        """(question, constraints, topic, an answer that passes) of every task."""
        prompts = []
        for kinds in itertools.combinations(self.kinds, self.num_constraints):
            for (row, topic), (column, question) in itertools.product(enumerate(TOPICS), enumerate(QUESTIONS)):
                turns = tuple((row + column) % len(KINDS[kind]) for kind in kinds)
                answer = _passing_answer(topic, kinds, turns)
                if answer is not None:
                    demands = tuple(case.constraint for case in _cases(kinds, turns))
                    prompts.append((question.format(topic), demands, topic, answer))
        order = np.random.default_rng(self.seed).permutation(len(prompts))
        return [prompts[position] for position in order]


def _cases(kinds: Sequence[str], turns: Sequence[int]) -> list[Case]:
    return [KINDS[kind][turn] for kind, turn in zip(kinds, turns, strict=True)]


@cache
def _passing_answer(topic: str, kinds: tuple[str, ...], turns: tuple[int, ...]) -> str | None:
    """An answer on the topic that satisfies the cases; None where no order of rewriting reaches one."""
    cases = _cases(kinds, turns)
    demands = [constraints.OnTopic(TOPICS[topic]), *(case.constraint for case in cases)]
    for word, order in itertools.product(TOPICS[topic][:TRIED_WORDS], itertools.permutations(cases)):
        answer = word.capitalize()
        for case in order:
            answer = case.rewrite(answer)
        if not violations(demands, answer):
            return answer
    return None
