"""The laws of filters and of the funnel, on one set of rows in which everything that filters look for occurs."""

import json
import random
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
from rows import make_row
from test_filters import LOOP, STORY, Questions

from posttrain.data import streams
from posttrain.data.arithmetic import Arithmetic
from posttrain.data.filters import contamination, duplicates, funnel, language, outcome, repetition, wording
from posttrain.data.row import Row
from posttrain.launch import recipe

GOOD = "<think>Two and two are four, as everybody knows.</think>The answer is 4, because 2 + 2 is 4."
TEXTS = [
    GOOD,
    GOOD + " So it is.",
    "<think>hm",
    LOOP * 12,
    "A paragraph of some words\nin two lines\n\n" * 12,
    "one two three four five six seven eight nine ten " * 51,
    "Das ist die Antwort auf die Frage, und sie ist nicht schwer zu finden, wenn man es weiß.",
    "二加二等于四，所以答案是四。",
    "I'm sorry, but I can't help with that.",
    "I am ChatGPT, a model.",
    "My knowledge cutoff is 2021.",
    f"It is like this: {STORY}",
    "",
]
QUESTIONS = ["What is 2 + 2?", "Name the sum of 2 and 2, please."]
LONG = "There are two apples and then two more apples on the table in the kitchen. How many apples are on it {}?"
QUESTIONS += [LONG.format("by now"), LONG.format("today")]


def mixed_rows() -> list[Row]:
    """Every text as an answer to every question, with all kinds of scores, lengths, licences and rewards."""
    rows = []
    draw = random.Random(5)
    for number, (question, text) in enumerate(
        (question, text) for question in QUESTIONS for text in [GOOD] * 5 + TEXTS
    ):
        rows.append(
            make_row(
                text,
                question,
                id=f"{number:03}",
                domain=("maths", "chat")[number % 2],
                score=draw.choice([1.0, 1.0, 1.0, 0.5, None]),
                reward=draw.choice([0.5, 1.0, 1.5]),
                pass_rate=draw.choice([0.0, 0.25, 0.5, 1.0]),
                num_tokens=len(text) // 4,
                finish=draw.choice(["stop", "stop", "stop", "length"]),
                licences=draw.choice([("MIT",), ("MIT",), ("mit",), ("CC-BY-NC-4.0", "MIT"), ()]),
            )
        )
    return rows


ROW_FILTERS = [
    outcome.Verified(unverified=("chat",)),
    outcome.Finished(),
    outcome.ToolCallsResolved(),
    outcome.Length(min_tokens=1, max_tokens=100),
    outcome.DifficultyBand(lowest=0.1),
    outcome.Licensed(allowed=("MIT",)),
    repetition.RepeatedSentences(),
    repetition.RepeatedParagraphs(),
    repetition.RepeatedPhrases(),
    language.Scripts(),
    language.Languages(),
    language.PromptLanguage(),
    wording.Refusals(),
    wording.Identity(),
    wording.KnowledgeDates(),
    contamination.Decontaminated(evaluations=(Questions(STORY),)),
]
FILTERS = [
    *ROW_FILTERS,
    duplicates.NearDuplicateResponses(),
    duplicates.NearDuplicatePrompts(),
    outcome.ShortestCorrect(count=2),
    outcome.BestByReward(),
    funnel.InDomains(domains=("chat",), filter=outcome.BestByReward(count=2)),
]
PIPELINE = (*ROW_FILTERS, outcome.BestByReward(), duplicates.NearDuplicatePrompts())


def ids(rows) -> list[str]:
    return [row.id for row in rows]


@pytest.mark.parametrize("filter", FILTERS, ids=funnel.names(FILTERS))
def test_what_a_filter_drops_does_not_depend_on_the_order_of_rows(filter):
    rows = mixed_rows()
    why = {row.id: reason for row, reason in zip(rows, filter.reasons(rows), strict=True)}
    random.Random(0).shuffle(rows)
    assert {row.id: reason for row, reason in zip(rows, filter.reasons(rows), strict=True)} == why


@pytest.mark.parametrize("filter", FILTERS, ids=funnel.names(FILTERS))
def test_a_filter_run_twice_keeps_what_it_kept(filter):
    once = funnel.funnel(mixed_rows(), [filter])
    assert once.dropped or isinstance(filter, outcome.ToolCallsResolved)
    assert funnel.funnel(once.kept, [filter]).kept == once.kept


@pytest.mark.parametrize("filter", FILTERS, ids=funnel.names(FILTERS))
def test_every_row_is_kept_or_dropped_with_a_reason(filter):
    rows = mixed_rows()
    found = funnel.funnel(rows, [filter])
    assert sorted([*ids(found.kept), *(item.row.id for item in found.dropped)]) == ids(rows)
    assert all(item.reason and item.filter == funnel.names([filter])[0] for item in found.dropped)


@pytest.mark.parametrize("filter", FILTERS, ids=funnel.names(FILTERS))
def test_a_filter_has_nothing_to_drop_from_nothing(filter):
    assert filter.reasons([]) == []
    assert funnel.funnel([], [filter]) == funnel.Funnel(kept=(), dropped=(), steps=())


@pytest.mark.parametrize("filter", FILTERS, ids=funnel.names(FILTERS))
def test_a_filters_settings_are_plain_json_as_those_of_a_stage(filter):
    evaluated = isinstance(filter, contamination.Decontaminated)  # its stand-in for a task source has no settings
    filter = replace(filter, evaluations=(Arithmetic(),)) if evaluated else filter
    described = funnel.describe(filter)
    assert json.loads(json.dumps(described)) == described == recipe.settings(filter)
    assert described["kind"] == type(filter).__name__


def test_filters_of_single_rows_commute():
    rows = mixed_rows()
    kept = set(ids(funnel.funnel(rows, ROW_FILTERS).kept))
    assert kept
    for seed in range(3):
        shuffled = random.Random(seed).sample(ROW_FILTERS, len(ROW_FILTERS))
        assert set(ids(funnel.funnel(rows, shuffled).kept)) == kept
    for three in permutations(ROW_FILTERS[:3]):
        assert funnel.funnel(rows, three).kept == funnel.funnel(rows, ROW_FILTERS[:3]).kept


def test_the_best_of_n_must_come_after_what_drops_wrong_rows():
    rows = [make_row("wrong", id="1", score=0.0, reward=9.0), make_row("right", id="2", reward=1.0)]
    best, verified = outcome.BestByReward(), outcome.Verified()
    assert ids(funnel.funnel(rows, [verified, best]).kept) == ["2"]
    assert ids(funnel.funnel(rows, [best, verified]).kept) == []


def test_the_whole_funnel_is_the_same_for_any_order_of_rows_and_loses_none():
    rows = mixed_rows()
    found = funnel.funnel(rows, PIPELINE)
    assert len(found.kept) > 1
    assert {item.filter for item in found.dropped} >= {"Verified", "BestByReward", "NearDuplicatePrompts"}
    assert sorted([*ids(found.kept), *(item.row.id for item in found.dropped)]) == ids(rows)
    assert funnel.funnel(reversed(rows), PIPELINE) == found


def test_the_steps_account_for_every_row_of_every_domain():
    rows = mixed_rows()
    found = funnel.funnel(rows, PIPELINE)
    for domain in ("maths", "chat"):
        steps = [step for step in found.steps if step.domain == domain]
        assert [step.filter for step in steps] == funnel.names(PIPELINE)
        assert steps[0].rows == sum(row.domain == domain for row in rows)
        for before, after in pairwise(steps):
            assert after.rows == before.rows - before.dropped
        assert steps[-1].rows - steps[-1].dropped == sum(row.domain == domain for row in found.kept)
        for step in steps:
            gone = [item for item in found.dropped if item.filter == step.filter and item.row.domain == domain]
            assert len(gone) == step.dropped


def test_a_filter_for_some_domains_does_not_see_the_others():
    rows = [make_row(id="1", reward=1.0), make_row(id="2", reward=None), make_row(id="3", domain="chat", reward=None)]
    only = funnel.InDomains(domains=("chat",), filter=outcome.Verified(passing=0.5))
    assert only.reasons([*rows[:2], replace(rows[2], score=0.0, reason="no")]) == [
        None,
        None,
        "scores 0, less than 0.5: no",
    ]
    with pytest.raises(ValueError, match="row '3' has no reward"):
        funnel.InDomains(domains=("chat",), filter=outcome.BestByReward()).reasons(rows)


def test_filters_of_one_class_are_told_apart():
    filters = [outcome.Finished(), outcome.Length(max_tokens=5), outcome.Length(max_tokens=9)]
    assert funnel.names(filters) == ["Finished", "Length 1", "Length 2"]
    named = funnel.names([funnel.InDomains(domains=("chat", "code"), filter=outcome.Finished())])
    assert named == ["Finished (chat, code)"]


def test_two_rows_with_one_id_are_an_error():
    with pytest.raises(ValueError, match="two rows have the id 'a'; give each row an id of its own"):
        funnel.funnel([make_row(), make_row("another")], [])


def test_no_filters_keep_everything():
    rows = mixed_rows()
    assert funnel.funnel(rows, []) == funnel.Funnel(kept=tuple(streams.in_order(rows)), dropped=(), steps=())
