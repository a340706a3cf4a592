"""The unit-test verifier on MBPP and HumanEval: all reference solutions must pass, and changed ones must not.

    .venv/bin/python benchmarks/code_verifier.py --mbpp mbpp.jsonl --humaneval HumanEval.jsonl.gz

Three kinds of solutions that are not the reference are judged. One whose every return gives something else has to fail.
One with an operator, a constant or a condition changed may still be right, or the tests too few to tell: it is also run
with its tests in one interpreter, as most stacks do, and both have to say the same. And solutions that cheat - they end
the process, equal everything, raise, look for the expected values - have to fail; how many of them pass in one
interpreter is shown beside. What differs is listed.
"""

import ast
import gzip
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from posttrain.data.sandbox.level import Level, machine
from posttrain.data.sandbox.run import Limits, Program, Sandbox
from posttrain.data.task import Task
from posttrain.data.tasks import build_task, prompt_messages
from posttrain.data.verify.code import UnitTests

CHEATS = {
    "ends the process": "raise SystemExit(0)",
    "equals everything": "class All:\n    def __eq__(self, other): return True\ndef {name}(*a, **k): return All()",
    "ends loops": "def {name}(*a, **k): raise StopIteration",
    "patches builtins": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = Warning\n"
    "def {name}(*a, **k): return True",
}
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    name: str
    task: Task
    reference: str
    entry: str


def mbpp(path: Path, verifier: UnitTests) -> Iterator[Item]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        reference = row["code"].replace("\r\n", "\n")
        tests = {"tests": row["test_list"] + row["challenge_test_list"], "setup": row["test_setup_code"]}
        yield item(f"mbpp/{row['task_id']}", row["text"], reference, tests, verifier)


def humaneval(path: Path, verifier: UnitTests) -> Iterator[Item]:
    content = path.read_bytes()
    for line in (gzip.decompress(content) if path.suffix == ".gz" else content).decode().splitlines():
        row = json.loads(line)
        reference = row["prompt"] + row["canonical_solution"]
        tests = {"tests": [f"{row['test']}\ncheck({row['entry_point']})"]}
        yield item(row["task_id"], row["prompt"], reference, tests, verifier)


def item(name: str, prompt: str, reference: str, tests: dict, verifier: UnitTests) -> Item:
    task = build_task("code", prompt_messages(prompt), verifier, answer=reference, metadata=tests, id=name)
    verifier.check(task)
    used = {node.id for test in tests["tests"] for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    defined = [node.name for node in ast.parse(reference).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return Item(name, task, reference, next(name for name in reversed(defined) if name in used))


class OtherReturns(ast.NodeTransformer):
    """Every value that is returned, as one half of a pair."""

    def visit_Return(self, node: ast.Return) -> ast.AST:
        return ast.Return(ast.Tuple([node.value or ast.Constant(None), ast.Constant("other")], ast.Load()))

    def visit_Yield(self, node: ast.Yield) -> ast.AST:
        return ast.Yield(ast.Tuple([node.value or ast.Constant(None), ast.Constant("other")], ast.Load()))


def other_returns(source: str) -> str:
    return ast.unparse(ast.fix_missing_locations(OtherReturns().visit(ast.parse(source))))


def changed(source: str, choose: random.Random, count: int) -> list[str]:
    """Sources with one operator, constant or condition changed, a place each."""
    made: set[str] = set()
    places = [(number, kind) for number, node in enumerate(ast.walk(ast.parse(source))) for kind in changes(node)]
    for number, kind in choose.sample(places, len(places)):
        tree = ast.parse(source)
        change(list(ast.walk(tree))[number], kind)
        made.add(ast.unparse(ast.fix_missing_locations(tree)))
        if len(made) == count:
            break
    return sorted(made)


def changes(node: ast.AST) -> list[str]:
    found = []
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        found.append("operator")
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        found.append("comparison")
    if isinstance(node, ast.Constant) and type(node.value) is int:
        found.append("constant")
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        found.append("condition")
    return found


def change(node: ast.AST, kind: str) -> None:
    if kind == "operator" and isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign):
        node.op = SWAPS[type(node.op)]()
    if kind == "comparison" and isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()
    if kind == "constant" and isinstance(node, ast.Constant) and isinstance(node.value, int):
        node.value += 1
    if kind == "condition" and isinstance(node, ast.If | ast.While | ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)


def in_one_interpreter(sandbox: Sandbox, task: Task, source: str) -> bool:
    """Whether the tests pass in the interpreter of the solution."""
    setup = task.metadata.get("setup", "")
    return sandbox.run(Program(source="\n".join([source, setup, *task.metadata["tests"]])))[0].succeeded


def judge(one: Item, sandbox: Sandbox, mutants: int, number: int) -> tuple[Counter[str], list[str]]:
    """What became of an item's solutions, counted, and what needs a look; cheats at every fifth item."""
    counts: Counter[str] = Counter(items=1)
    notes: list[str] = []

    def verdict(source: str) -> bool:
        said = one.task.verifier(one.task, source)
        if source is one.reference and said.score < 1:
            notes.append(f"{one.name}: the reference fails: {said.reason}")
        return said.score == 1.0

    counts["reference passes"] = verdict(one.reference)
    counts["reference passes in one"] = in_one_interpreter(sandbox, one.task, one.reference)
    if verdict(other_returns(one.reference)):
        counts["other returns pass"] += 1
        notes.append(f"{one.name}: passes although it returns something else")
    for source in changed(one.reference, random.Random(one.name), mutants):
        ours, theirs = verdict(source), in_one_interpreter(sandbox, one.task, source)
        counts.update({"changed": 1, "changed pass": ours, "changed differ": ours != theirs})
        if ours != theirs:
            notes.append(f"{one.name}: a changed solution {'passes' if ours else 'fails'}, and not in one interpreter")
    for name, cheat in CHEATS.items() if number % 5 == 0 else ():
        source = cheat.replace("{name}", one.entry)
        ours = verdict(source)
        counts.update({"cheats": 1, "cheats pass": ours})
        counts["cheats pass in one"] += in_one_interpreter(sandbox, one.task, source)
        if ours:
            notes.append(f"{one.name}: a solution that {name} passes")
    return counts, notes


COLUMNS = {
    "references pass": "{reference passes} of {items}",
    "in one interpreter": "{reference passes in one} of {items}",
    "other returns pass": "{other returns pass} of {items}",
    "changed ones pass": "{changed pass} of {changed}",
    "verdicts unlike one interpreter's": "{changed differ} of {changed}",
    "cheats pass": "{cheats pass} of {cheats}",
    "cheats pass in one interpreter": "{cheats pass in one} of {cheats}",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Files to judge, and how much of them."""

    mbpp: Path | None = None
    """mbpp.jsonl: text, code, task_id, test_setup_code, test_list, challenge_test_list."""
    humaneval: Path | None = None
    """HumanEval.jsonl or HumanEval.jsonl.gz."""
    limit: int | None = None
    """Items of each, from the first."""
    mutants: int = 1
    """Changed solutions per item."""
    weak_sandbox: bool = False
    """Run where bubblewrap does not."""


def main(settings: Settings) -> None:
    sandbox = Sandbox(required=Level.PLAIN if settings.weak_sandbox else Level.BUBBLEWRAP, limits=Limits(seconds=10.0))
    verifier = UnitTests(sandbox)
    sources = {"MBPP": (settings.mbpp, mbpp), "HumanEval": (settings.humaneval, humaneval)}
    if not any(path for path, _ in sources.values()):
        sys.exit("code_verifier.py: give --mbpp FILE, --humaneval FILE or both")
    print(f"sandbox: {machine().level.name.lower()}; {os.cpu_count()} cores\n")
    print(f"| | {' | '.join(COLUMNS)} | seconds |\n|---|{'---|' * (len(COLUMNS) + 1)}")
    notes: list[str] = []
    for name, (path, read) in sources.items():
        if path is None:
            continue
        begun = time.monotonic()
        counts: Counter[str] = Counter()
        items = list(read(path, verifier))[: settings.limit]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(judge, one, sandbox, settings.mutants, number) for number, one in enumerate(items)]
            for job in jobs:
                found, said = job.result()
                counts.update(found)
                notes += said
        cells = " | ".join(form.format_map(counts) for form in COLUMNS.values())
        print(f"| {name} | {cells} | {time.monotonic() - begun:.0f} |", flush=True)
    print("\n".join(["", *notes]))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
