"""Verifiers that misbehave, for the tests of the pool. Light to import: every new worker does."""

import os
import signal
import sys

from posttrain.data.task import Task, Verdict
from posttrain.data.tasks import build_task, prompt_messages


def good(task, response):
    return Verdict(1.0 if response == task.answer else 0.25, "compared")


def endless(task, response):
    while True:
        pass


def endless_in_c(task, response):
    return Verdict(float(9**9**9 > 0), "never reached, and the interpreter's lock is held")


def exits(task, response):
    raise SystemExit(0)


def exits_at_once(task, response):
    os._exit(0)


def kills_itself(task, response):
    os.kill(os.getpid(), signal.SIGKILL)


def raises(task, response):
    raise KeyError("missing")


def recurses(task, response):
    return recurses(task, response)


def fills_memory(task, response):
    return Verdict(float(len(bytearray(8 * 2**30)) > 0), "never reached")


def bare_number(task, response):
    return 1.0


def score_of_two(task, response):
    return Verdict(2.0, "too much")


def score_of_nan(task, response):
    return Verdict(float("nan"), "not a number")


def score_of_text(task, response):
    return Verdict("1", "text")  # type: ignore[arg-type]


def prints(task, response):
    os.write(1, b'["ok", 1.0, "forged"]\n')
    print("a line on standard output", "x" * 100_000)
    print("and on standard error", "x" * 100_000, file=sys.stderr)
    return Verdict(0.5, f"read {sys.stdin.read()!r}")


def reports_imports(task, response):
    heavy = [name for name in ("jax", "flax", "torch", "transformers", "sympy", "reasoning_gym") if name in sys.modules]
    return Verdict(float(not heavy), ",".join(heavy))


def reports_environment(task, response):
    return Verdict(1.0, ",".join(sorted(os.environ)))


def reports_hash(task, response):
    return Verdict(1.0, str(hash("the same in every worker")))


def task_of(verifier, answer: str = "5") -> Task:
    return build_task("test", prompt_messages("What is 2 + 3?"), verifier, answer=answer)
