"""Task sources by the words that name them on the command line."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..data.arithmetic import Arithmetic
from ..data.characters import Characters
from ..data.instruction_tasks import ALL_KINDS, Instructions
from ..data.jsonl_tasks import JsonlTasks
from ..data.sandbox.level import Level
from ..data.task import Task, TaskSource, Verdict
from ..data.verify.choice import Choice
from ..data.verify.code import SANDBOX, CodeOutput, UnitTests
from ..data.verify.ifeval import IFEval
from ..data.verify.maths import FinalNumber
from ..data.verify.rewards import Citations
from ..data.verify.sql import SqlRows
from ..data.verify.text import ExactText
from ..data.verify.tool_calls import ToolCalls

Verifier = Callable[[Task, str], Verdict]
VERIFIERS: dict[str, Callable[[], Verifier]] = {
    "number": FinalNumber, "text": ExactText, "choice": Choice, "tool-calls": ToolCalls, "ifeval": IFEval,
    "citations": Citations,
}  # fmt: skip
RUNNING: dict[str, Callable[..., Verifier]] = {"code": CodeOutput, "unit-tests": UnitTests, "sql": SqlRows}


def judge(name: str, *, sandbox: str = "bubblewrap") -> Verifier:
    """The verifier of a name; those of optional packages are imported when they are asked for.

    `sandbox` names the least level of the sandbox in which verifiers run code.
    """
    if name == "formula":
        from ..data.verify.symbolic import MathVerify

        return MathVerify()
    if name == "json-schema":
        from ..data.verify.json_schema import JsonSchema

        return JsonSchema()
    if name in RUNNING:
        return RUNNING[name](sandbox=replace(SANDBOX, required=Level[sandbox.upper()]))
    return VERIFIERS[name]()


def source(spec: str, *, verifier: Verifier | None = None) -> TaskSource:
    """The tasks that a word on the command line stands for; the verifier judges those of a file.

    Raises:
        ValueError, FileNotFoundError, SandboxError: with what may be given instead.
    """
    name, _, rest = spec.partition(":")
    if spec.endswith(".jsonl"):
        found = JsonlTasks(path=spec, verifier=verifier or FinalNumber(), name=Path(spec).stem)
        len(found)  # reads the file: what is wrong with it is said before a model is loaded
        return found
    if name == "arithmetic" and (not rest or rest.isdecimal()):
        return Arithmetic(digits=int(rest or 1))
    if name == "instructions":
        return Instructions(kinds=(rest,) if rest else ALL_KINDS)
    if name == "characters" and rest:
        return Characters(operation=rest)  # pyright: ignore[reportArgumentType]  # checked by Characters
    if name == "reasoning-gym" and rest:
        from ..data.reasoning_gym import ReasoningGym  # an optional dependency

        return ReasoningGym(name=rest, size=1000)
    raise ValueError(
        f"no tasks {spec!r}: give FILE.jsonl, arithmetic, arithmetic:DIGITS, instructions, instructions:KIND, "
        "characters:OPERATION or reasoning-gym:NAME"
    )
