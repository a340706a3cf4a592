"""Who answers prompts: a checkpoint on the mesh, or a model behind an API. Both give messages, token counts, a source.

An answer depends on the teacher, its settings and (seed, round of the block, task, sample), not on what was answered
before or by how many processes: so a run that was killed goes on as if it had not been.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from ..data.endpoint import Client, Completion, Endpoint, EndpointError
from ..data.row import CLOSE, OPEN, text_of
from ..data.task import Message, Task
from ..data.tasks import content_hash
from ..model import sample
from ..model.processing import Sampling
from ..sharding import hosts
from . import checkpoint, fingerprint, watchdog
from .checkpoint import Model
from .compute import Compute
from .rollout import Sampler
from .stop import check_stop


@dataclass(frozen=True, kw_only=True)
class Local:
    """A teacher on the mesh: any MODEL that `checkpoint.open_model` takes. `licence` is that of its outputs."""

    model: str
    licence: str = ""

    @property
    def name(self) -> str:
        """What data cards call it: no folders, which a run may leave."""
        return Path(self.model).name

    def identity(self, fingerprint: str) -> str:
        """What its rows' ids are made of."""
        return fingerprint


Teacher = Local | Endpoint


class Answer(NamedTuple):
    """One answer: the message, why it ended, tokens in and out, and what identifies who gave it."""

    task: str
    sample: int
    message: Message
    finish: Literal["stop", "length", "aborted"]
    num_tokens: int
    prompt_tokens: int
    fingerprint: str


class Asked(NamedTuple):
    """A round of a block: tasks, which samples of each, the name of its noise, and what is answered already."""

    tasks: Sequence[Task]
    samples: range
    noise: sample.Noise
    answered: set[tuple[str, int]]


Answerer = Callable[[Asked], Iterator[Sequence[Answer]]]
"""An open teacher: what was not yet answered, a few answers at a time, in any order; the same on all hosts."""


class OnMesh:
    """A checkpoint that answers. A round is sampled as a whole, what was answered already included."""

    def __init__(self, model: Model, sampler: Sampler) -> None:
        self.model, self.sampler = model, sampler
        self.fingerprint = identity(model)

    def __call__(self, asked: Asked) -> Iterator[Sequence[Answer]]:
        """See `Answerer`."""
        groups = self.sampler.generations(self.model, asked.tasks, num_samples=len(asked.samples), noise=asked.noise)
        yield [
            self._answer(task, place, prompt, one)
            for task, (prompt, answers) in zip(asked.tasks, groups, strict=True)
            for place, one in zip(asked.samples, answers, strict=True)
            if (task.id, place) not in asked.answered
        ]

    def _answer(self, task: Task, place: int, prompt: Sequence[int], one: sample.Generation) -> Answer:
        text = self.model.tokenizer.decode(one.tokens.tolist(), skip_special=True)
        message = {"role": "assistant", "content": text}
        return Answer(task.id, place, message, one.finish, len(one.tokens), len(prompt), self.fingerprint)


class OverHttp:
    """An endpoint that answers, as many requests at a time as it allows. Each host asks for its share."""

    def __init__(self, client: Client, sampling: Sampling) -> None:
        self.client, self.settings = client, request_settings(sampling)

    def __call__(self, asked: Asked) -> Iterator[Sequence[Answer]]:
        """See `Answerer`; when a request fails for good, the answers under way are still handed over first."""
        keys = ((task, place) for task in asked.tasks for place in asked.samples)
        missing = [(task, place) for task, place in keys if (task.id, place) not in asked.answered]
        with ThreadPoolExecutor(under_way(self.client.endpoint)) as threads:
            waiting = {
                threads.submit(self._complete, task, place, asked.noise.seed): (task.id, place)
                for task, place in hosts.share(missing)
            }
            failure, left = "", len(missing)
            try:
                while left:
                    done, _ = wait(waiting, timeout=0.2, return_when=_until())
                    found, failed = _sorted_out(done, waiting)
                    everywhere = hosts.gathered([found, failed, len(waiting)])
                    watchdog.beat("answers of an endpoint")
                    yield [Answer(*fields) for answers, _, _ in everywhere for fields in answers]
                    check_stop()
                    if not failure and any(failed for _, failed, _ in everywhere):
                        failure = next(failed for _, failed, _ in everywhere if failed)
                        waiting = {one: key for one, key in waiting.items() if not one.cancel()}
                    left = sum(count for _, _, count in everywhere)
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self.client.close()
                raise
        if failure:
            raise EndpointError(failure)

    def _complete(self, task: Task, place: int, seed: int) -> Completion:
        settings = {**self.settings, "seed": request_seed(seed, task.id, place)}
        try:
            return self.client.complete(task.messages, settings=settings, tools=tools(task))
        except EndpointError as error:
            raise EndpointError(f"{error} (asked for task {task.id} of {task.domain})") from error


def under_way(endpoint: Endpoint) -> int:
    """How many requests this host makes at a time: all hosts together as many as the endpoint allows, and each one."""
    return max(1, endpoint.concurrency // jax.process_count())


def _until() -> str:
    """When a wait for answers ends early. Several hosts meet now and then, and not at every answer of each."""
    return FIRST_COMPLETED if jax.process_count() == 1 else ALL_COMPLETED


def _sorted_out(
    done: set[Future[Completion]], waiting: dict[Future[Completion], tuple[str, int]]
) -> tuple[list[Answer], str]:
    """Take what is done out of what waits: the answers, and what the first failure says."""
    found: list[Answer] = []
    failed = ""
    for one in done:
        task, place = waiting.pop(one)
        error = one.exception()
        if isinstance(error, EndpointError):
            failed = failed or str(error)
        else:
            found.append(Answer(task, place, *one.result()))
    return found, failed


def tools(task: Task) -> Sequence[Mapping[str, Any]]:
    """The tools that a task offers, as JSON schemas: its metadata's `tools`."""
    return task.metadata.get("tools", ())


def judged_text(message: Message) -> str:
    """What a verifier sees of an answer: all that a model writes, thinking in its marks, calls of tools as JSON."""
    thinking = message.get("reasoning_content")
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [{"name": one["name"], "arguments": one["arguments"]} for one in functions]
    parts = [
        *([f"{OPEN}\n{thinking}\n{CLOSE}\n"] if thinking is not None else []),
        text_of(message),
        *(f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>" for call in calls),
    ]
    return "\n".join(part for part in parts if part)


def request_seed(seed: int, task: str, place: int) -> int:
    """The seed of one answer: 28 bits, as servers take a C int."""
    return int(content_hash([seed, task, place])[:7], 16)


def request_settings(sampling: Sampling) -> dict[str, Any]:
    """Sampling settings as fields of a request; those that not every server knows only where they differ from none."""
    rare = {"top_k": sampling.top_k, "min_p": sampling.min_p, "stop_token_ids": list(sampling.stop_ids)}
    usual = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}
    return usual | {name: value for name, value in rare.items() if value}


def open_local(teacher: Local, sampler: Sampler, compute: Compute) -> OnMesh:
    """Load a teacher onto the sampler's mesh."""
    model = checkpoint.open_model(teacher.model, sampler.mesh)
    return OnMesh(model._replace(config=compute.configure(model.config)), sampler)


def identity(model: Model) -> str:
    """16 hexadecimal digits of a model's weights and tokenizer; the same on every mesh."""
    both = f"{model.tokenizer.fingerprint} {fingerprint.of(model.params)}"
    return hashlib.sha256(both.encode()).hexdigest()[:16]
