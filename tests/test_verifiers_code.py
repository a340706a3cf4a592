"""Verifiers that run code: right programs pass, and no wrong, empty, cheating or copied one does."""

import dataclasses

import pytest

from posttrain.data.sandbox.level import Level, machine
from posttrain.data.sandbox.run import Limits, Sandbox
from posttrain.data.tasks import build_task, prompt_messages
from posttrain.data.verify.code import LANGUAGES, CodeOutput, UnitTests
from posttrain.data.verify.extract import block
from posttrain.data.verify.sql import SqlRows

if machine().level is Level.NONE:
    pytest.skip(f"no code can be run here: {machine().reason}", allow_module_level=True)

SANDBOX = Sandbox(required=Level(min(machine().level, Level.BUBBLEWRAP)), limits=Limits(seconds=1.0))
PROMPT = "Read two numbers and print their sum."
GARBAGE = (
    "",
    " \n",
    "zxqj",
    "\x00",
    "```python\n```",
    "```\n",
    "pass",
    "import sys; sys.exit(0)",
    "\ud800",
    "()" * 5000,
)
SUM = "print(sum(map(int, input().split())))"
PAIRS = [{"input": "2 3\n", "output": "5\n"}, {"input": "10 -4", "output": "6"}]


def score(verifier, response: str, *, answer: str | None = None, prompt: str = PROMPT, **metadata) -> float:
    task = build_task("code", prompt_messages(prompt), verifier, answer=answer, metadata=metadata)
    verifier.check(task)
    return verifier(task, response).score


def test_a_program_is_judged_by_what_it_prints():
    verifier = CodeOutput(sandbox=SANDBOX)
    for right in (SUM, f"Here it is:\n```python\n{SUM}\n```\nDone.", f"```py\nprint(1)\n```\n```py\n{SUM}\n```",
                  f"<think>```python\nprint(0)\n```</think>\n{SUM}", f"{SUM}\nprint(' ')"):  # fmt: skip
        assert score(verifier, right, tests=PAIRS) == 1.0, right
    for wrong in (*GARBAGE, PROMPT, "print(5)", "print(6)", f"{SUM}\nprint(1)", f"{SUM}\nraise SystemExit(1)",
                  f"```rust\n{SUM}\n```", f"<think>{SUM}"):  # fmt: skip
        assert score(verifier, wrong, tests=PAIRS) == 0.0, wrong


def test_another_language_is_a_row_of_the_runner_table():
    verifier = CodeOutput("bash", sandbox=SANDBOX)
    assert score(verifier, "```bash\nread a b\necho $((a + b))\n```", tests=PAIRS) == 1.0
    assert score(verifier, "echo 5", tests=PAIRS) == 0.0
    with pytest.raises(ValueError, match="no runner for 'cobol': choose one of python, bash"):
        CodeOutput("cobol")
    fences = [fence for language in LANGUAGES.values() for fence in language.fences]
    assert len(set(fences)) == len(fences)


ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(2, 3) == 5", "assert add(10, -4) == 6", "for n in range(9): assert add(n, n) == 2 * n"]
CHEATS = (
    "raise SystemExit(0)",
    "import os; os._exit(0)",
    "def add(a, b): raise AssertionError",
    "def add(a, b): return type('All', (int,), {'__eq__': lambda *_: True})()",
    "class All:\n    def __eq__(self, other): return True\ndef add(a, b): return All()",
    "import builtins\nbuiltins.range = lambda n: ()\ndef add(a, b): return 5 if a == 2 else 6",
    "import sys\nsys.modules['__main__'].__dict__.clear()\ndef add(a, b): print('all tests pass'); return None",
)


def test_a_function_is_judged_by_unit_tests_that_it_cannot_touch():
    verifier = UnitTests(sandbox=SANDBOX)
    assert score(verifier, f"```python\n{ADD}\n```", answer=ADD, tests=TESTS) == 1.0
    assert score(verifier, ADD, tests=TESTS) == 1.0
    for wrong in (*GARBAGE, PROMPT, *CHEATS, ADD.replace("+", "-"), ADD.replace("add", "sum"), "\n".join(TESTS)):
        assert score(verifier, wrong, answer=ADD, tests=TESTS) == 0.0, wrong


def test_the_names_that_tests_see_are_those_of_the_reference_solution():
    verifier = UnitTests(sandbox=SANDBOX)
    tests = ["assert abs(near(4) - 2.0) < 1e-6"]
    cheat = "def near(x): return 0.0\ndef abs(x): return 0.0"
    assert score(verifier, "def near(x): return x ** 0.5", answer="def near(x): return x ** 0.5", tests=tests) == 1.0
    assert score(verifier, cheat, answer="def near(x): return x ** 0.5", tests=tests) == 0.0
    assert score(verifier, cheat, tests=tests) == 0.0
    adds = "def sum(a, b): return a + b"
    assert score(verifier, adds, answer=adds, tests=["assert sum(1, 2) == 3"]) == 1.0
    size = "import sys\ndef size(x): return sys.getsizeof(x)"
    tests = ["assert size('ab') == sys.getsizeof('ab')"]
    fake = "class sys:\n    getsizeof = staticmethod(lambda x: 1)\ndef size(x): return 1"
    assert (
        score(verifier, size, answer=size, tests=tests) == 1.0
        and score(verifier, fake, answer=size, tests=tests) == 0.0
    )
    counter = "class Counter:\n    n = 0\n    def add(self): self.n += 1; return self.n"
    uses = ["counter = Counter()\ncounter.add()\nassert counter.add() == 2 and counter.n == 2"]
    assert score(verifier, counter, answer=counter, tests=uses) == 1.0
    assert score(verifier, counter, answer="def Counter(): return 3", tests=uses) == 0.0


DATABASES = (
    "CREATE TABLE t (name TEXT, age INT); INSERT INTO t VALUES ('Ann', 30), ('Bob', 20), ('Cy', 20);",
    "CREATE TABLE t (name TEXT, age INT); INSERT INTO t VALUES ('Dee', 7), ('Eva', 40);",
)


def test_a_query_is_judged_by_its_rows_on_every_database():
    verifier = SqlRows(sandbox=SANDBOX)
    answer = "SELECT name FROM t WHERE age < 25"

    def judged(response: str, reference: str = answer) -> float:
        return score(verifier, response, answer=reference, databases=DATABASES)

    for right in (
        answer,
        f"```sql\n{answer};\n```",
        "select name as who from t where not age >= 25 order by name desc",
    ):
        assert judged(right) == 1.0, right
    for wrong in (*GARBAGE, PROMPT, "SELECT name FROM t", "SELECT 'Bob' UNION SELECT 'Cy'", "SELECT name, age FROM t",
                  "DROP TABLE t", f"{answer}; {answer}", "SELECT name FROM t WHERE age < 25 LIMIT 1",
                  "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n FROM c) SELECT n FROM c"):  # fmt: skip
        assert judged(wrong) == 0.0, wrong
    ordered = f"{answer} ORDER BY name"
    assert judged(ordered, ordered) == 1.0 and judged(f"{ordered} DESC", ordered) == 0.0
    with pytest.raises(ValueError, match="finds no row"):
        judged("SELECT name FROM t WHERE age > 99", "SELECT name FROM t WHERE age > 99")
    with pytest.raises(ValueError, match="reference query .* fails: .*no such table: u"):
        judged(answer, "SELECT * FROM u")


@pytest.mark.parametrize(
    "verifier, metadata, message",
    [
        (CodeOutput(sandbox=SANDBOX), {}, 'needs "tests"'),
        (CodeOutput(sandbox=SANDBOX), {"tests": [{"input": "1"}]}, 'is no {"input": text'),
        (CodeOutput(sandbox=SANDBOX), {"tests": [{"input": "1", "output": " \n"}]}, "does nothing would pass"),
        (UnitTests(sandbox=SANDBOX), {"tests": []}, 'needs "tests"'),
        (UnitTests(sandbox=SANDBOX), {"tests": ["add(1, 2)"]}, "assert nothing"),
        (UnitTests(sandbox=SANDBOX), {"tests": ["assert add(1,"]}, "no Python code"),
        (UnitTests(sandbox=SANDBOX), {"tests": ["assert add(1, 2) == 3"]}, "answer of task .* is no Python code"),
        (SqlRows(sandbox=SANDBOX), {}, 'needs "database"'),
    ],
)
def test_a_task_that_cannot_be_judged_is_refused_when_it_is_read(verifier, metadata, message):
    with pytest.raises(ValueError, match=message):
        score(verifier, "x", answer="SELECT 1", **metadata)


def test_code_is_found_where_models_write_it():
    assert block("a\n```python\nx\n```\nb\n```\ny\n```\n```text\nz\n```", ("python",)) == "x\n"
    assert block("```\ny\n```\n```text\nz\n```", ("python",)) == "y\n"
    assert block("```text\nz\n```", ("python",)) is None
    assert block("  x = 1", ("python",)) == "  x = 1"


def test_a_verifier_is_the_same_in_another_process():
    from posttrain.data.verify.pool import VerifierPool

    verifier = dataclasses.replace(UnitTests(sandbox=SANDBOX))
    tasks = [build_task("code", prompt_messages(PROMPT), verifier, answer=ADD, metadata={"tests": TESTS})] * 3
    with VerifierPool(timeout=10.0) as pool:
        verdicts = pool.judge(tasks, [ADD, "def add(a, b):\n  while True: pass", ADD])
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 1.0]
    assert verdicts[1].reason == "3 of 3 tests fail: no verdict: ran out of time"
