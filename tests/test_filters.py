"""Every filter drops what it is for, says why, keeps what only looks like it, and has nothing to say to nothing."""

import random

import pytest
from rows import make_row

from posttrain.data.arithmetic import Arithmetic
from posttrain.data.filters import contamination, duplicates, language, outcome, repetition, wording
from posttrain.data.row import Row, answered, thought, with_pass_rates, written
from posttrain.data.tasks import build_task
from posttrain.data.verify.text import ExactText


class Questions:
    """An evaluation set of the given questions."""

    def __init__(self, *questions: str, system: str | None = None):
        self._questions, self._system = questions, system

    @property
    def domain(self) -> str:
        return "exam"

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int):
        question = {"role": "user", "content": self._questions[index]}
        messages = (question,) if self._system is None else ({"role": "system", "content": self._system}, question)
        return build_task("exam", messages, ExactText(), answer="4", id=f"q{index}")


def reason(filter, row: Row) -> str | None:
    [found] = filter.reasons([row])
    return found


def test_thinking_is_told_from_the_answer_in_every_form_that_models_write():
    assert thought({"role": "assistant", "content": "<think>hm</think>4"})[:2] == ("hm", "4")
    assert thought({"role": "assistant", "content": "hm</think>4"})[:2] == ("hm", "4")
    assert thought({"role": "assistant", "content": "4", "reasoning_content": "hm"})[:2] == ("hm", "4")
    assert thought({"role": "assistant", "content": "4"}) == (None, "4", None)
    assert thought({"role": "assistant", "content": None, "tool_calls": [{}]}) == (None, "", None)


def test_what_the_assistant_wrote_leaves_out_tools_and_what_it_answered_its_thinking():
    row = make_row(
        response=(
            {"role": "assistant", "content": "<think>look it up</think>", "tool_calls": [{"function": {"name": "f"}}]},
            {"role": "tool", "content": "loop loop"},
            {"role": "assistant", "content": "It is 4.", "reasoning_content": "so"},
        )
    )
    assert "loop" not in written(row) and "look it up" in written(row) and "so" in written(row)
    assert answered(row) == "It is 4."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "row 'a' has an empty prompt or response"),
        ({"response": ()}, "row 'a' has an empty prompt or response"),
        ({"score": 1.5}, r"the score of row 'a' is 1.5; give a number in \[0, 1\]"),
        ({"pass_rate": float("nan")}, "the pass_rate of row 'a' is nan"),
        ({"reward": float("inf")}, "the reward of row 'a' is inf; give a finite number"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_row(**changes)


def test_pass_rates_are_shares_of_the_prompts_own_answers():
    rows = [make_row(id=str(i), question=q, score=s) for i, (q, s) in enumerate([("a", 1), ("a", 0.5), ("b", 0)])]
    rows.append(make_row(id="chat", question="c", score=None, pass_rate=0.25))
    assert [row.pass_rate for row in with_pass_rates(rows)] == [0.5, 0.5, 0.0, 0.25]
    assert [row.pass_rate for row in with_pass_rates(rows, passing=0.5)][:2] == [1.0, 1.0]


def test_wrong_and_unverified_answers_are_dropped_by_the_bar_of_their_domain():
    bars = outcome.Verified(by_domain={"chat": 0.5}, unverified=("poems",))
    assert reason(bars, make_row()) is None
    assert reason(bars, make_row(score=0.9, reason="5 is not 4")) == "scores 0.9, less than 1: 5 is not 4"
    assert reason(bars, make_row(score=None)) == "has no verdict"
    assert reason(bars, make_row(score=0.5, domain="chat")) is None
    assert reason(bars, make_row(score=None, domain="chat")) == "has no verdict"
    assert reason(bars, make_row(score=None, domain="poems")) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<think>two and two</think>4", None),
        ("two and two</think>4", None),
        ("Use <b>4</b>", None),
        ("", "has an empty answer"),
        (" \n", "has an empty answer"),
        ("<think>hm", "its thinking never ends"),
        ("4 <think>or", "its thinking never ends"),
        ("<think>hm</think>", "has no answer after its thinking"),
        ("<think>hm</think>\n<think>hm</think>4", "it opens or closes its thinking more than once"),
        ("<think>a<think>b</think>4", "it opens or closes its thinking more than once"),
        ("<think>a</think>4</think>", "it opens or closes its thinking more than once"),
    ],
)
def test_unfinished_thinking_is_dropped(text, why):
    assert reason(outcome.Finished(), make_row(text)) == why


def test_an_answer_that_did_not_stop_by_itself_is_dropped():
    assert reason(outcome.Finished(), make_row(finish="length")) == "ended by length"
    assert reason(outcome.Finished(), make_row(finish="aborted")) == "ended by aborted"


CALL = {"id": "1", "function": {"name": "add", "arguments": {"x": 2, "y": 2}}}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "4"}
ANSWER = {"role": "assistant", "content": "4"}
TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {}}},)


def calling(*calls):
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ((calling(CALL), RESULT, ANSWER), None),
        ((ANSWER,), None),
        ((calling(CALL, {**CALL, "id": "2"}), {**RESULT, "tool_call_id": "2"}, RESULT, ANSWER), None),
        ((calling({"function": CALL["function"]}), {"role": "tool", "content": "4"}, ANSWER), None),
        ((calling({**CALL, "function": {"name": "add", "arguments": '{"x": 1}'}}), RESULT, ANSWER), None),
        ((calling(CALL), ANSWER), "goes on before 1 of its tool calls have a result"),
        ((calling(CALL),), "ends before 1 of its tool calls have a result"),
        ((RESULT, ANSWER), "has the result of a call that was not made ('1')"),
        ((calling(CALL), {**RESULT, "tool_call_id": "9"}, ANSWER), "has the result of a call that was not made ('9')"),
        ((calling(CALL), RESULT, RESULT, ANSWER), "has the result of a call that was not made ('1')"),
        ((calling({**CALL, "function": {"name": "rm", "arguments": {}}}),), "calls 'rm', which is not among its tools"),
        (
            (calling({**CALL, "function": {"name": "add", "arguments": "{"}}),),
            "calls 'add' with arguments that are not JSON",
        ),
        (
            (calling({**CALL, "function": {"name": "add", "arguments": "[1]"}}),),
            "calls 'add' with arguments that are not an object",
        ),
    ],
)
def test_tool_calls_without_results_and_results_without_calls_are_dropped(response, why):
    assert reason(outcome.ToolCallsResolved(), make_row(response=response, tools=TOOLS)) == why


def test_an_answer_may_call_tools_but_not_end_with_a_call_or_a_result():
    assert reason(outcome.Finished(), make_row(response=(calling(CALL), RESULT, ANSWER))) is None
    assert reason(outcome.Finished(), make_row(response=(calling(CALL),))) == "ends with a tool call"
    assert reason(outcome.Finished(), make_row(response=(calling(CALL), RESULT))) == "ends with a message of 'tool'"


def test_lengths_are_kept_up_to_both_bounds():
    bounds = outcome.Length(min_tokens=2, max_tokens=4)
    found = [reason(bounds, make_row(num_tokens=n)) for n in (1, 2, 4, 5)]
    assert found == ["has 1 tokens, fewer than 2", None, None, "has 5 tokens, more than 4"]
    with pytest.raises(ValueError, match="Length goes from 5 to 4 tokens"):
        outcome.Length(min_tokens=5, max_tokens=4)


def test_prompts_outside_of_the_difficulty_band_are_dropped():
    band = outcome.DifficultyBand(lowest=0.125, highest=0.625, unverified=("chat",))
    found = [reason(band, make_row(pass_rate=rate)) for rate in (0.0, 0.125, 0.625, 0.75, None)]
    assert found == [
        "its prompt passes in 0.0%, less than 12.5%",
        None,
        None,
        "its prompt passes in 75.0%, more than 62.5%",
        "its prompt has no pass rate",
    ]
    assert reason(band, make_row(pass_rate=None, domain="chat")) is None
    with pytest.raises(ValueError, match="DifficultyBand goes from 0.7 to 0.625"):
        outcome.DifficultyBand(lowest=0.7)


def test_every_licence_of_a_row_must_be_allowed():
    allowed = outcome.Licensed(allowed=("MIT", "Apache-2.0"))
    assert reason(allowed, make_row(licences=("mit", "apache-2.0"))) is None
    assert reason(allowed, make_row(licences=("MIT", "CC-BY-NC-4.0"))) == "licence CC-BY-NC-4.0 is not allowed"
    assert reason(allowed, make_row(licences=())) == "has no licence"


def test_the_best_by_reward_stay_and_the_first_of_equals():
    rows = [make_row(id=id, reward=reward) for id, reward in (("c", 2.0), ("b", 2.0), ("a", 1.0))]
    rows.append(make_row(id="d", reward=-3.0, question="another"))
    why = "is not among its prompt's 1 best by reward"
    assert outcome.BestByReward().reasons(rows) == [why, None, why, None]
    assert outcome.BestByReward(count=2).reasons(rows)[:2] == [None, None]
    with pytest.raises(ValueError, match="row 'a' has no reward; score the rows"):
        outcome.BestByReward().reasons([make_row()])
    with pytest.raises(ValueError, match="BestByReward would keep 0 rows"):
        outcome.BestByReward(count=0)


def test_the_shortest_correct_stays_and_a_shorter_wrong_one_does_not():
    rows = [make_row(id=str(i), num_tokens=n, score=s) for i, (n, s) in enumerate([(9, 1), (5, 1), (2, 0), (5, 1)])]
    rows.append(make_row(id="unverified", num_tokens=1, score=None))
    assert [why is None for why in outcome.ShortestCorrect().reasons(rows)] == [False, True, False, False, False]
    assert [why is None for why in outcome.ShortestCorrect(count=2).reasons(rows)] == [False, True, False, True, False]


LOOP = "Let me check that once more, to be sure of it. "


@pytest.mark.parametrize(
    ("filter", "text", "kept"),
    [
        (repetition.RepeatedSentences(), LOOP * 9, True),
        (repetition.RepeatedSentences(), LOOP * 10, False),
        (repetition.RepeatedSentences(), f"<think>{LOOP * 10}</think>4", False),
        (repetition.RepeatedSentences(), "".join(LOOP.upper() if i % 2 else LOOP for i in range(10)), False),
        (repetition.RepeatedSentences(), "让我再检查一遍这个答案是不是对的。" * 10, False),
        (repetition.RepeatedSentences(), "Yes. No. " * 30, True),
        (repetition.RepeatedSentences(), "```python\n" + "    return False\n" * 30 + "```", True),
        (repetition.RepeatedParagraphs(), "A paragraph of some words\nin two lines\n\n" * 9, True),
        (repetition.RepeatedParagraphs(), "A paragraph of some words\nin two lines\n\n" * 10, False),
        (repetition.RepeatedParagraphs(), "Step.\n\n" * 40, True),
        (repetition.RepeatedPhrases(), "one two three four five six seven eight nine ten " * 49, True),
        (repetition.RepeatedPhrases(), "one two three four five six seven eight nine ten " * 51, False),
        (repetition.RepeatedPhrases(), "wait " * 57, False),
        (repetition.RepeatedPhrases(), "```\n" + "x = x + 1\n" * 80 + "```", False),
        (repetition.RepeatedPhrases(), "我们再算一次看看结果" * 51, False),
        (repetition.RepeatedPhrases(), "ha" * 50, False),
        (repetition.RepeatedPhrases(), "ha" * 49, True),
        (repetition.RepeatedPhrases(), "| " + "-" * 200 + " |\n1" + "0" * 100, True),
    ],
)
def test_texts_that_go_round_in_circles_are_dropped(filter, text, kept):
    assert (reason(filter, make_row(text)) is None) == kept


def test_a_reason_shows_what_is_repeated_and_how_often():
    found = reason(repetition.RepeatedSentences(), make_row(LOOP * 12))
    assert found == "a sentence occurs 12 times: 'let me check that once more, to be sure of it.'"


def test_tool_results_may_repeat_themselves():
    row = make_row(response=(calling(CALL), {**RESULT, "content": LOOP * 100}, ANSWER))
    for filter in (repetition.RepeatedSentences(), repetition.RepeatedParagraphs(), repetition.RepeatedPhrases()):
        assert reason(filter, row) is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The answer is four, because that is what you get if you add two and two.", "en"),
        ("Die Antwort ist vier, weil zwei und zwei zusammen nicht mehr und nicht weniger ergeben.", "de"),
        ("La réponse est quatre, parce que deux et deux font quatre dans tous les cas pour nous.", "fr"),
        ("La respuesta es cuatro, porque el dos y el otro dos son cuatro para todos los que suman.", "es"),
        ("La risposta è quattro, perché il due e il due sono quattro per tutti gli uomini che contano.", "it"),
        ("A resposta é quatro, porque o dois e o outro dois são quatro para todos os que não erram.", "pt"),
        ("Het antwoord is vier, want twee en twee zijn samen vier en dat is niet meer dan het lijkt.", "nl"),
        ("To jest cztery, ale nie dlatego że tak jest w książce, tylko że się to po prostu liczy.", "pl"),
        ("答案是四，因为二加二等于四。", "zh"),
        ("答えは四です。二足す二は四だからです。", "ja"),
        ("Ответ четыре, потому что два плюс два.", "ru"),
        ("정답은 사입니다.", "ko"),
        ("4", None),
        ("", None),
        ("xyzzy plugh foo bar baz quux corge grault garply waldo", None),
        ("```python\nfor x in the_list_of_all_the_words_that_are_in_it: print(x)\n```", None),
        (r"\[ " * 3000, None),
        (r"\[ \text{the sum of the values that we have is the sum of it} \]", None),
    ],
)
def test_a_language_is_told_by_script_or_frequent_words_or_not_at_all(text, code):
    assert language.language(text) == code


def test_letters_of_another_script_are_dropped_from_their_share_on():
    english = "a" * 95
    assert reason(language.Scripts(), make_row(english + "四" * 4)) is None
    assert reason(language.Scripts(), make_row(english + "四" * 5)) == "5% of its letters are of other scripts (Han)"
    assert reason(language.Scripts(), make_row("α + β = γ, so 4")) is None
    assert reason(language.Scripts(allowed=("Han", "Latin")), make_row("四 is 4")) is None
    assert reason(language.Scripts(), make_row("1 + 1 = 2")) is None
    with pytest.raises(ValueError, match=r"Scripts allows \['Klingon'\]; choose among"):
        language.Scripts(allowed=("Klingon",))


def test_a_language_that_is_not_allowed_is_dropped_and_an_unclear_one_kept():
    german = "Das ist die Antwort auf die Frage, und sie ist nicht schwer zu finden, wenn man es weiß."
    assert reason(language.Languages(), make_row(german)) == "is in de"
    assert reason(language.Languages(allowed=("de",)), make_row(german)) is None
    assert reason(language.Languages(), make_row("42")) is None
    with pytest.raises(ValueError, match=r"Languages allows \['tlh'\]"):
        language.Languages(allowed=("tlh",))


def test_an_answer_in_another_language_than_its_prompt_is_dropped():
    english = "What is the sum of the two numbers that you have, and how did you find it?"
    chinese = "<think>二加二等于四，所以答案是四。这个问题很简单。</think>4"
    assert reason(language.PromptLanguage(), make_row(chinese, question=english)) == "answers in zh to en"
    assert reason(language.PromptLanguage(), make_row(chinese, question="二加二等于多少？")) is None
    assert reason(language.PromptLanguage(), make_row("4", question=english)) is None


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I cannot assist with this request.",
        "I am really sorry, but as an AI I have limits.",
        "I cannot provide instructions for this.",
        "I'm unable to help with\nthat.",
        "I must respectfully decline.",
        "I apologize, but I am not able to do this.",
        "<think>This is easy: 4.</think>I won't answer that.",
    ],
)
def test_refusals_are_dropped(text):
    found = reason(wording.Refusals(), make_row(text))
    assert found is not None and found.startswith("refuses: ")


@pytest.mark.parametrize(
    "text",
    [
        "I can't believe how easy this is: 4.",
        "I'm sorry for the delay. The answer is 4.",
        "<think>I can't help with that? Yes I can.</think>The answer is 4.",
        "The clerk said: it is 4. " + "More words. " * 20 + "'I cannot help with that,' he said.",
        "You cannot provide x twice.",
        "",
    ],
)
def test_what_only_sounds_like_a_refusal_is_kept(text):
    assert reason(wording.Refusals(), make_row(text)) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("I am ChatGPT, here to help.", "speaks as ChatGPT: 'I am ChatGPT'"),
        ("I'm a large language model trained by OpenAI.", "speaks as OpenAI: "),
        ("My name is Qwen2.5.", "speaks as Qwen2: "),
        ("I'm Ada, created by Alibaba Cloud.", "speaks as Alibaba Cloud: "),
        ("I am an AI assistant from Anthropic.", "speaks as Anthropic: "),
        ("You are chatting with DeepSeek-R1.", "speaks as DeepSeek-R1: "),
        ("<think>I am Claude, so</think>4", "speaks as Claude: "),
        ("As an AI language model, I have no taste.", "speaks as an AI: 'As an AI'"),
    ],
)
def test_rows_that_speak_as_another_model_are_dropped(text, why):
    found = reason(wording.Identity(), make_row(text))
    assert found is not None and found.startswith(why)


@pytest.mark.parametrize(
    "text",
    [
        "OpenAI was founded in 2015 and created GPT-3.",
        "I was reading about Claude Monet.",
        "I am Claude Monet, a painter.",
        "The angle I am phi degrees away from.",
        "Claude and Gemini are models; Anthropic and Google made them.",
        "An essay as an aid to memory.",
    ],
)
def test_rows_about_models_are_kept(text):
    assert reason(wording.Identity(), make_row(text)) is None


def test_the_students_own_name_is_kept_and_its_makers_must_be_named_too():
    text = "I'm Qwen, created by Alibaba Cloud."
    found = reason(wording.Identity(own=("qwen",)), make_row(text))
    assert found is not None and found.startswith("speaks as Alibaba Cloud")
    assert reason(wording.Identity(own=("qwen", "alibaba cloud")), make_row(text)) is None


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("As of my last update in April 2023, the answer is 4.", False),
        ("My knowledge cutoff is 2021.", False),
        ("I was trained on data up to September 2021.", False),
        ("My training only goes up to 2022.", False),
        ("I don't have access to real-time information.", False),
        ("The software's last update in 2023 fixed that.", True),
        ("I was trained in judo.", True),
        ("My knowledge of history is good.", True),
        ("As of my last visit in 2023, it was open.", True),
        ("", True),
    ],
)
def test_dates_of_a_models_knowledge_are_dropped(text, kept):
    assert (reason(wording.KnowledgeDates(), make_row(text)) is None) == kept


STORY = (
    "A farmer has twelve cows in one field and thirty sheep in another. On Monday he sells a third of his cows and buys"
    " ten more sheep from his neighbour. How many animals does the farmer have in his two fields on Monday evening?"
)


def test_of_near_duplicate_prompts_one_stays_with_all_its_answers():
    reworded = STORY.replace("On Monday he", "on monday HE").replace("evening?", "night?")
    rows = [
        make_row(id="1", question=STORY, prompt_id="p1"),
        make_row(id="2", question=STORY, prompt_id="p1"),
        make_row(id="3", question=reworded, prompt_id="p2"),
        make_row(id="4", question="How many cows are there?", prompt_id="p3"),
    ]
    found = duplicates.NearDuplicatePrompts().reasons(rows)
    assert found[:2] == [None, None] and found[3] is None
    assert found[2] is not None and found[2].startswith("its prompt is like p1 (Jaccard 0.9")


def test_sums_that_differ_in_a_number_are_no_duplicates():
    rows = [make_row(id=str(i), question=f"What is {i} + {j}?") for i in range(10) for j in [i, i + 1]]
    rows = [make_row(id=f"{n}", question=row.prompt_id) for n, row in enumerate(rows)]
    assert duplicates.NearDuplicatePrompts().reasons(rows) == [None] * 20


def test_prompts_are_dropped_by_their_exact_likeness_and_not_by_a_collision_of_hashes():
    filler = [f"word{i} " * 3 for i in range(60)]
    texts = ["".join(filler[start : start + 40]) for start in range(20)]
    rows = [make_row(id=f"{i:02}", question=text) for i, text in enumerate(texts)]
    kept = [row for row, why in zip(rows, duplicates.NearDuplicatePrompts().reasons(rows), strict=True) if why is None]
    sets = [duplicates.shingles(row.prompt_id, 5) for row in kept]
    assert 1 < len(kept) < 20
    assert max(duplicates.jaccard(a, b) for i, a in enumerate(sets) for b in sets[:i]) < 0.75


def test_minhash_finds_the_duplicates_that_comparing_all_pairs_finds():
    draw = random.Random(3)
    texts = []
    for _ in range(40):
        words = [f"w{draw.randrange(500)}" for _ in range(60)]
        texts += [words, [*words[:30], "other", *words[30:]], words[: draw.choice([25, 40, 58])]]
    rows = [make_row(id=f"{i:03}", question=" ".join(words)) for i, words in enumerate(texts)]
    rows = [make_row(id=row.id, prompt_id=row.id, question=row.prompt_id) for row in rows]
    kept: list[Row] = []
    for row in rows:
        mine = duplicates.shingles(row.prompt[0]["content"], 5)
        others = (duplicates.shingles(other.prompt[0]["content"], 5) for other in kept)
        if all(duplicates.jaccard(mine, other) < 0.8 for other in others):
            kept.append(row)
    found = duplicates.NearDuplicatePrompts(threshold=0.8).reasons(rows)
    assert 40 < len(kept) < 90
    assert [row for row, why in zip(rows, found, strict=True) if why is None] == kept


def test_a_system_message_does_not_make_prompts_alike_or_unlike():
    rows = [
        make_row(id=f"{i}", prompt_id=f"{i}", prompt=({"role": "system", "content": s}, {"role": "user", "content": q}))
        for i, (s, q) in enumerate([("Be brief. " * 30, "One?"), ("Be brief. " * 30, "Two?"), ("Other.", "One?")])
    ]
    found = duplicates.NearDuplicatePrompts().reasons(rows)
    assert [why is None for why in found] == [True, True, False]


def test_near_identical_answers_to_a_prompt_are_dropped_and_those_to_others_kept():
    rows = [
        make_row(STORY, id="1"),
        make_row(STORY + " Well.", id="2"),
        make_row("Four.", id="3"),
        make_row(STORY, id="4", question="Another?"),
    ]
    assert [why is None for why in duplicates.NearDuplicateResponses().reasons(rows)] == [True, False, True, True]
    with pytest.raises(ValueError, match=r"a threshold of 0; give a Jaccard index in \(0, 1\]"):
        duplicates.NearDuplicateResponses(threshold=0)


def test_a_row_that_holds_a_question_of_an_evaluation_set_is_dropped_wherever_it_holds_it():
    clean = contamination.Decontaminated(evaluations=(Arithmetic(digits=2), Questions(STORY)))
    assert reason(clean, make_row()) is None
    for row in (
        make_row(question=STORY),
        make_row(question=f"Please solve: {STORY.upper()} Think first!"),
        make_row(f"A similar one: {STORY}"),
        make_row(response=({"role": "assistant", "content": "4", "reasoning_content": STORY},)),
        make_row(response=(calling(CALL), {**RESULT, "content": STORY}, ANSWER)),
        make_row(prompt=({"role": "system", "content": STORY}, {"role": "user", "content": "Well?"})),
    ):
        found = reason(clean, row)
        assert found is not None and found.endswith("of task q0 of exam")


def test_a_question_matches_from_just_over_half_of_its_tokens_on():
    question = " ".join(f"word{chr(97 + i)}" for i in range(20))
    clean = contamination.Decontaminated(evaluations=(Questions(question),))
    words = question.split()
    assert reason(clean, make_row(question=" ".join(words[:10]) + " and so on")) is None
    assert reason(clean, make_row(question=" ".join(words[:11]) + " and so on")) == "holds 55% of task q0 of exam"
    assert reason(clean, make_row(question=" ".join([*words[:9], "x", *words[10:]]))) == "holds 95% of task q0 of exam"
    assert reason(clean, make_row(question=" ".join(reversed(words)))) is None


def test_pieces_of_two_messages_do_not_make_an_n_gram_but_add_up():
    words = [f"word{chr(97 + i)}" for i in range(16)]
    clean = contamination.Decontaminated(evaluations=(Questions(" ".join(words)),))
    assert reason(clean, make_row(" ".join(words[4:8]), question=" ".join(words[:4]))) is None
    assert reason(clean, make_row(" ".join(words[8:]), question=" ".join(words[:8]))) == "holds 100% of task q0 of exam"


def test_short_questions_match_as_a_whole_and_the_shortest_as_a_message():
    clean = contamination.Decontaminated(evaluations=(Questions("What is 17 + 25?", "Why?"),))
    assert reason(clean, make_row(question="Tell me. What is 17 + 25? Quick!")) == "holds the whole of task q0 of exam"
    assert reason(clean, make_row(question="What is 17 - 25?")) is None
    assert reason(clean, make_row(question="What is 17 + 26?")) is None
    assert reason(clean, make_row(question="why")) == "holds the whole of task q1 of exam"
    assert reason(clean, make_row(question="Why is it 4?")) is None


def test_instructions_that_many_questions_share_do_not_count():
    boilerplate = "Please reason step by step, and put your final answer within a box at the very end."
    questions = [f"{boilerplate} How tall is tower number {i} of the old castle of the king?" for i in range(12)]
    clean = contamination.Decontaminated(evaluations=(Questions(*questions),))
    assert reason(clean, make_row(question=f"{boilerplate} What is 2 + 2?")) is None
    assert reason(clean, make_row(question=questions[3])) == "holds the whole of task q3 of exam"
    counted = contamination.Decontaminated(evaluations=(Questions(*questions),), max_questions=12)
    assert reason(counted, make_row(question=f"{boilerplate} What is 2 + 2?")) is not None


def test_a_system_message_of_the_evaluation_is_not_a_question():
    shared = " ".join(f"rule{chr(97 + i)}" for i in range(26))
    clean = contamination.Decontaminated(evaluations=(Questions("Why is the sky above us so blue?", system=shared),))
    system = {"role": "system", "content": shared}
    assert reason(clean, make_row(prompt=(system, {"role": "user", "content": "What is 2 + 2?"}))) is None
    assert reason(clean, make_row(question="Why is the sky above us so blue?")) is not None


def test_decontamination_without_questions_is_an_error():
    with pytest.raises(ValueError, match="has no evaluation set; name every set"):
        contamination.Decontaminated(evaluations=())
    with pytest.raises(ValueError, match="the evaluation set of 'exam' has no question with words"):
        contamination.Decontaminated(evaluations=(Questions("?!"),)).reasons([make_row()])
