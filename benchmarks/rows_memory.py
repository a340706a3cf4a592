"""Peak memory of writing generated rows and of filtering them, for a number of prompts and for four times as many.

    python benchmarks/rows_memory.py --prompts 10000

The answers lie in journals, as a generation leaves them when its last block is complete; four of about 2 kB to each
prompt. Each size and each stage is a process of its own, whose peak is compared with that of a process which only
imports the same. Prompts are random letters, of which near-duplicate filtering keeps all: the most it has to remember.
"""

import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from posttrain.data.characters import Characters
from posttrain.data.filters import duplicates, outcome
from posttrain.model.processing import Sampling
from posttrain.train.answers import Answer, Local
from posttrain.train.curate import Curate
from posttrain.train.generate import Generate

SAMPLES, WORDS = 4, 320
Step = Literal["import", "prepare", "write", "filter", "deduplicate"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`prompts` and four times as many; `step`, `out` and `count` are for the processes that this one starts."""

    prompts: int = 10_000
    step: Step | None = None
    out: Path = Path()
    count: int = 0


def generation(count: int) -> Generate:
    source = Characters(operation="reverse", length=12, letters=3)  # 531,441 strings
    teachers = {"*": Local(model="nobody")}
    return Generate(prompts=(source,), teachers=teachers, sampling=Sampling(max_tokens=8), samples=SAMPLES, limit=count)


def prepare(out: Path, count: int) -> None:
    """Journals as if a teacher had answered everything, every other answer right."""
    stage, folder = generation(count), out / "generated" / "answers"
    folder.mkdir(parents=True)
    for block in stage._blocks():
        with block.complete(folder).open("w") as file:
            for task in stage._tasks(block):
                for sample in range(SAMPLES):
                    message = {"role": "assistant", "content": f"{task.answer} {sample} " + "because " * WORDS}
                    answer = Answer(task.id, sample, message, "stop", WORDS, 20, "0123")
                    verdict = {"task": task.id, "sample": sample, "score": float(sample % 2), "reason": ""}
                    file.write(f"{json.dumps(answer._asdict())}\n{json.dumps(verdict)}\n")


def work(settings: Settings) -> None:
    """A step, in a process of its own; prints its peak in kB."""
    out = settings.out
    if settings.step == "prepare":
        prepare(out, settings.count)
    elif settings.step == "write":
        generation(settings.count).train(out / "generated")
    elif settings.step in ("filter", "deduplicate"):
        chosen = (outcome.Finished(), outcome.Verified(), outcome.ShortestCorrect(count=1))
        filters = chosen if settings.step == "filter" else (*chosen, duplicates.NearDuplicatePrompts())
        Curate(rows=(str(out / "generated"),), filters=filters).train(out / settings.step)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def peak(step: Step, out: Path, count: int) -> int:
    """MiB of a step's process at its peak."""
    command = [sys.executable, __file__, "--step", step, "--out", str(out), "--count", str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1]) >> 10


def main(settings: Settings) -> None:
    """Print a table in Markdown: MiB above what importing takes."""
    sizes = (settings.prompts, 4 * settings.prompts)
    steps: tuple[Step, ...] = ("write", "filter", "deduplicate")
    found: dict[str, list[int]] = {step: [] for step in steps}
    written = []
    for count in sizes:
        with tempfile.TemporaryDirectory() as name:
            base = peak("import", Path(name), count)
            peak("prepare", Path(name), count)
            written.append(sum(file.stat().st_size for file in Path(name).rglob("*.jsonl")) >> 20)
            for step in steps:
                found[step].append(peak(step, Path(name), count) - base)
    print(f"| | {' | '.join(f'{SAMPLES * count:,} rows' for count in sizes)} |\n|---|---|---|")
    print(f"| in the journals, MiB | {' | '.join(map(str, written))} |")
    for step, values in found.items():
        print(f"| {step}, MiB at the peak | {' | '.join(map(str, values))} |")


if __name__ == "__main__":
    chosen = tyro.cli(Settings, description=__doc__)
    work(chosen) if chosen.step else main(chosen)
