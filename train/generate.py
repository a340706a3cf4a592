"""Generation: prompts x samples from teachers, judged by the tasks' verifiers, as rows with their provenance.

Prompts are dealt into blocks, and a block has a journal to which every answer and verdict is appended at once. What is
in a journal is never asked for again: a run may be killed at any moment and goes on from there (in a bucket, where
journals are sent block by block, from the last block). When all are complete, their rows are written to shards.

The hosts of a run work on one block together: teachers on the mesh lie on all of their devices, each asks an endpoint
for its share of the answers, each judges its share; the first writes. Processes that do not know of each other can
share the blocks instead.
"""

import contextlib
import fcntl
import itertools
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from ..data import columns, journal, provenance, shards, streams
from ..data.endpoint import Client, Endpoint
from ..data.journal import Journal
from ..data.row import Row, with_pass_rates
from ..data.shard_folder import Format
from ..data.task import Task, TaskSource
from ..data.verify.pool import VerifierPool
from ..model import sample
from ..model.processing import Sampling
from ..sharding import hosts
from ..sharding import mesh as meshes
from . import answers, bucket, checkpoint, programs
from .answers import Answerer, Asked, Local, OverHttp, Teacher
from .block import Block, Known, Schedule, verdict_line
from .compute import Compute
from .metrics import Log
from .rollout import Sampler

ALL, ANY = 2**31, "*"


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Ask `teachers`, by domain ("*" for all others), for answers to the first `limit` prompts of each source.

    Each prompt gets `samples` answers a round, for up to `rounds` rounds, until `enough` of them score at least
    `passing`. A prompt that occurs twice is asked once. `block` prompts are under way together: make it several times
    the compute's slots (or an endpoint's concurrency) over `samples`.
    """

    prompts: tuple[TaskSource, ...]
    teachers: Mapping[str, Teacher]
    sampling: Sampling
    samples: int = 4
    rounds: int = 1
    enough: int = 1
    passing: float = 1.0
    limit: int = ALL
    block: int = 256
    format: Format = "parquet"
    rows_per_shard: int = 10_000
    compute: Compute = field(default_factory=Compute)
    verifiers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or not self.teachers:
            raise ValueError(
                f"a generation has {len(self.prompts)} prompt sources and {len(self.teachers)} teachers: "
                "give at least one of both"
            )
        counts = {name: vars(self)[name] for name in ("samples", "rounds", "enough", "limit", "block")}
        if min(counts.values()) < 1:
            raise ValueError(f"a generation has {counts}: give at least 1 of each")

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None, *, part: int = 0, parts: int = 1) -> None:
        """Answer, judge, and write `out`/rows: shards, data card, checksums (see `data.shards`); `out`/usage.json.

        Args:
            out: the stage's folder, shared by all parts.
            mesh: where teachers on the mesh run; of this process alone if there are several parts.
            part: which of `parts` processes this is: it takes every `parts`-th block. The one that completes the last
                block writes the rows.
            parts: how many processes share the work.

        Raises:
            EndpointError: if an endpoint refuses or does not answer; what it answered before is kept.
            Interrupted: after a signal.
            ValueError: for a prompt without text, a domain without teacher, a key that is not set.
        """
        if not 0 <= part < parts:
            raise ValueError(f"part {part} of {parts}: parts are numbered from 0 to {parts - 1}")
        if parts > 1 and jax.process_count() > 1:
            raise ValueError(
                f"part {part} of {parts}, by {jax.process_count()} processes that know of each other: these share the "
                "work by themselves, so leave out the parts"
            )
        folder = out / "answers"
        if not hosts.from_first((out / "rows").exists):
            blocks = self._blocks()
            complete = hosts.from_first(lambda: [block.complete(folder).exists() for block in blocks])
            waiting = [block for block in blocks[part::parts] if not complete[block.number]]
            if waiting and not hosts.from_first((out / "rows").exists):  # in this order: answers go once there are rows
                log_folder = out if parts == 1 else out / f"part-{part}-of-{parts}"
                done = len(blocks[part::parts]) - len(waiting)
                with Log(log_folder, title=log_folder.name, total=done + len(waiting), start=done) as log:
                    self._answer(waiting, folder, log, mesh, first=done + 1)
            if hosts.is_first() and not self._finish(out, blocks):
                return  # other parts are still at work
        if hosts.is_first():
            shutil.rmtree(folder, ignore_errors=True)
        hosts.barrier()

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """The programs of the first teacher on the mesh, for the prompts of all of them; none for endpoints."""
        local = [teacher for teacher in self.teachers.values() if isinstance(teacher, Local)]
        if not local:
            return {}
        config = self.compute.configure(checkpoint.open_config(local[0].model))
        prompts = sum(min(self.limit, len(source)) for source in self.prompts)
        block = min(self.block, prompts)
        of = {"group": self.samples, "answers": block * self.samples, "times": -(-prompts // block) * self.rounds}
        return programs.generation(config, self.sampling, self.compute, mesh, **of)

    def result(self) -> None:
        """It makes no model."""
        return None

    @property
    def _schedule(self) -> Schedule:
        return Schedule(self.samples, self.rounds, self.enough, self.passing)

    def _blocks(self) -> list[Block]:
        """All blocks in order: by teacher and the tasks' ids, as rows are written. Looks at every prompt once."""
        places: defaultdict[str, list[tuple[str, int, int]]] = defaultdict(list)
        seen: set[str] = set()
        for number, source in enumerate(self.prompts):
            for index in range(min(self.limit, len(source))):
                task = source[index]
                asked = (message for message in task.messages if message["role"] != "system")
                if not any(str(message.get("content") or "").strip() for message in asked):
                    raise ValueError(f"task {task.id} of {task.domain} has an empty prompt: remove it, or give it text")
                columns.of_messages(task.messages)  # what no row can hold is said before anything is asked
                if task.id not in seen:
                    seen.add(task.id)
                    places[self._teacher(task)].append((task.id, number, index))
        pieces: list[tuple[str, tuple[tuple[int, int], ...]]] = []
        for key in self.teachers:
            found = [(number, index) for _, number, index in sorted(places[key])]
            pieces += [(key, tuple(found[start : start + self.block])) for start in range(0, len(found), self.block)]
        return [Block(number, key, piece) for number, (key, piece) in enumerate(pieces)]

    def _teacher(self, task: Task) -> str:
        for key in (task.domain, ANY):
            if key in self.teachers:
                return key
        raise ValueError(
            f"task {task.id} is of domain {task.domain!r} and teachers are for {sorted(self.teachers)}: add one for "
            f"it, or for {ANY!r}"
        )

    def _answer(
        self, waiting: Sequence[Block], folder: Path, log: Log, mesh: jax.sharding.Mesh | None, *, first: int
    ) -> None:
        """Complete blocks, with each teacher opened once; `first` is the first block's step in the log."""
        steps = itertools.count(first)
        with VerifierPool(self.verifiers) as pool:
            mesh = mesh or meshes.make_mesh()
            sampler = Sampler(sampling=self.sampling, slots=self.compute.slots, mesh=mesh, pool=pool, log=log)
            for key, group in itertools.groupby(waiting, key=lambda block: block.teacher):
                with self._open(key, sampler) as answer:
                    for block in group:
                        log.write(next(steps), self._complete(block, folder, answer, sampler))
                        bucket.publish()

    @contextlib.contextmanager
    def _open(self, key: str, sampler: Sampler) -> Iterator[Answerer]:
        teacher = self.teachers[key]
        if isinstance(teacher, Local):
            yield answers.open_local(teacher, sampler, self.compute)
            return
        client = Client(teacher)
        try:
            yield OverHttp(client, self.sampling)
        finally:
            client.close()

    def _complete(self, block: Block, folder: Path, answer: Answerer, sampler: Sampler) -> dict[str, float]:
        """Ask and judge until the block needs nothing more; its statistics."""
        tasks = {task.id: task for task in self._tasks(block)}
        known = Known.of(hosts.from_first(lambda: list(journal.read(block.journal(folder)))))
        with _recording(block.journal(folder)) as record:
            for number in range(self.rounds):
                asked = known.open_tasks(list(tasks.values()), number, self._schedule)
                places = self._schedule.samples_of(number)
                expected = [(task.id, place) for task in asked for place in places]
                noise = sample.Noise(seed=self.seed, step=block.number * self.rounds + number)
                if any(key not in known.answers for key in expected):
                    with sampler.log.phase("rollout"):
                        for found in answer(Asked(asked, places, noise, set(known.answers))):
                            record(one._asdict() for one in found)
                            known.add(found)
                unjudged = [key for key in expected if key not in known.verdicts]
                waiting = [(tasks[key[0]], known.answers[key]) for key in unjudged]
                verdicts = sampler.judged(waiting, lambda one: answers.judged_text(one.message))
                judged = dict(zip(unjudged, verdicts, strict=True))
                record(verdict_line(key, verdict) for key, verdict in judged.items())
                known.verdicts.update(judged)
        if hosts.is_first():
            block.journal(folder).rename(block.complete(folder))
        return known.statistics(tasks)

    def _tasks(self, block: Block) -> list[Task]:
        return [self.prompts[source][index] for source, index in block.places]

    def _finish(self, out: Path, blocks: Sequence[Block]) -> bool:
        """Write the rows if all blocks are complete; whether they are."""
        if not all(block.complete(out / "answers").exists() for block in blocks):
            return (out / "rows").exists()
        with _exclusive(out / ".writing"):
            if not (out / "rows").exists():
                self._write(out, blocks)
        return True

    def _write(self, out: Path, blocks: Sequence[Block]) -> None:
        """The rows of all blocks, of which one a teacher is read at a time, and what they took."""
        counts: dict[str, Counter[str]] = {block.teacher: Counter() for block in blocks}
        by_teacher = itertools.groupby(blocks, key=lambda block: block.teacher)
        answered = [self._rows(list(group), out / "answers", counts[key]) for key, group in by_teacher]
        writer = shards.RowWriter(
            out / "rows", (), title=out.name, rows_per_shard=self.rows_per_shard, format=self.format
        )
        writer.add(streams.merged(*answered))
        usage = {key: dict[str, float](found) for key, found in counts.items()}
        for key, total in usage.items():
            if isinstance(teacher := self.teachers[key], Endpoint):
                spent = total["prompt_tokens"] * teacher.price_in + total["tokens"] * teacher.price_out
                total["cost"] = round(spent / 1e6, 6)
        (out / "usage.json").write_text(json.dumps(usage, indent=2) + "\n")
        writer.publish()

    def _rows(self, blocks: Sequence[Block], folder: Path, counts: Counter[str]) -> Iterator[Row]:
        """The rows of a teacher's blocks, in `streams.order`; adds to `counts` what they took."""
        origins = [provenance.source_name(source) for source in self.prompts]
        sampling = {"seed": self.seed, **answers.request_settings(self.sampling)}
        for block in blocks:
            known, tasks = Known.of(journal.read(block.complete(folder))), self._tasks(block)
            rows = [
                row
                for task, (source, _) in zip(tasks, block.places, strict=True)
                for row in known.rows(task, self.teachers[block.teacher], origin=origins[source], sampling=sampling)
            ]
            yield from sorted(with_pass_rates(rows, passing=self.passing), key=streams.order)
            numbers = known.statistics({task.id: task for task in tasks})
            counts.update({name: int(numbers[name]) for name in ("answers", "prompt_tokens", "tokens")})


@contextlib.contextmanager
def _recording(file: Path) -> Iterator[Callable[[Iterable[Mapping[str, Any]]], None]]:
    """What appends lines to a block's journal. Of several hosts, which all know the same, the first does."""
    if not hosts.is_first():
        yield lambda lines: None
        return
    with Journal(file) as opened:
        yield opened.append
        opened.sync()


@contextlib.contextmanager
def _exclusive(file: Path) -> Iterator[None]:
    """One process at a time; the system lets go of it however the process ends."""
    with file.open("a") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
