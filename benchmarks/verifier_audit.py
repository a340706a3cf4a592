"""What every verifier says of right answers, of right answers spoilt, and of junk: false rejects and false accepts.

    .venv/bin/python benchmarks/verifier_audit.py --data DATA

Right answers come from the tasks themselves, each in several spellings that people and models use. Spoilt ones have one
thing changed that makes them wrong: a digit, a letter, an argument, a row, a mark. Junk is the same for all: nothing,
blanks, noise, the prompt, the prompt with an opening, the answer to another task; of instructions that do not say what
to write about, blanks and the prompt alone. DATA is a folder with math/gsm8k_test.jsonl, math/math_test.jsonl and
science/arc_challenge_train.jsonl as published; without it the project's own tasks are judged. `code_verifier.py` is the
audit of unit tests on published tasks.
"""

import random
import sys

import tyro
from audit_cases import AUDITS, Case, Settings

from posttrain.data.sandbox.level import machine
from posttrain.data.verify.ifeval import IFEval
from posttrain.data.verify.instructions import Follow
from posttrain.data.verify.pool import VerifierPool


def junk(case: Case, another: Case) -> list[str]:
    """What no verifier may accept; the answer to another task only where it is not right here, too."""
    prompt = str(case.task.messages[0]["content"])
    if isinstance(case.task.verifier, IFEval):
        return ["", " \n\t", prompt, f" {prompt}\n"]
    noise = [
        "",
        " \n\t",
        "zxqj blah",
        "!!!",
        "\x00",
        "()",
        "{",
        "```\n```",
        "\\boxed{}",
        "<answer></answer>",
        "I cannot help.",
    ]
    echoes = [prompt, f" {prompt}\n", f"You ask: {prompt}"]
    if case.task.answer in (None, another.task.answer) or isinstance(case.task.verifier, Follow):
        return noise + echoes  # the answer to another task may be one to this
    return noise + echoes + [text for text in another.right[:1] if text not in case.right]


def audit(pool: VerifierPool, cases: list[Case]) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """(mistakes, answers) of right, spoilt and junk answers, and the mistakes themselves."""
    counts, mistakes = {}, []
    for kind in ("right", "spoilt", "junk"):
        pairs = []
        for place, case in enumerate(cases):
            answers = {"right": case.right, "spoilt": case.wrong, "junk": junk(case, cases[place - 1])}[kind]
            pairs += [(case.task, answer) for answer in answers]
        verdicts = pool.judge([task for task, _ in pairs], [answer for _, answer in pairs])
        wrong = [
            pair for pair, verdict in zip(pairs, verdicts, strict=True) if (verdict.score == 1.0) != (kind == "right")
        ]
        counts[kind] = (len(wrong), len(pairs))
        mistakes += [f"{kind}: {answer[:70]!r}, expected {str(task.answer)[:40]!r}" for task, answer in wrong]
    return counts, mistakes


def main(settings: Settings) -> None:
    source = "published tasks where there are some" if settings.data else "the project's own tasks"
    print(f"{source}; code in a sandbox of level {machine().level.name.lower()}\n")
    columns = ["verifier", "tasks", "right rejected", "spoilt accepted", "junk accepted", "errors, time-outs"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    examples: list[str] = []
    for name, build in AUDITS.items():
        cases = list(build(settings))
        if not cases:
            print(f"{name} needs --data", file=sys.stderr)
            continue
        with VerifierPool(workers=2, timeout=15.0) as pool:
            counts, mistakes = audit(pool, cases)
            failures = pool.counts.total() - pool.counts["judged"]
        cells = " | ".join(f"{wrong} of {total}" for wrong, total in counts.values())
        print(f"| {name} | {len(cases)} | {cells} | {failures} |", flush=True)
        examples += [f"{name}, {mistake}" for mistake in random.Random(0).sample(mistakes, min(6, len(mistakes)))]
    print("\n".join(["", *examples]))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
