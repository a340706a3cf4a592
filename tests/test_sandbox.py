"""The sandbox: code in it does what code does, and none of the attacks gets through that its level has to withstand.

Every test runs at each level that this machine reaches; the others are skipped, with the reason.
"""

import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from posttrain.data.sandbox import probes
from posttrain.data.sandbox.level import Level, SandboxError, machine, require
from posttrain.data.sandbox.run import Limits, Program, Sandbox
from posttrain.launch import checkup

LEVELS = (Level.BUBBLEWRAP, Level.LANDLOCK, Level.PLAIN)


@pytest.fixture(params=LEVELS, ids=lambda level: level.name)
def sandbox(request) -> Sandbox:
    if machine().level < request.param:
        pytest.skip(f"this machine reaches {machine().level.name}: {machine().reason}")
    limits = Limits(seconds=5.0, memory=512 << 20, output=1 << 16)
    return Sandbox(required=Level.PLAIN, level=request.param, limits=limits)


def test_no_attack_gets_through_that_the_level_has_to_withstand(sandbox):
    got_through = [finding for finding in probes.check(sandbox) if not finding.held]
    assert [finding for finding in got_through if finding.needed <= (sandbox.level or 0)] == []
    if sandbox.level is Level.PLAIN:  # the attacks are real: without a wall around files they succeed
        assert {"writes a file outside", "reads a file outside"} <= {finding.name for finding in got_through}


def test_doctor_attacks_the_sandbox_of_this_machine_and_says_how_it_held():
    found = {check.about: check for check in checkup.checks()}
    assert list(found) == ["devices", "TPU compiler", "sandbox", "attacks on it"]
    assert found["attacks on it"].holds, found["attacks on it"].said
    assert found["attacks on it"].said.startswith(f"{len(probes.probes())} of {len(probes.probes())} withstood")
    assert found["sandbox"].said.startswith(machine().level.name.lower())


def test_a_program_gets_its_input_and_gives_its_output_and_exit_code(sandbox):
    source = (
        "import sys\nnumber = int(input())\nprint(number * 2, '\u00e9')\nprint('no', file=sys.stderr)\nexit(number)"
    )
    outcomes = sandbox.run(Program(source=source), ["0", "3"])
    assert [(each.kind, each.code, each.stdout, each.stderr) for each in outcomes] == [
        ("exited", 0, "0 é\n", "no\n"),
        ("exited", 3, "6 é\n", "no\n"),
    ]
    assert outcomes[0].succeeded and not outcomes[1].succeeded


def test_runs_share_nothing_but_files_and_sandboxes_not_even_those(sandbox):
    source = "import os, collections\nprint(os.path.exists('mark'), getattr(collections, 'mark', 0))\n"
    source += "open('mark', 'w').close(); collections.mark = 1"
    assert [each.stdout for each in sandbox.run(Program(source=source), ["", ""])] == ["False 0\n", "True 0\n"]
    assert sandbox.run(Program(source=source))[0].stdout == "False 0\n"


def test_what_ordinary_programs_use_works_inside(sandbox):
    source = """
import asyncio, hashlib, json, math, random, re, sqlite3, subprocess, tempfile, threading, unittest
async def double(): await asyncio.sleep(0); return 2
thread = threading.Thread(target=lambda: print(asyncio.run(double())))
thread.start(); thread.join()
with tempfile.TemporaryFile("w+") as file: file.write("kept"); file.seek(0); print(file.read())
print(sqlite3.connect(":memory:").execute("select 1 + 1").fetchone())
print(subprocess.run(["echo", "hello"], capture_output=True, text=True).stdout.strip())
print(__name__, len({"a", "b"}), hash("the same every time") % 7)
"""
    once, again = (sandbox.run(Program(source=source))[0] for _ in range(2))
    assert once.stdout.splitlines()[:-1] == ["2", "kept", "(2,)", "hello"], once.stderr
    assert once.stdout == again.stdout and once.stdout.splitlines()[-1].startswith("__main__ 2 ")


def test_a_program_ends_as_it_would_anywhere(sandbox):
    source = """
import atexit, sys, threading, time
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.05), print("thread"))).start()
kept = open(1, "w", closefd=False)
kept.write("not closed")
class Last:
    def __del__(self): print("del", file=sys.stderr)
last = Last()
print("end")
"""
    done = sandbox.run(Program(source=source))[0]
    assert (done.code, done.stdout, done.stderr) == (0, "end\nthread\nat exit\nnot closed", "del\n")


def test_packages_are_read_where_they_are_asked_for(sandbox):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "helper.py").write_text("VALUE = 5")
        program = Program(source="import helper; print(helper.VALUE)")
        assert dataclasses.replace(sandbox, packages=(name,)).run(program)[0].stdout == "5\n"
        assert "No module named 'helper'" in sandbox.run(program)[0].stderr


def test_another_language_is_built_once_and_run_on_each_input(sandbox):
    program = Program(
        source="read number; echo $((number + BUILT))", file="main.sh", run=("sh", "built.sh"),
        build=("sh", "-c", "(echo BUILT=1; cat main.sh) > built.sh"),
    )  # fmt: skip
    assert [each.stdout for each in sandbox.run(program, ["1\n", "41\n"])] == ["2\n", "42\n"]
    broken = dataclasses.replace(program, build=("sh", "-c", "echo no compiler >&2; exit 9"))
    assert [(each.code, each.stderr) for each in sandbox.run(broken, ["1", "2"])] == [(9, "no compiler\n")] * 2
    missing = dataclasses.replace(program, build=(), run=("no-such-tool",))
    assert sandbox.run(missing)[0].describe() == "exit code 127: no-such-tool: No such file or directory"


def test_a_solution_answers_its_tests_from_another_process(sandbox):
    solution = """
import collections
LIMIT = 3
def add(a, b=1): return a + b
def grow(items): items.append(len(items)); return None
def fail(value): raise ValueError(f"bad {value}")
def count(word): return collections.Counter(word)
def stream(): yield from (1, 2, 3)
def only(kind, *items): return [item for item in items if type(item) is kind], kind
def half(): import decimal, fractions; return fractions.Fraction(1, 2), decimal.Decimal("0.10")
def big(): return 2 ** 100, -0.0, float("inf"), {(1, 2): {3}}, b"x", None, "\\ud800", 1j
"""
    tests = [
        "assert add(2) == 3 and add(a=2, b=3) == 5 and LIMIT == 3",
        "items = [7]\ngrow(items)\nassert items == [7, 1]",
        "try: fail(9)\nexcept ValueError as error: assert str(error) == 'bad 9'\nelse: assert False",
        "assert count('aab') == {'a': 2, 'b': 1} and list(stream()) == [1, 2, 3]",
        "assert big() == (2 ** 100, 0.0, float('inf'), {(1, 2): {3}}, b'x', None, '\\ud800', 1j)",
        "assert only(str, 1, 'a', None) == (['a'], str) and only(type(None), 1, None)[0] == [None]",
        "from math import isclose\nassert isclose(add(1.5), helper(2.5))",
        "import decimal as d, fractions as f\nassert half() == (f.Fraction(1, 2), d.Decimal('0.1'))",
        "assert add(1) == 3",
        "assert missing() == 1",
        "raise SystemExit(0)",
    ]
    failures, outcome = sandbox.test(solution, tests, setup="def helper(x): return x")
    assert failures == [
        "", "", "", "", "", "", "", "",
        "a test failed: assert add(1) == 3",
        "NameError: name 'missing' is not defined",
        "the test ended its process",
    ]  # fmt: skip
    assert outcome.succeeded


def test_objects_of_a_solution_are_used_where_the_task_is_about_classes(sandbox):
    solution = """
class Node:
    def __init__(self, value): self.value, self.left = value, None
    def __len__(self): return 1 + (len(self.left) if self.left else 0)
    def __eq__(self, other): return True
def depth(node): return len(node)
"""
    tests = ["root = Node(3)\nroot.left = Node(4)\nassert root.left.value == 4 and depth(root) == len(root) == 2",
             "assert Node(1) == 1", "assert Node(1) + 1 == 2"]  # fmt: skip
    assert sandbox.test(solution, tests, objects=True)[0] == [
        "",
        "a test failed: assert Node(1) == 1",
        "TypeError: the solution returned an object that is no data, and the test computes add with it",
    ]
    assert "and the test wants its set" in sandbox.test(solution, tests, objects=False)[0][0]


def test_a_solution_cannot_stand_in_for_what_its_tests_use(sandbox):
    solution = "def near(): return 9\ndef abs(x): return 0\ndef check(x): return True"
    tests = ["def check(x): return x == 1\nassert check(near())", "assert abs(near() - 1) < 1e-6"]
    assert [bool(failure) for failure in sandbox.test(solution, tests)[0]] == [True, True]
    assert sandbox.test("def sum(a, b): return a * b", ["assert sum(3, 4) == 12"], names=["sum"])[0] == [""]


def test_a_slow_test_costs_those_after_it(sandbox):
    slow = dataclasses.replace(sandbox, limits=Limits(seconds=1.0))
    failures, outcome = slow.test("def f(x):\n  while x: pass", ["assert f(0) is None", "f(1)", "f(0)"])
    assert failures == ["", "no verdict: ran out of time", "no verdict: ran out of time"]
    assert outcome.kind == "timeout"


def test_the_sandbox_ends_with_whoever_started_it(sandbox):
    name = f"endless{time.monotonic_ns() % 10**6}"
    source = f"import ctypes, time\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\ntime.sleep(60)"
    program = (
        "from posttrain.data.sandbox.run import *\n"
        f"Sandbox(required=Level.PLAIN, level=Level({int(sandbox.level)}), limits=Limits(seconds=60))"
        f".run(Program(source={source!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as caller:
        wait_until(lambda: probes.alive(name) == 1)
        caller.kill()
    wait_until(lambda: probes.alive(name) == 0)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_code_is_refused_below_the_required_level():
    with pytest.raises(ValueError, match="level PLAIN was asked for, and BUBBLEWRAP is required"):
        Sandbox(level=Level.PLAIN)
    require(machine().level)
    if machine().level < Level.BUBBLEWRAP:
        with pytest.raises(SandboxError, match="Install bubblewrap"):
            Sandbox().run(Program(source="print(1)"))
    with pytest.raises(ValueError, match="above 0, got seconds=0"):
        Limits(seconds=0)
