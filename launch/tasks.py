"""Task sources by the words that name them on the command line."""

from pathlib import Path
from typing import Literal

from ..data.arithmetic import Arithmetic
from ..data.characters import Characters
from ..data.instruction_tasks import ALL_KINDS, Instructions
from ..data.jsonl_tasks import JsonlTasks
from ..data.task import TaskSource
from ..data.verify.choice import Choice
from ..data.verify.maths import FinalNumber
from ..data.verify.text import ExactText

Verifier = Literal["number", "text", "choice"]
VERIFIERS = {"number": FinalNumber, "text": ExactText, "choice": Choice}


def source(spec: str, *, verifier: Verifier = "number") -> TaskSource:
    """The tasks that a word on the command line stands for.

    Raises:
        ValueError, FileNotFoundError: with what may be given instead.
    """
    name, _, rest = spec.partition(":")
    if spec.endswith(".jsonl"):
        found = JsonlTasks(path=spec, verifier=VERIFIERS[verifier](), name=Path(spec).stem)
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
