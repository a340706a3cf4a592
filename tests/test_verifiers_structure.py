"""Verifiers of structure: JSON by a schema, tool calls, IFEval's instructions, layout, language, citations."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest

from posttrain.data.jsonl_tasks import JsonlTasks
from posttrain.data.task import Task
from posttrain.data.tasks import build_task, prompt_messages
from posttrain.data.verify.choice import Choice
from posttrain.data.verify.ifeval import KINDS, IFEval, Instruction
from posttrain.data.verify.json_schema import JsonSchema
from posttrain.data.verify.maths import FinalNumber
from posttrain.data.verify.rewards import AfterThinking, Citations, Every, InLanguage, ThinkingFormat, Weighted
from posttrain.data.verify.tool_calls import Call, ToolCalls, calls
from posttrain.launch.cli import Verifier
from posttrain.launch.tasks import judge

PROMPT = "What is the weather in Paris, in degrees Celsius?"
GARBAGE = ("", "  \n\t", "zxqj garbage answer", "\x00", "!!!", "()", "[]", "{}", "null", "{", "```json\n```", "🙂" * 50)
GOLDEN = Path(__file__).parent / "golden" / "ifeval.json"


def task_of(verifier, answer: str | None = None, **metadata) -> Task:
    return build_task("test", prompt_messages(PROMPT, "Be brief."), verifier, answer=answer, metadata=metadata)


def score(verifier, response: str, answer: str | None = None, **metadata) -> float:
    return verifier(task_of(verifier, answer, **metadata), response).score


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "minLength": 1}, "day": {"type": "string", "format": "date"}},
    "required": ["city"],
    "additionalProperties": False,
}


def test_json_is_judged_by_its_schema():
    for right in ('{"city": "Paris"}', 'Here:\n```json\n{"city": "Paris", "day": "2026-01-31"}\n```'):
        assert score(JsonSchema(), right, schema=SCHEMA) == 1.0, right
    wrong = ('{"city": ""}', '{"city": 3}', '{"city": "a", "x": 1}', '{"city": "a", "day": "2026-02-31"}', '["city"]',
             '{"city": "a", "city": "b"}', "{'city': 'Paris'}", 'so {"city": "Paris"}', "[" * 100_000)  # fmt: skip
    for response in (*wrong, *GARBAGE, PROMPT):
        assert score(JsonSchema(), response, schema=SCHEMA) == 0.0, response[:50]
    for schema, message in [
        (None, "needs"),
        ({}, "needs"),
        ({"title": "x"}, "accepts everything"),
        ({"type": 7}, "is none"),
    ]:
        with pytest.raises(ValueError, match=message):
            score(JsonSchema(), "1", schema=schema)
    assert score(JsonSchema(), "NaN", schema={"type": "number"}) == 0.0


def test_a_schema_is_not_fetched_from_elsewhere():
    import referencing.exceptions

    with pytest.raises(referencing.exceptions.Unresolvable):
        score(JsonSchema(), "1", schema={"type": "integer", "$ref": "http://127.0.0.1:9/schema.json"})


WEATHER = [{"name": "weather", "arguments": {"city": "Paris", "unit": "C", "days": [1, 2]}}]


@pytest.mark.parametrize(
    "response",
    [
        json.dumps(WEATHER),
        json.dumps(WEATHER[0]),
        f"I look it up.\n<tool_call>\n{json.dumps(WEATHER[0])}\n</tool_call>",
        f"<think>weather(city='Rome')</think>\n```json\n{json.dumps(WEATHER)}\n```",
        "[weather(city='Paris', unit=\"C\", days=[1, 2.0])]",
        "weather(days=(1, 2), unit='C', city='Paris')",
        json.dumps({"function": {"name": "weather", "arguments": json.dumps(WEATHER[0]["arguments"])}}),
        '{"name": "weather", "parameters": {"city": "Paris", "unit": "C", "days": [1, 2]}}',
    ],
)
def test_a_call_is_read_in_every_form(response):
    assert score(ToolCalls(), response, json.dumps(WEATHER)) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        *GARBAGE,
        PROMPT,
        "weather('Paris', 'C', [1, 2])",
        "weather(city='Paris', unit='C')",
        "weather(city='paris', unit='C', days=[1, 2])",
        "weather(city='Paris', unit='C', days=[1, True])",
        "weather(city='Paris', unit='C', days=[1, 2], extra=1)",
        "forecast(city='Paris', unit='C', days=[1, 2])",
        "weather(city='Paris', unit='C', days=list((1, 2)))",
        "weather(city='Paris', unit='C', days=[1, 2]) or 1",
        "[weather(city='Paris', unit='C', days=[1, 2])] * 2",
        "weather(**{'city': 'Paris'})",
        "__import__('os').system('true')",
        "weather(city='Paris', city='Paris', unit='C', days=[1, 2])",
        f"{json.dumps(WEATHER)} {json.dumps(WEATHER)}",
        json.dumps(WEATHER * 2),
        f"<tool_call>{json.dumps(WEATHER[0])}</tool_call><tool_call>broken</tool_call>",
        "(" * 1000,
        "f(" * 90_000,
        "-" * 99_999,
    ],
    ids=lambda text: text[:20],
)
def test_other_calls_and_no_calls_fail(response):
    assert score(ToolCalls(), response, json.dumps(WEATHER)) == 0.0


def test_calls_are_paired_with_what_is_accepted_and_in_order_where_that_counts():
    accepted = json.dumps([
        {"move": {"to": ["A", "B"], "fast": [True, ""]}}, {"move": {"to": ["A"]}}, {"stop": {}},
    ])  # fmt: skip
    right = "[move(to='A', fast=True), move(to='A'), stop()]"
    assert score(ToolCalls(ordered=True), right, accepted) == score(ToolCalls(), right, accepted) == 1.0
    shuffled = (
        "[stop(), move(to='A'), move(to='B')]"  # the first move suits both, and only one of them takes the second
    )
    assert score(ToolCalls(), shuffled, accepted) == 1.0 and score(ToolCalls(ordered=True), shuffled, accepted) == 0.0
    for wrong in (
        "[stop(), move(to='B'), move(to='B')]",
        "[stop(), move(to='A')]",
        "[move(to='A', fast=1), move(to='A'), stop()]",
    ):
        assert score(ToolCalls(), wrong, accepted) == 0.0, wrong
    assert calls("a.b(x=-1, y={'k': null}, z=true)") == [Call("a.b", {"x": -1, "y": {"k": None}, "z": True})]
    for answer, message in [
        ("[]", "at least one call"),
        ("weather()", "no calls as JSON"),
        ('["x"]', "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message):
            ToolCalls().check(task_of(ToolCalls(), answer))


# Where our rules and the reference's trained models part, and ours are no worse: scraps whose language it guesses
# (English ones as French or Tagalog), and a sentence that it ends after "Dr. Brown" or "e.g.".
SCRAPS = (
    "```", "Dear [name]", "Dear [name,", "<A title>", "Day 1: walk", "I am done. P.P.S", "committee com", "sea SEA",
    "eeee", "a b c", "word word", "This costs",
)  # fmt: skip
TOLD_BY_MODELS = {"language:response_language", "length_constraints:number_sentences", "change_case:english_lowercase"}


def test_instructions_agree_with_another_implementation():
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found, differences, num_compared = {}, [], 0
    for case in golden["verdicts"]:
        instruction = Instruction(case["id"], tuple(case["arguments"].items()))
        for response, holds in zip(golden["responses"], case["holds"], strict=True):
            found.setdefault(case["id"], set()).add(holds)
            num_compared += 1
            if instruction.holds(response) != (holds == "1"):
                differences.append((case["id"], response))
    assert found == {kind: {"0", "1"} for kind in KINDS} and len(KINDS) == 25
    assert {kind for kind, _ in differences} <= TOLD_BY_MODELS and len(differences) == 17 and num_compared == 4080
    assert [response for _, response in differences if not response.startswith(SCRAPS)] == []


def test_every_instruction_has_to_be_followed():
    ids, arguments = (
        ["punctuation:no_comma", "length_constraints:number_words"],
        [{}, {"relation": "at least", "num_words": 3}],
    )

    def judged(response: str, kwargs=arguments) -> float:
        return score(IFEval(), response, instruction_id_list=ids, kwargs=kwargs)

    assert judged("one two three") == 1.0
    for wrong in ("one, two three", "one two", "", " \n", PROMPT):
        assert judged(wrong) == 0.0, wrong
    assert judged("a b c", [None, {"relation": "at least", "num_words": 3, "letter": None}]) == 1.0
    for bad, message in [
        ([{}], "same length"),
        ([{}, {}], "cannot be checked"),
        ([{}, {"relation": "about", "num_words": 1}], "at least"),
    ]:
        with pytest.raises(ValueError, match=message):
            IFEval().check(task_of(IFEval(), instruction_id_list=ids, kwargs=bad))
    with pytest.raises(ValueError, match="unknown instruction 'x:y'"):
        IFEval().check(task_of(IFEval(), instruction_id_list=["x:y"], kwargs=[{}]))


def test_the_thinking_format():
    for right in ("<think>2 + 2 is 4</think>\n4", " <think>\nso\n</think> <answer>4</answer>"):
        assert score(ThinkingFormat(), right) == 1.0, right
    wrong = (
        "4", "<think>4", "<think></think>4", "<think>a</think>", "a <think>b</think> c", "<think>a</think>b</think>c",
        "<think>a</think> !", "a</think>b", "<think>a<think>b</think>c",
    )  # fmt: skip
    for response in (*wrong, *GARBAGE, PROMPT):
        assert score(ThinkingFormat(), response) == 0.0, response
    tagged = ThinkingFormat(answer_tags=True)
    assert score(tagged, "<think>a</think><answer>4</answer>") == 1.0
    for answer in ("4", "<answer>4</answer> or 5", "<answer>4</answer><answer>5</answer>"):
        assert score(tagged, f"<think>a</think>{answer}") == 0.0, answer


ENGLISH = "The weather in the city is fine and it will be warm for the rest of the week."
GERMAN = "Das Wetter in der Stadt ist schön und es wird für den Rest der Woche nicht kalt sein."
CHINESE = "今天巴黎的天气很好,气温大约二十度,适合出门散步。"


def test_the_language_of_a_response_and_its_thinking():
    for code, own in (("en", ENGLISH), ("de", GERMAN), ("zh", CHINESE)):
        assert score(InLanguage(code), f"<think>{own}</think>{own}") == 1.0, own
        for other in ({ENGLISH, GERMAN, CHINESE} - {own}) | {*GARBAGE, PROMPT, "42"}:
            assert score(InLanguage(code), other) == 0.0, other
    assert score(InLanguage("en"), ENGLISH * 3 + CHINESE * 2) == 0.0
    with pytest.raises(ValueError, match="'english'"):
        InLanguage("english")


def test_citations_have_to_be_true():
    tools = ("Paris: 21 degrees,\n clear sky", "Rome: 30 degrees")
    results = [{"role": "tool", "content": text, "tool_call_id": f"call-{n}"} for n, text in enumerate(tools)]
    messages = (*prompt_messages(PROMPT), *results)
    task = build_task("test", messages, Citations())
    for right in ('It says "21 degrees, clear sky" [1].', "So: “Rome: 30 degrees” [call-1], warm."):
        assert Citations()(task, right).score == 1.0, right
    true = '"21 degrees, clear sky"'
    wrong = (
        f"It says {true} [2].", f"{true} [3]", "It is 21 degrees.", "It is 21 degrees [1].", '"degrees" [1]',
        f'{true} [1] and "25 degrees, rain" [2]', f"{true} [1] [9]",
    )  # fmt: skip
    for response in (*wrong, *GARBAGE, PROMPT, *tools):
        assert Citations()(task, response).score == 0.0, response
    twice = '"21 degrees, clear sky" [1] and "21 degrees, clear sky" [1]'
    assert Citations(minimum=2)(task, twice).score == 0.0
    with pytest.raises(ValueError, match="no tool message"):
        Citations().check(task_of(Citations()))


def test_verifiers_put_together():
    both = Weighted((FinalNumber(), ThinkingFormat()), (3.0, 1.0))
    strict = Every((AfterThinking(FinalNumber()), ThinkingFormat()))
    for response, weighted, least in [
        ("<think>maybe 5</think>4", 1.0, 1.0),
        ("4", 0.75, 0.0),
        ("<think>4</think>5", 0.25, 0.0),
        ("<think>4", 0.75, 0.0),
        ("", 0.0, 0.0),
    ]:
        assert score(both, response, "4") == weighted, response
        assert score(strict, response, "4") == least, response
    with pytest.raises(ValueError, match="weight above 0"):
        Weighted((FinalNumber(),), (0.0,))


def test_a_file_of_such_tasks_is_read_and_what_cannot_be_judged_is_said(tmp_path):
    path = tmp_path / "tasks.jsonl"
    rows = [
        {"prompt": "Call it.", "answer": WEATHER},
        {"prompt": "Call it twice.", "answer": json.dumps(WEATHER * 2)},
        {"prompt": "Call nothing.", "answer": []},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = JsonlTasks(path=str(path), verifier=judge("tool-calls"))
    assert [task.verifier(task, json.dumps(WEATHER)).score for task in source] == [1.0, 0.0]
    assert source.malformed[0].endswith("must list at least one call, got '[]'")
    path.write_text(json.dumps({"prompt": "JSON, please.", "schema": SCHEMA}))
    (task,) = JsonlTasks(path=str(path), verifier=judge("json-schema"))
    assert task.answer is None and task.verifier(task, '{"city": "Rome"}').score == 1.0
    with pytest.raises(ValueError, match='"answer" must be'):
        len(JsonlTasks(path=str(path), verifier=Choice()))
    assert all(dataclasses.is_dataclass(judge(name)) for name in get_args(Verifier))
