"""What verifiers are audited on: right answers to tasks of every kind, in several spellings, and the same spoilt."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from posttrain.data.arithmetic import Arithmetic
from posttrain.data.characters import Characters
from posttrain.data.instruction_tasks import Instructions
from posttrain.data.sandbox.level import Level, machine
from posttrain.data.sandbox.run import Limits, Program, Sandbox
from posttrain.data.task import Task
from posttrain.data.tasks import build_task, prompt_messages
from posttrain.data.verify.choice import Choice
from posttrain.data.verify.code import CodeOutput, UnitTests
from posttrain.data.verify.ifeval import IFEval
from posttrain.data.verify.json_schema import JsonSchema
from posttrain.data.verify.maths import BoxedNumber, FinalNumber, boxed
from posttrain.data.verify.rewards import Citations, InLanguage, ThinkingFormat
from posttrain.data.verify.sql import SqlRows
from posttrain.data.verify.symbolic import MathVerify
from posttrain.data.verify.text import ExactText
from posttrain.data.verify.tool_calls import ToolCalls

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "ifeval.json"
SANDBOX = Sandbox(required=Level(max(machine().level, Level.PLAIN)), limits=Limits(seconds=3.0))


class Case(NamedTuple):
    """A task with answers that are right and answers that are not."""

    task: Task
    right: list[str]
    wrong: list[str]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`limit` tasks of each kind, from the folder `data` where it is given."""

    data: Path | None = None
    limit: int = 200


def made(verifier: Callable, prompt: str, answer: str | None = None, **metadata: object) -> Task:
    return build_task("audit", prompt_messages(prompt), verifier, answer=answer, metadata=metadata)


def rows(path: Path, limit: int) -> Iterator[dict]:
    with path.open(encoding="utf-8") as file:
        for _, line in zip(range(limit), file, strict=False):
            yield json.loads(line)


# Questions with one answer -----------------------------------------------------------------------------------------


def numbers(settings: Settings) -> Iterator[Case]:
    if settings.data:
        pairs = [
            (row["question"], row["answer"]) for row in rows(settings.data / "math/gsm8k_test.jsonl", settings.limit)
        ]
    else:
        tasks = [Arithmetic(digits=2)[index] for index in range(settings.limit)]
        pairs = [(str(task.messages[-1]["content"]), f"It is so.\n#### {task.answer}") for task in tasks]
    for question, solution in pairs:
        answer = solution.rpartition("####")[2].strip()
        value = int(answer.replace(",", ""))
        right = [answer, solution, f"The answer is ${value:,}.00.", f"So \\boxed{{{value}}}.", f"**{value}**"]
        wrong = [
            str(value + 1),
            f"{value}0",
            f"{-value - 1}",
            f"{value} or {value + 1}",
            f"\\boxed{{{value + 1}}} not {value}",
        ]
        yield Case(made(FinalNumber(), question, solution), right, wrong)


def boxes(settings: Settings) -> Iterator[Case]:
    for task, right, wrong in numbers(settings):
        value = right[0].replace(",", "")
        task = made(BoxedNumber(), str(task.messages[0]["content"]), value)
        yield Case(
            task, [f"\\boxed{{{value}}}", f"So $\\boxed{{{value}}}$."], [*wrong, value, f"The answer is {value}."]
        )


def formulas(settings: Settings) -> Iterator[Case]:
    if not settings.data:
        return
    for row in rows(settings.data / "math/math_test.jsonl", settings.limit):
        answer = boxed(row["solution"])
        if answer is None:
            continue
        right = [row["solution"], f"\\boxed{{{answer}}}", f"The answer is ${answer}$."]
        wrong = [f"\\boxed{{{answer}+1}}", f"\\boxed{{7919+{answer}}}", f"The answer is $2({answer})-7919$."]
        yield Case(made(MathVerify(), row["problem"], f"\\boxed{{{answer}}}"), right, wrong)


def choices(settings: Settings) -> Iterator[Case]:
    if settings.data:
        found = rows(settings.data / "science/arc_challenge_train.jsonl", settings.limit)
        asked = [(row["question"], row["choices"]["text"], row["choices"]["label"], row["answerKey"]) for row in found]
    else:
        asked = [
            (f"Which is number {n}?", ["one", "two", "three", "four"], list("ABCD"), "ABCD"[n % 4]) for n in range(40)
        ]
    for question, texts, labels, key in asked:
        if set(labels) != set("ABCD"):
            continue
        other = "ABCD"["ABCD".index(key) - 1]
        prompt = "\n".join([question, *(f"{label}) {text}" for label, text in zip(labels, texts, strict=True))])
        right = [key, f"({key})", f"The answer is {key}.", f"**{key}**", f"Answer: {key}", f"So \\boxed{{{key}}}"]
        wrong = [
            other,
            f"The answer is {other}.",
            f"{key} or {other}",
            f"\\boxed{{{other}}}",
            f"Not {key}. Answer: {other}",
        ]
        yield Case(made(Choice(), prompt, key), right, wrong)


def texts(settings: Settings) -> Iterator[Case]:
    source = Characters(operation="reverse")
    for index in range(min(settings.limit, len(source))):
        answer = source[index].answer or ""
        right = [answer, f'"{answer}"', f" {answer.upper()}.\n"]
        wrong = [answer + answer[-1], answer[1:], f"{answer} or so"]
        yield Case(made(ExactText(), str(source[index].messages[-1]["content"]), answer), right, wrong)


def follow(settings: Settings) -> Iterator[Case]:
    source = Instructions(num_constraints=1)
    for index in range(min(settings.limit, len(source))):
        task = source[index]
        yield Case(task, [task.answer or ""], ["I do not know.", "Sorry, no.", (task.answer or "").swapcase()[::-1]])


# Instructions, structure, tools ------------------------------------------------------------------------------------


def ifeval(settings: Settings) -> Iterator[Case]:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for case in golden["verdicts"]:
        judged = list(zip(golden["responses"], case["holds"], strict=True))
        task = made(IFEval(), f"Follow {case}", instruction_id_list=[case["id"]], kwargs=[case["arguments"]])
        yield Case(
            task, [text for text, holds in judged if holds == "1"], [text for text, holds in judged if holds == "0"]
        )


def schemas(settings: Settings) -> Iterator[Case]:
    properties = {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer", "minimum": 0}}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    for age in range(min(settings.limit, 40)):
        value = {"name": f"person {age}", "age": age}
        texts = [
            value | {"age": -1},
            value | {"age": str(age)},
            {"name": "x"},
            value | {"x": 1},
            [value],
            value | {"name": ""},
        ]
        right = [json.dumps(value), json.dumps(value, indent=2), f"Here:\n```json\n{json.dumps(value)}\n```"]
        wrong = [
            *map(json.dumps, texts),
            json.dumps(value)[:-1],
            str(value),
            f"{json.dumps(value)} {json.dumps(value)}",
        ]
        yield Case(made(JsonSchema(), f"Describe person {age}.", schema=schema), right, wrong)


def tools(settings: Settings) -> Iterator[Case]:
    for hour in range(min(settings.limit, 24)):
        call = {"name": "book", "arguments": {"room": f"R{hour}", "hour": hour, "guests": ["Ann", "Bo"]}}
        other = {"name": "notify", "arguments": {"to": "Ann"}}
        python = f"[book(room='R{hour}', hour={hour}, guests=['Ann', 'Bo']), notify(to='Ann')]"
        marked = "".join(f"<tool_call>{json.dumps(each)}</tool_call>" for each in (call, other))
        right = [json.dumps([call, other]), python, marked, f"```json\n{json.dumps([other, call])}\n```"]
        wrong = [
            json.dumps([call]), json.dumps([call, other, other]), python.replace("R", "r"),
            python.replace("'Bo'", "'Al'"),
            python.replace(f"hour={hour}", f"hour='{hour}'"), python.replace("book", "look"), python.replace("to=", ""),
            marked.replace(f'"hour": {hour}', f'"hour": {hour + 1}'), marked.replace("</tool_call>", ""),
            f"print({python})",
        ]  # fmt: skip
        yield Case(made(ToolCalls(), f"Book room R{hour}.", json.dumps([call, other])), right, wrong)


def thinking(settings: Settings) -> Iterator[Case]:
    for number in range(min(settings.limit, 40)):
        right = [f"<think>It is {number}.</think>{number}", f"<think>\nso\n</think>\n\nThe answer is {number}."]
        wrong = [
            right[0].replace(old, new) for old, new in (("<think>", ""), ("</think>", ""), (f"{number}.", "<think>"))
        ]
        wrong += [f"{number} {right[0]}", f"<think></think>{number}", f"<think>{number}</think>", right[0] + right[0]]
        yield Case(made(ThinkingFormat(), f"What is {number}?"), right, wrong)


PROSE = {
    "en": "The train to the coast leaves in the morning and it will be there before noon if there is no delay.",
    "de": "Der Zug an die Küste fährt am Morgen ab und wird vor dem Mittag dort sein, wenn es keine Verspätung gibt.",
    "fr": "Le train pour la côte part le matin et il sera là avant midi si tout va bien, mais il est en retard.",
    "es": "El tren para la costa sale por la mañana y estará allí antes del mediodía si no hay un retraso en la línea.",
    "zh": "去海边的火车早上出发,如果没有延误,中午之前就能到达,我们可以在那里吃午饭。",
    "ru": "Поезд на побережье отправляется утром и прибудет туда до полудня, если не будет задержки в пути.",
}  # fmt: skip


def languages(settings: Settings) -> Iterator[Case]:
    for code, own in PROSE.items():
        others = [text for other, text in PROSE.items() if other != code]
        right = [own, f"<think>{own}</think>{own}", f"{own}\n\n```python\nprint('hello')\n```"]
        yield Case(
            made(InLanguage(code), f"Answer in {code}."),
            right,
            [*others, *(f"<think>{text * 2}</think>{own}" for text in others)],
        )


def citations(settings: Settings) -> Iterator[Case]:
    for number in range(min(settings.limit, 40)):
        outputs = [f"The lake is {number} metres deep\nand cold in winter.", f"The hill is {number + 1} metres high."]
        results = tuple(
            {"role": "tool", "content": text, "tool_call_id": f"c{place}"} for place, text in enumerate(outputs)
        )
        task = build_task("audit", (*prompt_messages("How deep is the lake?"), *results), Citations())
        true = f'"The lake is {number} metres deep'
        right = [
            f'It says {true}" [1].',
            f'{true} and cold in winter." [c0]',
            f'{true}" [1]; {outputs[1]!r} is elsewhere.',
        ]
        wrong = [
            f'{true}" [2]', f'{true}" [3]', f'"The lake is {number + 1} metres deep" [1]', f'{true}"',
            '"The lake" [1]', f'{true}" [1] and "the hill is low enough" [2]',
        ]  # fmt: skip
        yield Case(task, right, wrong)


# Code --------------------------------------------------------------------------------------------------------------

FUNCTIONS = {  # source: (assertions, changes that make it wrong)
    "def last(items):\n    return items[-1]": (["assert last([3, 1]) == 1", "assert last('ab') == 'b'"], [("-1", "0")]),
    "def evens(n):\n    return [i for i in range(n) if i % 2 == 0]": (
        ["assert evens(5) == [0, 2, 4]"], [("==", "!="), ("% 2", "% 3")]
    ),
    "def root(x):\n    return x ** 0.5": (["assert abs(root(2) - 1.41421356) < 1e-6"], [("0.5", "0.4"), ("**", "*")]),
    "def count(text):\n    return {c: text.count(c) for c in text}": (
        ["assert count('aab') == {'a': 2, 'b': 1}"], [("text.count(c)", "1")]
    ),
    "def safe(x):\n    if x < 0:\n        raise ValueError('negative')\n    return x": (
        ["try:\n    safe(-1)\nexcept ValueError:\n    pass\nelse:\n    raise AssertionError", "assert safe(2) == 2"],
        [("x < 0", "x > 9"), ("return x", "return -x"), ("ValueError", "KeyError")],
    ),
}  # fmt: skip
CHEATS = [
    "raise SystemExit(0)", "import os\nos._exit(0)", "import sys\nprint('OK')\nsys.exit()", "assert True",
    "import builtins\nbuiltins.AssertionError = Warning",
]  # fmt: skip


EQUAL = "class All:\n    def __eq__(self, other): return True\n    __sub__ = __abs__ = __lt__ = __eq__"


def functions(settings: Settings) -> Iterator[Case]:
    for source, (tests, changes) in FUNCTIONS.items():
        name = source[4:].partition("(")[0]
        equal = f"{EQUAL}\ndef {name}(*a): return All()"
        wrong = [
            *(source.replace(*change) for change in changes),
            *CHEATS,
            equal,
            f"def {name}(*a): pass",
            "\n".join(tests),
        ]
        yield Case(
            made(UnitTests(SANDBOX), f"Write {name}.", source, tests=tests),
            [source, f"```python\n{source}\n```"],
            wrong,
        )


PROGRAMS = {
    "a, b = map(int, input().split())\nprint(a + b)": (["2 3", "10 -4"], [("+", "-"), ("print(a + b)", "print(5)")]),
    "print(input()[::-1])": (["abc", "xy z"], [("[::-1]", ""), ("print(", "print('ok', ")]),
    "n = int(input())\nfor i in range(n):\n    print('*' * (i + 1))": (
        ["3", "5"], [("i + 1", "i"), ("range(n)", "range(n + 1)")]
    ),
}  # fmt: skip


def programs(settings: Settings) -> Iterator[Case]:
    for source, (inputs, changes) in PROGRAMS.items():
        outputs = [outcome.stdout for outcome in SANDBOX.run(Program(source=source), inputs)]
        tests = [{"input": given, "output": expected} for given, expected in zip(inputs, outputs, strict=True)]
        wrong = [
            *(source.replace(*change) for change in changes),
            *CHEATS,
            f"{source}\nraise SystemExit(3)",
            f"{source}\nprint(0)",
            "while True: pass",
        ]
        yield Case(
            made(CodeOutput(sandbox=SANDBOX), "Write it.", tests=tests), [source, f"```python\n{source}\n```"], wrong
        )


DATABASE = (
    "CREATE TABLE p (name TEXT, age INT, city TEXT); "
    "INSERT INTO p VALUES ('Ann', {}, 'Rome'), ('Bo', 20, 'Oslo'), ('Cy', 41, 'Rome'), ('Di', 17, 'Bonn');"
)
QUERIES = {
    "SELECT name FROM p WHERE age >= 18": [(">=", "<"), ("name", "city"), (" WHERE age >= 18", "")],
    "SELECT city, COUNT(*) FROM p GROUP BY city": [("COUNT(*)", "MAX(age)"), (" GROUP BY city", ""), ("city, ", "")],
    "SELECT name FROM p ORDER BY age DESC": [("DESC", "ASC"), (" ORDER BY age DESC", ""), ("age", "name")],
    "SELECT AVG(age) FROM p WHERE city = 'Rome'": [("AVG", "SUM"), ("Rome", "Oslo"), ("=", "!=")],
}


def queries(settings: Settings) -> Iterator[Case]:
    databases = [DATABASE.format(30), DATABASE.format(64)]
    for query, changes in QUERIES.items():
        right = [query, f"```sql\n{query};\n```", f"SELECT * FROM ({query})"]
        wrong = [
            *(query.replace(*change) for change in changes),
            f"{query} LIMIT 0",
            "DELETE FROM p",
            "SELECT 1",
            f"{query}; {query}",
        ]
        yield Case(made(SqlRows(SANDBOX), "Ask it.", query, databases=databases), right, wrong)


AUDITS: dict[str, Callable[[Settings], Iterator[Case]]] = {
    "FinalNumber": numbers, "BoxedNumber": boxes, "MathVerify": formulas, "Choice": choices, "ExactText": texts,
    "Follow": follow, "IFEval": ifeval, "JsonSchema": schemas, "ToolCalls": tools, "ThinkingFormat": thinking,
    "InLanguage": languages, "Citations": citations, "UnitTests": functions, "CodeOutput": programs, "SqlRows": queries,
}  # fmt: skip
