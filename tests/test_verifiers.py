"""Verifiers: right answers pass in every spelling, and nothing else does."""

import dataclasses
import itertools

import pytest

from posttrain.data.instruction_tasks import ALL_KINDS, KINDS
from posttrain.data.task import Task
from posttrain.data.tasks import build_task, prompt_messages
from posttrain.data.verify import constraints, formats
from posttrain.data.verify.choice import Choice
from posttrain.data.verify.instructions import Follow, FollowShare, describe, violations
from posttrain.data.verify.maths import BoxedNumber, FinalNumber, boxed, final_number
from posttrain.data.verify.symbolic import MathVerify
from posttrain.data.verify.text import ExactText

PROMPT = "What is it? A) 7 B) 1/2"
GARBAGE = (
    "",
    "  \n\t",
    "zxqj garbage answer",
    "\x00",
    "!!!",
    "()",
    "\\boxed{",
    "\\boxed{}",
    "<answer></answer>",
    "{",
    "🙂" * 50,
)


def task_of(verifier, answer: str | None) -> Task:
    return build_task("test", prompt_messages(PROMPT, "Be brief."), verifier, answer=answer)


def score(verifier, answer: str | None, response: str) -> float:
    return verifier(task_of(verifier, answer), response).score


@pytest.mark.parametrize(
    "verifier, answer",
    [
        (FinalNumber(), "7"),
        (FinalNumber(), "1/2"),
        (BoxedNumber(), "\\boxed{7}"),
        (MathVerify(), "7"),
        (MathVerify(), "\\frac{1}{2}"),
        (MathVerify(), "\\text{even}"),
        (Choice(), "A"),
        (ExactText(), "Paris"),
        (Follow((constraints.AllCapitals(), constraints.OnTopic(("fig",)))), "FIG"),
        (FollowShare((constraints.EndsWith("Done."), constraints.StartsWith("So"))), "So fig. Done."),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_the_reference_answer_passes_and_junk_does_not(verifier, answer):
    assert score(verifier, answer, answer) == 1.0
    for junk in (*GARBAGE, PROMPT, f" {PROMPT}\n", "Be brief."):
        assert score(verifier, answer, junk) == 0.0, junk


@pytest.mark.parametrize(
    "answer, response",
    [
        ("5", "5"),
        ("5", "3 + 2 = 5."),
        ("5", "What is 3 + 2? It is **5**"),
        ("5", "The answer is \\boxed{5}, and not 7"),
        ("5", "first \\boxed{4}, no: \\boxed{5}"),
        ("-3", "It is -3."),
        ("-3", "It is \u22123"),
        ("3", "7 - 3"),
        ("-5", "-$5"),
        ("1/2", "0.5"),
        ("0.5", "\\frac{1}{2}"),
        ("0.5", "\\boxed{\\dfrac{2}{4}}"),
        ("0.1", "1/10"),
        ("1234", "1,234"),
        ("1,234.50", "$1234.5"),
        ("3", "[1, 2, 3]"),
        ("50", "50%"),
        ("1500", "1.5e3"),
        ("72", "so many\n#### 72"),
        ("#### 72", "72"),
    ],
)
def test_the_final_number_is_read_and_compared_as_a_rational(answer, response):
    assert score(FinalNumber(), answer, response) == 1.0


@pytest.mark.parametrize(
    "answer, response",
    [
        ("5", "5 or 6"),
        ("5", "It is 5. Or 4."),
        ("5", "\\boxed{} 5"),
        ("5", "5 \\boxed{6}"),
        ("5", "five"),
        ("5", "5.0001"),
        ("5", "15"),
        ("5", "5/0"),
        ("3", "-3"),
        ("0.3333", "1/3"),
        ("5", "\u0665"),
        ("1", "1" + "0" * 5000),
    ],
)
def test_another_final_number_fails(answer, response):
    assert score(FinalNumber(), answer, response) == 0.0


def test_a_boxed_number_needs_its_box():
    assert score(BoxedNumber(), "5", "\\boxed{5}") == 1.0
    assert score(BoxedNumber(), "5", "5") == 0.0


def test_boxes_are_read_with_their_braces_balanced():
    assert boxed("a \\boxed{\\frac{1}{2}} b") == "\\frac{1}{2}"
    assert boxed("\\boxed{1} \\boxed{2 {") == "1"
    assert boxed("none") is None
    assert final_number("no digits") is None


def test_a_task_without_a_usable_answer_is_an_error():
    for verifier in (FinalNumber(), MathVerify(), Choice(), ExactText()):
        with pytest.raises(ValueError, match="has no answer"):
            score(verifier, None, "5")
    with pytest.raises(ValueError, match="holds no number"):
        score(FinalNumber(), "seven", "7")
    with pytest.raises(ValueError, match="not one of the letters"):
        score(Choice(), "E", "A")


@pytest.mark.parametrize(
    "answer, right, wrong",
    [
        ("\\frac{1}{2}", "The answer is $0.5$.", "The answer is $0.6$."),
        ("\\{1, 2\\}", "\\{2, 1\\}", "\\{1, 2, 3\\}"),
        ("x^2+2x+1", "\\boxed{(x+1)^2}", "\\boxed{(x+1)^3}"),
        ("2\\sqrt{3}", "So it is\n$\\sqrt{12}$", "$\\sqrt{13}$"),
        ("[1, 2)", "\\boxed{[1, 2)}", "\\boxed{[1, 2]}"),
        ("3", "The answer is 3 apples.", "The answer is 4 apples."),
        ("6", "\\boxed{6}", "5, 6, 7"),
        ("40", "The answer is $x = 40$", "The answer is $40$ or $50$"),
        ("\\$15", "15", "16"),
    ],
)
def test_formulas_are_compared_by_their_value(answer, right, wrong):
    assert score(MathVerify(), answer, right) == 1.0
    assert score(MathVerify(), answer, wrong) == 0.0


@pytest.mark.parametrize(
    "response",
    [
        "B",
        "(B)",
        "b",
        "**B**",
        "B.",
        "B. Paris",
        "B) Paris, not Rome",
        "The answer is B",
        "the answer is (B).",
        "Answer: B",
        "The answer is B because Rome is not",
        "\\boxed{B}",
        "\\boxed{\\text{(B)}}",
        "A dog would say so, (B) is right",
    ],
)
def test_a_choice_is_recognised(response):
    assert score(Choice(), "B", response) == 1.0
    assert score(Choice(), "C", response) == 0.0


@pytest.mark.parametrize(
    "response",
    [
        "A dog",
        "A) Rome B) Paris",
        "Answer: A or B",
        "The answer is A. No, the answer is B.",
        "\\boxed{A, B}",
        "ABCD",
        "E",
        "The answer is A dog",
        "A B C D",
        "I like A and B",
        "A. B. C. D.",
    ],
)
@pytest.mark.parametrize("answer", "ABCD")
def test_no_choice_and_several_choices_earn_nothing(response, answer):
    assert score(Choice(), answer, response) == 0.0


@pytest.mark.parametrize(
    "question, answer, echo",
    [
        ("Evaluate $\\log_2 64$.", "6", "It is $\\log_2 64$."),
        ("Write $\\frac{6}{8}$ in lowest terms.", "\\frac34", "\\boxed{\\frac{6}{8}}"),
        ("What is 12 + 30?", "42", "The answer is 12 + 30."),
        ("Factor $7x^2-63$.", "7(x+3)(x-3)", "$7x^2 - 63$"),
    ],
)
def test_the_expression_that_is_to_be_worked_out_is_no_answer(question, answer, echo):
    task = build_task("test", prompt_messages(question), MathVerify(), answer=answer)
    assert task.verifier(task, f"\\boxed{{{answer}}}").score == 1.0
    assert task.verifier(task, echo) == (0.0, "repeats an expression of the question")
    larger = build_task(
        "test", prompt_messages("Which is larger, $2^{10}$ or $10^2$?"), MathVerify(), answer="$2^{10}$"
    )
    assert larger.verifier(larger, "$2^{10}$").score == 1.0


def test_exact_text_forgives_case_spacing_quotes_and_a_period():
    assert score(ExactText(), "New York", ' "new  york". ') == 1.0
    assert score(ExactText(), "New York", "New York City") == 0.0


# For each constraint, responses that keep it and responses that break it, at the edges.
EDGES = [
    (constraints.AllLowercase(), ["fig.", "a 1"], ["Fig", "123", "!"]),
    (constraints.AllCapitals(), ["FIG.", "A 1"], ["Fig", "FIG and", "123"]),
    (
        constraints.WordsExactly(3),
        ["one two three", "it's a well-known", "one. two, three!"],
        ["one two", "a b c d", "..."],
    ),
    (constraints.WordsAtLeast(3), ["one two three", "a b c d"], ["one two", ". . . ."]),
    (constraints.WordsAtMost(3), ["one", "one two three"], ["a b c d", "!"]),
    (
        constraints.SentencesExactly(2),
        ["It is. Is it?", 'He said "no." I agree!', "Pi is 3.14. Yes."],
        ["One.", "One. two", "A. B. C."],
    ),
    (constraints.IncludeKeywords(("fig", "nut")), ["A Fig, a nut."], ["a fig", "figs nuts", "a figment, nut"]),
    (constraints.KeywordAtLeast("fig", 2), ["fig and Fig"], ["fig", "figfig", "figs, fig"]),
    (constraints.OnTopic(("fig", "peach")), ["FIG", "two figs", "Peaches!"], ["figment", "config", "plum"]),
    (constraints.ForbidWords(("fig",)), ["figment", "plum"], ["a Fig."]),
    (constraints.StartsWith("Well,"), ["Well, fig", "Well,fig"], ["Well,", "well, fig", "Oh Well, fig", "Well, !"]),
    (constraints.StartsWith("So"), ["So fig"], ["Sofa fig", "So"]),
    (constraints.EndsWith("Done."), ["fig. Done."], ["Done.", "fig. Done", "Done. fig", "fig. done.", "figDone."]),
    (constraints.LetterAtLeast("e", 2), ["Eve", "peer"], ["fig", "pear"]),
    (constraints.WithoutLetter("e"), ["fig"], ["PEAR", "pear", "!"]),
    (constraints.NoCommas(), ["fig"], ["a, b", "."]),
    (constraints.NoDigits(), ["fig"], ["1 fig", "-"]),
    (formats.InDoubleQuotes(), ['"fig"'], ["fig", '"fig', '"fig" "nut"', '""', '"', "'fig'", '"fig".']),
    (formats.InBrackets(), ["[fig]"], ["fig", "[fig", "[fig] [nut]", "[]", "[fig]."]),
    (
        formats.BulletsExactly(2),
        ["* fig\n* nut", "Two:\n- fig\n - nut"],
        ["* fig", "* a\n* b\n* c", "fig * nut", "*fig\n*nut"],
    ),
    (
        formats.JsonFormat(),
        ['{"a": 1}', '```json\n{"a": 1}\n```'],
        ["{}", "[1]", "1", "fig", '{"a": 1} fig', "[" * 9999],
    ),
    (formats.TitleInAngles(), ["<<Fruit>> fig"], ["<<Fruit>>", "<Fruit> fig", "<<>> fig", "<<!>> fig"]),
    (
        formats.TwoResponses(),
        ["fig ****** nut", "fig\n******\nnut"],
        ["fig", "fig ****** fig", "a ****** b ****** c", "fig ******"],
    ),
    (formats.PlaceholdersAtLeast(2), ["[name] [town]"], ["[name]", "[] []", "name town"]),
    (formats.HighlightsAtLeast(1), ["a *fig*", "**fig** it is"], ["fig", "* fig", "**", "a * b * c"]),
    (formats.ParagraphsExactly(2), ["fig\n***\nnut"], ["fig", "fig *** nut", "fig\n***\n", "a\n***\nb\n***\nc"]),
    (formats.Postscript(), ["Fig. P.S. I like it."], ["fig", "P.S. fig", "fig P.S.", "fig p.s. nut"]),
    (constraints.CapitalWordsAtLeast(2), ["FIG and NUT"], ["FIG", "I A", "fig nut"]),
]


@pytest.mark.parametrize("constraint, kept, broken", EDGES, ids=lambda value: getattr(type(value), "__name__", ""))
def test_a_constraint_holds_exactly_where_it_should(constraint, kept, broken):
    for response in kept:
        assert constraint.holds(response), response
    for response in broken:
        assert not constraint.holds(response), response


def test_every_constraint_is_tried_at_its_edges_and_describes_itself():
    tried = {type(constraint) for constraint, _, _ in EDGES}
    written = {
        value for module in (constraints, formats) for value in vars(module).values() if dataclasses.is_dataclass(value)
    }
    assert tried == written and len(written) >= 12
    sentences = [constraint.describe() for constraint, _, _ in EDGES if not isinstance(constraint, constraints.OnTopic)]
    assert len(set(sentences)) == len(sentences)
    assert all(sentence[0].isupper() and len(constraints.words(sentence)) >= 4 for sentence in sentences)


def test_follow_is_all_or_nothing_and_share_counts():
    both = (constraints.AllCapitals(), constraints.EndsWith("DONE."))
    for response, follow, share in [
        ("FIG DONE.", 1.0, 1.0),
        ("fig DONE.", 0.0, 0.5),
        ("fig", 0.0, 0.0),
        ("", 0.0, 0.0),
    ]:
        assert score(Follow(both), None, response) == follow
        assert score(FollowShare(both), None, response) == share
    assert violations(both, " FIG DONE.\n") == []
    assert describe(both) == "Answer in ALL CAPITAL letters. End your answer with 'DONE.'."
    with pytest.raises(ValueError, match="at least one constraint"):
        Follow(())


def test_no_constraint_accepts_a_blank_response():
    for kind, case in itertools.chain.from_iterable(zip([kind] * 9, KINDS[kind], strict=False) for kind in ALL_KINDS):
        for blank in ("", " ", "\n\t\n"):
            assert score(Follow((case.constraint,)), None, blank) == 0.0, kind
            assert score(FollowShare((case.constraint,)), None, blank) == 0.0, kind
