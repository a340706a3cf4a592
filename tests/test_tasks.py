"""Task sources: every task passes with its own answer and with nothing else, and is the same in every process."""

import ast
import collections
import dataclasses
import inspect
import json
import os
import subprocess
import sys

import pytest
import reasoning_gym as package

from posttrain.data import arithmetic, instruction_tasks, reasoning_gym
from posttrain.data.arithmetic import Arithmetic
from posttrain.data.instruction_tasks import ALL_KINDS, Instructions
from posttrain.data.jsonl_tasks import JsonlTasks
from posttrain.data.reasoning_gym import ANSWER_TAGS, ReasoningGym, extracted_answer
from posttrain.data.task import Task
from posttrain.data.tasks import Concat, Mixture, Split, prompt_messages, prompt_text
from posttrain.data.verify.choice import Choice
from posttrain.data.verify.pool import VerifierPool

GARBAGE = ("", " \n", "zxqj garbage answer", "!!!", "\\boxed{}", "<answer></answer>")
SOURCES = (
    Arithmetic(),
    Arithmetic(digits=2, operations=("-", "*"), system=None, seed=3),
    Instructions(),
    Instructions(kinds=("capitals", "end_with", "without_letter"), num_constraints=2, seed=1),
    ReasoningGym(name="chain_sum", size=40, suffix=ANSWER_TAGS),
    ReasoningGym(name="spell_backward", size=40, config={"max_word_len": 4}, system="Answer briefly."),
    ReasoningGym(name="countdown", size=8),
    ReasoningGym(name="n_queens", size=5),
)


def name_of(source) -> str:
    return source.name if isinstance(source, ReasoningGym) else type(source).__name__


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(timeout=30.0) as opened:
        yield opened


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_a_task_passes_with_its_answer_and_not_with_junk_or_its_prompt(source, pool):
    tasks = [source[index] for index in range(min(len(source), 120))]
    answers = [task.answer or "" for task in tasks]
    prompts = [str(task.messages[-1]["content"]) for task in tasks]
    assert all(verdict.score == 1.0 for verdict in pool.judge(tasks, answers))
    for junk in (prompts, *([text] * len(tasks) for text in GARBAGE)):
        wrong = [
            (task.id, text)
            for task, text, verdict in zip(tasks, junk, pool.judge(tasks, junk), strict=True)
            if verdict.score
        ]
        assert wrong == []


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_prompts_and_ids_are_distinct_and_settings_are_plain(source):
    tasks = all_tasks(source)
    assert list(source) == tasks
    assert len({task.id for task in tasks}) == len({prompt_text(task) for task in tasks}) == len(tasks)
    settings = dataclasses.asdict(source)
    assert dataclasses.replace(source) == source
    assert (
        type(source)(
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in json.loads(json.dumps(settings)).items()
            }
        )
        == source
    )
    with pytest.raises(IndexError):
        source[len(source)]
    with pytest.raises(IndexError):
        source[-1]


def all_tasks(source) -> list[Task]:
    return [source[index] for index in range(len(source))]


def fingerprint() -> str:
    return json.dumps(
        [[source[index].id for index in range(0, len(source), 1 + len(source) // 40)] for source in SOURCES]
    )


def test_the_same_index_is_the_same_task_in_every_process():
    program = "import test_tasks; print(test_tasks.fingerprint())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=os.path.dirname(__file__),
        env={**os.environ, "PYTHONHASHSEED": "1"},  # another than here, where it is random
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(fingerprint())


def test_arithmetic_asks_every_pair_once():
    tasks = all_tasks(Arithmetic(operations=("+", "-")))
    expected = {f"What is {a} {sign} {b}?" for a in range(1, 10) for b in range(1, 10) for sign in "+-"}
    assert {task.messages[-1]["content"] for task in tasks} == expected
    for task in tasks:
        assert task.answer == str(eval(str(task.messages[-1]["content"])[8:-1]))
    assert [task.id for task in Arithmetic()] != [task.id for task in Arithmetic(seed=1)]
    assert Arithmetic(digits=2)[0].messages[0] == {"role": "system", "content": Arithmetic().system}
    with pytest.raises(ValueError, match="digits must be 1, 2 or 3, got 4"):
        Arithmetic(digits=4)
    with pytest.raises(ValueError, match="operations"):
        Arithmetic(operations=("/",))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_kind_of_instruction_gives_prompts_for_a_run_of_its_own(kind):
    source = Instructions(kinds=(kind,))
    assert len(source) >= 180
    assert all(len(str(task.messages[-1]["content"]).split()) < 40 for task in source)


def test_a_plain_answer_on_the_topic_rarely_passes_so_there_is_something_to_learn():
    passed = collections.Counter()
    for kind in ALL_KINDS:
        source = Instructions(kinds=(kind,))
        topics = [source._prompts[index][2] for index in range(len(source))]
        for task, topic in zip(all_tasks(source), topics, strict=True):
            passed[kind] += int(
                task.verifier(task, f"One is the {instruction_tasks.TOPICS[topic][0]}, for example.").score
            )
    assert {kind for kind, count in passed.items() if count > 0.5 * 200} == set()


def test_two_constraints_are_both_judged():
    source = Instructions(kinds=("capitals", "quotes"), num_constraints=2)
    task = source[0]
    assert task.answer is not None and task.answer.isupper()
    assert task.verifier(task, task.answer).score == 1.0
    assert task.verifier(task, task.answer.lower()).score == 0.0
    assert task.verifier(task, task.answer.strip('"')).score == 0.0
    assert task.verifier(task, '"XYZZY"').score == 0.0  # off topic
    with pytest.raises(ValueError, match="got \\('nonsense',\\)"):
        Instructions(kinds=("nonsense",))
    with pytest.raises(ValueError, match="num_constraints"):
        Instructions(kinds=("capitals",), num_constraints=2)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("game_of_life_halting", "full marks to 'zxqj"),
        ("coin_flip", "full marks to '0'"),
        ("complex_arithmetic", "full marks to 'nan'"),
        ("graph_color", "no reference answer"),
        ("rush_hour", "no reference answer"),
        ("codeio", "differ between processes"),
        ("puzzle24", "which numbers"),
        ("no_such_generator", "has no generator"),
    ],
)
def test_a_broken_generator_is_refused_with_its_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        ReasoningGym(name=name, size=3)


def test_a_scorer_that_raises_is_a_counted_error(pool):
    source = ReasoningGym(name="prime_factorization", size=3)
    pool.counts.clear()
    tasks = [source[0], source[1]]
    verdicts = pool.judge(tasks, [tasks[0].answer or "", "no idea"])
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0]
    assert "ValueError" in verdicts[1].reason and pool.counts == {"judged": 2, "error": 1}


@pytest.mark.parametrize("name", reasoning_gym.EVALUATED)
def test_an_answer_is_never_run_as_code(name, tmp_path):
    source = ReasoningGym(name=name, size=2)
    marker = tmp_path / "marker"
    call = f"open({str(marker)!r}, 'w')"
    attacks = (
        call,
        f"[{call}]",
        f"[[{call}]]",
        f"1 + ({call} and 1)",
        f"__import__('pathlib').Path({str(marker)!r}).touch()",
    )
    spaced = (
        f"open ({str(marker)!r}, 'w')",
        f"open\\\n({str(marker)!r}, 'w')",
        f"(open)({str(marker)!r}, 'w')",
        f"f'{{{call}}}'",
    )
    for attack in (*attacks, *spaced):
        task = source[0]
        assert task.verifier(task, f"<answer>{attack}</answer>").score == 0.0
        assert not marker.exists(), attack


def test_all_generators_that_evaluate_answers_are_known():
    guarded = {*reasoning_gym.EVALUATED, *reasoning_gym.REFUSED}
    for name, (dataset, _) in package.factory.DATASETS.items():
        calls = [
            node
            for node in ast.walk(ast.parse(inspect.getsource(sys.modules[dataset.__module__])))
            if isinstance(node, ast.Call)
        ]
        evaluated = [
            call
            for call in calls
            if ast.unparse(call.func).rpartition(".")[2] in ("eval", "exec", "parse_expr", "sympify")
            and any(isinstance(node, ast.Name) and "answer" in node.id for node in ast.walk(call))
        ]
        assert not evaluated or name in guarded or name == "number_sorting", name  # that one evaluates its own answer


def test_what_a_scorer_sees_is_the_extracted_answer():
    assert extracted_answer("<answer>1</answer> then <answer> ab c </answer>", "x") == "ab c"
    assert extracted_answer("so \\boxed{ab}", "x") == "ab"
    assert extracted_answer("The answer is: ab", "x") == "ab"
    assert extracted_answer("a b\nc d", "a b\nc d") == "a b\nc d"
    assert extracted_answer("3 + 4 = 7.", "9") == "7"
    assert extracted_answer("<answer>-12 apples</answer>", "9") == "-12"


@pytest.mark.parametrize("source", SOURCES[:5], ids=name_of)
def test_no_prompt_lies_on_both_sides_of_a_split(source):
    train, held_out = Split(source=source, part="train"), Split(source=source, part="held_out")
    assert len(train) + len(held_out) == len(source)
    assert not {prompt_text(task) for task in train} & {prompt_text(task) for task in held_out}
    assert 0.05 * len(source) < len(held_out) < 0.45 * len(source)


def test_a_question_stays_on_its_side_across_sources_systems_and_repeats(tmp_path):
    lines = [{"prompt": f"Question {number % 50}?" + " " * (number // 50), "answer": number} for number in range(100)]
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    plain, other = JsonlTasks(path=str(path)), JsonlTasks(path=str(path), system="Be brief.", name="other")
    train = Split(source=Concat(sources=(plain, other)), part="train", fraction=0.5)
    held_out = Split(source=Concat(sources=(other, plain)), part="held_out", fraction=0.5)
    held_out_prompts = [prompt_text(task) for task in held_out]
    assert len(set(held_out_prompts)) == len(held_out_prompts)
    assert not set(held_out_prompts) & {prompt_text(task) for task in train}
    assert len(train) + 4 * len(held_out) == 200
    with pytest.raises(ValueError, match="part of 200 tasks at fraction 1e-09 is empty"):
        len(Split(source=Concat(sources=(plain, other)), part="held_out", fraction=1e-9))
    with pytest.raises(ValueError, match="'test'"):
        Split(source=plain, part="test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"1\.5"):
        Split(source=plain, part="train", fraction=1.5)


def test_a_concatenation_holds_each_task_in_order():
    first, second = Arithmetic(), Arithmetic(digits=2)
    both = Concat(sources=(first, second))
    assert [task.id for task in both] == [task.id for task in first] + [task.id for task in second]
    assert both.domain == "arithmetic"


def test_a_mixture_keeps_its_shares_and_draws_all_before_it_repeats():
    words = Instructions(kinds=("capitals",))
    mixture = Mixture(sources=(Arithmetic(), words), weights=(3.0, 1.0), size=648)
    domains = [task.domain for task in mixture]
    assert collections.Counter(domains) == {"arithmetic": 486, "instructions": 162}
    assert collections.Counter(domains[:200])["arithmetic"] == pytest.approx(150, abs=25)
    counts = collections.Counter(task.id for task in mixture if task.domain == "arithmetic")
    assert set(counts.values()) == {6} and len(counts) == 81
    assert set(collections.Counter(task.id for task in mixture if task.domain == "instructions").values()) == {1}
    other = dataclasses.replace(mixture, seed=1)
    assert [task.id for task in mixture] != [task.id for task in other]
    assert len(all_tasks(Mixture(sources=(Arithmetic(), words), weights=(1.0, 0.0), size=10))) == 10
    for weights in [(1.0,), (0.0, 0.0), (-1.0, 2.0), (float("nan"), 1.0)]:
        with pytest.raises(ValueError, match="weight"):
            Mixture(sources=(Arithmetic(), words), weights=weights, size=10)


def test_rows_of_a_file_become_tasks(tmp_path):
    path = tmp_path / "tasks.jsonl"
    rows = [
        {
            "prompt": "Capital of France? A) Rome B) Paris",
            "answer": "B",
            "domain": "geography",
            "id": "row-1",
            "level": 2,
        },
        {"messages": [{"role": "user", "content": "A or B?"}], "answer": "A"},
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    source = JsonlTasks(path=str(path), verifier=Choice(letters="AB"), name="quiz", system="Be brief.")
    first, second = source
    assert (first.id, first.domain, first.answer, first.metadata) == ("row-1", "geography", "B", {"level": 2})
    assert second.domain == source.domain == "quiz"
    assert [message["role"] for message in second.messages] == ["system", "user"]
    assert first.verifier(first, "(B)").score == 1.0
    assert source.malformed == ()


def test_malformed_lines_are_named_counted_and_bounded(tmp_path):
    bad = [
        b'{"prompt": "no end',
        b'["a list"]',
        b'{"prompt": "", "answer": "1"}',
        b'{"prompt": "p"}',
        b'{"prompt": "p", "answer": NaN}',
        b'{"prompt": "p", "answer": true}',
        b'{"prompt": "p", "messages": [], "answer": "1"}',
        b'{"messages": [{"role": "robot", "content": "p"}], "answer": "1"}',
        b'{"messages": [{"role": "assistant", "content": "p"}], "answer": "1"}',
        b'{"messages": ["p"], "answer": "1"}',
        b'{"prompt": "p", "answer": "1", "id": 5}',
        b'{"prompt": "question 0", "answer": "0"}',
        b'{"prompt": "\xff\xfe", "answer": "1"}',
        b"[" * 100_000,
    ]
    good = [json.dumps({"prompt": f"question {number}", "answer": str(number)}).encode() for number in range(20)]
    path = tmp_path / "tasks.jsonl"
    for line in bad:
        path.write_bytes(b"\n".join([*good, line]))
        source = JsonlTasks(path=str(path))
        assert len(source) == 20
        (message,) = source.malformed
        assert message.startswith(f"{path}:21: ")
    path.write_bytes(b"\n".join([*good, *bad]))
    with pytest.raises(
        ValueError, match=rf"14 of 34 lines are malformed, more than 1\.0%: {path}:21: .*:25: .*; \.\.\."
    ):
        len(JsonlTasks(path=str(path)))
    assert len(JsonlTasks(path=str(path), malformed_share=0.5)) == 20


def test_a_file_without_tasks_is_an_error(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no task"):
        len(JsonlTasks(path=str(path)))
    path.write_text("not JSON\n")
    with pytest.raises(ValueError, match=r"tasks\.jsonl:1"):
        len(JsonlTasks(path=str(path)))
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        len(JsonlTasks(path=str(tmp_path / "missing.jsonl")))


def test_a_system_message_is_there_only_when_given():
    assert prompt_messages("p") == ({"role": "user", "content": "p"},)
    assert prompt_messages("p", "s") == ({"role": "system", "content": "s"}, {"role": "user", "content": "p"})
    assert arithmetic.Arithmetic(system=None)[0].messages[0]["role"] == "user"
