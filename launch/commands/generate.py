"""`posttrain generate`: answers of teachers to tasks, judged and filtered, as shards."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console

from ...data import shards
from ...data.endpoint import Endpoint
from ...data.filters import outcome, repetition, wording
from ...sharding import hosts
from ...train import stop
from ...train.answers import Local, Teacher
from ...train.curate import Curate
from ...train.generate import ANY, Generate
from .. import cluster, funnels, lock, report
from ..recipe import Training, remember
from ..tasks import Verifier, source

GRACE = 25.0  # seconds that SIGTERM leaves; what has been answered is on disk at any time
FILTERS = (
    outcome.Finished(),
    repetition.RepeatedSentences(),
    repetition.RepeatedParagraphs(),
    repetition.RepeatedPhrases(),
    wording.Refusals(),
    wording.Identity(),
    wording.KnowledgeDates(),
)


def main(
    teachers: Sequence[str], specs: Sequence[str], out: Path, *, verifier: Verifier, keep: int, part: int, parts: int,
    endpoint: Mapping[str, Any], settings: Mapping[str, Any],
) -> None:  # fmt: skip
    """Generate into `out`/generated; the part that is last filters into `out`/kept.

    Args:
        teachers: each [DOMAIN=]MODEL or [DOMAIN=]URL#MODEL.
        specs: the tasks, as the command line names them.
        out: the folder of all parts.
        verifier: what judges answers to JSON Lines files.
        keep: the most rows of a prompt that are kept, the shortest.
        part: which of the processes that share the work this is.
        parts: how many they are; 1 also for hosts of `jax.distributed`, which share it by themselves.
        endpoint: settings of all endpoints.
        settings: settings of the generation.
    """
    if not specs:
        raise ValueError("no tasks to answer: give --tasks, such as --tasks arithmetic or --tasks questions.jsonl")
    stage = Generate(
        prompts=tuple(source(spec, verifier=verifier) for spec in specs),
        teachers=dict(teacher(word, endpoint) for word in teachers),
        **settings,
    )
    folder, console = out / "generated", rich.console.Console(markup=False)
    alone = parts > 1  # on a pod, too: processes that are told their part do not look for each other
    with stop.listening(GRACE), contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.nullcontext() if alone else cluster.joined())
        if hosts.is_first():
            stack.enter_context(lock.held(out / f"part-{part}-of-{parts}" if alone else out))
        remember(folder, stage, out)
        if not hosts.from_first((folder / "DONE").exists):
            stage.train(folder, part=part, parts=parts)
        if not hosts.from_first((folder / "rows").exists):
            console.print(f"part {part} of {parts} is done; the part that is done last writes the rows")
            return
        if hosts.is_first():
            (folder / "DONE").touch()
            stack.enter_context(lock.held(out / "kept"))
        best = outcome.ShortestCorrect(count=keep, passing=stage.passing)
        filters = (*FILTERS, outcome.Verified(passing=stage.passing), best)
        kept = Training(out)("kept", Curate(rows=(str(folder),), filters=filters))
        if hosts.is_first():
            for one in funnels.read(out, ["kept"]):
                console.print(report.funnel_table(one))
            count = shards.count_rows(kept)
            console.print(f"{count} rows are kept: {Path(kept) / 'rows'}", soft_wrap=True, highlight=False)


def teacher(word: str, endpoint: Mapping[str, Any]) -> tuple[str, Teacher]:
    """A domain ("*" for all) and its teacher, from such words as smollm2, arithmetic=runs/rl, https://host/v1#name.

    Raises:
        ValueError: for an endpoint without the name of its model.
    """
    domain, equals, model = word.partition("=")
    if not equals or "/" in domain:
        domain, model = ANY, word
    if not model.startswith(("http://", "https://")):
        return domain, Local(model=model)
    url, _, name = model.partition("#")
    if not name:
        raise ValueError(f"the teacher {word!r} does not say which model answers there: give {url}#MODEL")
    return domain, Endpoint(url=url, model=name, **endpoint)
