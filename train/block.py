"""A block of prompts: which answers and verdicts its journal holds, what is still to be asked, the rows it makes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..data import provenance
from ..data.row import Provenance, Row
from ..data.task import Task, Verdict
from ..data.tasks import content_hash
from .answers import Answer, Teacher, tools

Key = tuple[str, int]  # a task's id, and which of its samples


class Block(NamedTuple):
    """Prompts that are answered together: their number, the key of their teacher, (source, index) of each."""

    number: int
    teacher: str
    places: tuple[tuple[int, int], ...]

    def journal(self, folder: Path) -> Path:
        """Where it is written while it is at work."""
        return folder / f"{self.number:06d}.jsonl"

    def complete(self, folder: Path) -> Path:
        """What its journal is called once nothing is missing."""
        return folder / f"{self.number:06d}.complete.jsonl"


class Schedule(NamedTuple):
    """Rounds of `samples` answers until `enough` score at least `passing`."""

    samples: int
    rounds: int
    enough: int
    passing: float

    def samples_of(self, number: int) -> range:
        """The samples that a round asks for."""
        return range(number * self.samples, (number + 1) * self.samples)


@dataclass(frozen=True)
class Known:
    """What a journal holds. A line is an answer, or a verdict on one."""

    answers: dict[Key, Answer] = field(default_factory=dict)
    verdicts: dict[Key, Verdict] = field(default_factory=dict)

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> "Known":
        """What the lines of a journal say."""
        known = cls()
        for line in lines:
            if "score" in line:
                known.verdicts[line["task"], line["sample"]] = Verdict(line["score"], line["reason"])
            else:
                known.add([Answer(**line)])
        return known

    def add(self, answers: Iterable[Answer]) -> None:
        """Take in answers."""
        self.answers.update({(one.task, one.sample): one for one in answers})

    def open_tasks(self, tasks: Sequence[Task], number: int, schedule: Schedule) -> list[Task]:
        """The tasks that round `number` asks: those whose answers of earlier rounds do not suffice."""
        earlier = range(number * schedule.samples)

        def passed(task: Task) -> int:
            found = (self.verdicts.get((task.id, place)) for place in earlier)
            return sum(verdict is not None and verdict.score >= schedule.passing for verdict in found)

        return [task for task in tasks if passed(task) < schedule.enough]

    def statistics(self, tasks: Mapping[str, Task]) -> dict[str, float]:
        """Numbers for the log: mean score, all and by domain, mean length, share cut at the limit, tokens."""
        scores: dict[str, list[float]] = {}
        for (task, _), verdict in self.verdicts.items():
            scores.setdefault(tasks[task].domain, []).append(verdict.score)
        count, tokens = len(self.answers), sum(one.num_tokens for one in self.answers.values())
        return {
            "reward": sum(map(sum, scores.values())) / count,
            **{f"reward/{domain}": sum(found) / len(found) for domain, found in sorted(scores.items())},
            "answers": count,
            "response_tokens": tokens / count,
            "truncated": sum(one.finish == "length" for one in self.answers.values()) / count,
            "tokens": tokens,
            "prompt_tokens": sum(one.prompt_tokens for one in self.answers.values()),
        }

    def rows(self, task: Task, teacher: Teacher, *, origin: str, sampling: Mapping[str, Any]) -> list[Row]:
        """A task's answers as rows, in the order of their samples.

        A row's id names task, teacher, settings and sample, so that rows of several generations can be put together.
        """
        verifier, version = provenance.verifier_version(task.verifier)
        licences = (task.metadata.get("licence") or task.metadata.get("license"), teacher.licence)
        found = []
        for key in sorted(key for key in self.answers if key[0] == task.id):
            answer, verdict = self.answers[key], self.verdicts[key]
            tag = content_hash([teacher.identity(answer.fingerprint), dict(sampling)])[:8]
            found.append(
                Row(
                    id=f"{task.id}-{tag}-{answer.sample:03d}",
                    prompt_id=task.id,
                    domain=task.domain,
                    prompt=task.messages,
                    response=(answer.message,),
                    finish=answer.finish,
                    num_tokens=answer.num_tokens,
                    licences=tuple(dict.fromkeys(str(one) for one in licences if one)),
                    score=verdict.score,
                    reason=verdict.reason,
                    tools=tuple(tools(task)),
                    provenance=Provenance(
                        prompt_source=origin,
                        teacher=teacher.name,
                        teacher_fingerprint=answer.fingerprint,
                        sampling=sampling,
                        verifiers={verifier: version},
                    ),
                )
            )
        return found


def verdict_line(key: Key, verdict: Verdict) -> dict[str, Any]:
    """A verdict as a line of a journal."""
    return {"task": key[0], "sample": key[1], "score": verdict.score, "reason": verdict.reason}
