"""Verifiers that run the code of a response in a sandbox: on inputs, comparing what it prints, and under unit tests.

Both read `task.metadata["tests"]`, which no code under test ever sees. They need a sandbox of the level that they name
(`data.sandbox.level`); `check`, which readers of task files call, refuses a machine that does not reach it.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..sandbox.level import require
from ..sandbox.run import Limits, Outcome, Program, Sandbox
from ..task import Task, Verdict
from .extract import block
from .guard import refusal

SANDBOX = Sandbox(limits=Limits(seconds=5.0, cpu_seconds=5))


class Language(NamedTuple):
    """How programs of a language are run: names of its fences, file, build and run commands."""

    fences: tuple[str, ...]
    file: str
    build: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    address_space: bool = True

    def program(self, source: str) -> Program:
        """A program in this language."""
        return Program(
            source=source, file=self.file, build=self.build, run=self.run, address_space=self.address_space
        )  # fmt: skip


# The runners; another language is another row. Their tools have to be on the machine, below /usr.
LANGUAGES: Mapping[str, Language] = {
    "python": Language(("python", "python3", "py"), "main.py"),
    "bash": Language(("bash", "sh", "shell"), "main.sh", run=("bash", "main.sh")),
    "perl": Language(("perl", "pl"), "main.pl", run=("perl", "main.pl")),
    "ruby": Language(("ruby", "rb"), "main.rb", run=("ruby", "main.rb")),
    "javascript": Language(("javascript", "js", "node"), "main.js", run=("node", "main.js"), address_space=False),
    "c": Language(("c",), "main.c", ("cc", "-O2", "-o", "main", "main.c", "-lm"), ("./main",)),
    "cpp": Language(("cpp", "c++", "cc"), "main.cpp", ("c++", "-O2", "-o", "main", "main.cpp"), ("./main",)),
    "rust": Language(("rust", "rs"), "main.rs", ("rustc", "-O", "-o", "main", "main.rs"), ("./main",)),
    "go": Language(("go", "golang"), "main.go", ("go", "build", "-o", "main", "main.go"), ("./main",), False),
    "java": Language(("java",), "Main.java", ("javac", "Main.java"), ("java", "Main"), False),
}


@dataclass(frozen=True)
class CodeOutput:
    """1 where the response's program prints what is expected on every input; else 0.

    `metadata["tests"]` is a list of {"input": text, "output": text}. Compared are lines without blanks at their ends,
    and no blank lines at the end of the output. The program is what `extract.block` finds; it is run until it fails.
    """

    language: str = "python"
    sandbox: Sandbox = field(default=SANDBOX)

    def __post_init__(self):
        if self.language not in LANGUAGES:
            raise ValueError(f"there is no runner for {self.language!r}: choose one of {', '.join(LANGUAGES)}")

    def check(self, task: Task) -> None:
        """A ValueError for tests that judge nothing; a SandboxError where the machine cannot run code safely."""
        _pairs(task)
        require(self.sandbox.required)

    def __call__(self, task: Task, response: str) -> Verdict:
        pairs = _pairs(task)
        runner = LANGUAGES[self.language]
        source = block(response, runner.fences)
        refused = refusal(task, response)
        if refused or source is None:
            return refused or Verdict(0.0, f"no {self.language} code")
        outcomes = self.sandbox.run(runner.program(source), [given for given, _ in pairs], until_failure=True)
        for number, ((_, expected), outcome) in enumerate(zip(pairs, outcomes, strict=False), start=1):
            if not outcome.succeeded:
                return Verdict(0.0, f"test {number} of {len(pairs)}: {outcome.describe()}")
            if _lines(outcome.stdout) != _lines(expected):
                return Verdict(0.0, f"test {number} of {len(pairs)}: printed {outcome.stdout[:60]!r}")
        return Verdict(1.0, f"all {len(pairs)} tests pass")


@dataclass(frozen=True)
class UnitTests:
    """1 where every test of `metadata["tests"]` passes with the response's Python code; else 0.

    Tests are pieces of code with assertions, run in order after `metadata["setup"]`. They call the solution's
    functions and compare the data that comes back (see `data.sandbox.asking`). With a reference solution as the
    task's answer, tests see the names that it defines, what it imports, and objects of the solution's classes where it
    has any; without, the names that they use, but for Python's own, and no objects, unless `metadata["objects"]` is
    true.
    """

    sandbox: Sandbox = field(default=SANDBOX)

    def check(self, task: Task) -> None:
        """A ValueError for tests that judge nothing; a SandboxError where the machine cannot run code safely."""
        _tests(task)
        _defined(task)
        require(self.sandbox.required)

    def __call__(self, task: Task, response: str) -> Verdict:
        tests = _tests(task)
        source = block(response, LANGUAGES["python"].fences)
        refused = refusal(task, response)
        if refused or source is None:
            return refused or Verdict(0.0, "no Python code")
        names, has_classes = _defined(task)
        failures, outcome = self.sandbox.test(
            source, tests, setup=f"{_imports(task)}\n{task.metadata.get('setup', '')}", names=names,
            objects=bool(task.metadata.get("objects", has_classes)),
        )  # fmt: skip
        failed = [failure for failure in failures if failure]
        if not failed:
            return Verdict(1.0, f"all {len(tests)} tests pass")
        return Verdict(0.0, f"{len(failed)} of {len(tests)} tests fail: {_why(failed[0], outcome)}")


def _why(failure: str, outcome: Outcome) -> str:
    """The failure; where the solution ended, with its last words."""
    last = outcome.stderr.strip().splitlines()[-1:] if "solution ended" in failure else []
    return f"{failure}{': ' if last else ''}{''.join(last)}"[:200]


def _imports(task: Task) -> str:
    """The imports of the reference solution whose names the tests use: for the tests' own process."""
    if task.answer is None:
        return ""
    used = {node.id for test in _tests(task) for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    nodes = (node for node in _reference(task).body if isinstance(node, ast.Import | ast.ImportFrom))
    named = (node for node in nodes if {name.asname or name.name.partition(".")[0] for name in node.names} & used)
    return "\n".join(map(ast.unparse, named))


def _reference(task: Task) -> ast.Module:
    try:
        return ast.parse(block(task.answer or "", LANGUAGES["python"].fences) or "")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the answer of task {task.id} is no Python code ({error}): {task.answer!r:.60}") from None


def _defined(task: Task) -> tuple[list[str] | None, bool]:
    """The names that the reference solution makes at its top level, and whether classes are among them."""
    if task.answer is None:
        return None, False
    found: list[str] = []
    tree = _reference(task)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append(node.name)
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            stored = (part for part in ast.walk(node) if isinstance(part, ast.Name))
            found += [part.id for part in stored if isinstance(part.ctx, ast.Store)]
    return found, any(isinstance(node, ast.ClassDef) for node in tree.body)


def _tests(task: Task) -> list[str]:
    tests = task.metadata.get("tests")
    if not isinstance(tests, list | tuple) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError(f'task {task.id} needs "tests", a list of pieces of code with assertions, got {tests!r:.80}')
    for source in (*tests, task.metadata.get("setup", "")):
        try:
            ast.parse(source)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"a test of task {task.id} is no Python code ({error}): {source[:60]!r}") from None
    if not any(isinstance(node, ast.Assert | ast.Raise) for test in tests for node in ast.walk(ast.parse(test))):
        raise ValueError(f"the tests of task {task.id} assert nothing: any code would pass them")
    return list(tests)


def _pairs(task: Task) -> list[tuple[str, str]]:
    tests = task.metadata.get("tests")
    if not isinstance(tests, list | tuple) or not tests:
        raise ValueError(f'task {task.id} needs "tests", a list of {{"input": ..., "output": ...}}, got {tests!r:.80}')
    pairs: list[tuple[str, str]] = []
    for test in tests:
        given, expected = (test.get("input", ""), test.get("output")) if isinstance(test, dict) else (None, None)
        if not isinstance(given, str) or not isinstance(expected, str):
            raise ValueError(f'a test of task {task.id} is no {{"input": text, "output": text}}: {test!r:.80}')
        pairs.append((given, expected))
    if not any(expected.strip() for _, expected in pairs):
        raise ValueError(f"the tests of task {task.id} expect no output: a program that does nothing would pass them")
    return pairs


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
