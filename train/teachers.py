"""Teachers of a distillation: any number in host memory, one at a time on the device."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from ..data.endpoint import Client, Endpoint
from ..data.tokenizer import Tokenizer
from ..sharding import hosts
from . import checkpoint
from .answers import under_way
from .compute import Compute
from .hosted import Hosted
from .rollout import Rollout

PROBE = "Two words, 3 numbers (12; 4.5) and naïve Ω: do we read the same tokens?"
"""A text that tokenizers cut differently: an endpoint must spell our tokens of it back."""


class Teachers(Hosted):
    """The teachers by domain.

    Raises ValueError for a teacher whose tokenizer is not the student's, unless any will do: token distributions over
    different vocabularies cannot be compared. Endpoints are asked to spell a text, and stay where they are.
    """

    def __init__(
        self,
        teachers: Mapping[str, str | Endpoint],
        student: Tokenizer,
        compute: Compute,
        mesh: jax.sharding.Mesh,
        *,
        any_tokenizer: bool = False,
    ) -> None:
        remote = {domain: teacher for domain, teacher in teachers.items() if isinstance(teacher, Endpoint)}
        self._clients = {domain: Client(endpoint) for domain, endpoint in remote.items()}
        for client in self._clients.values():
            _reads_as(student, client)
        paths = {domain: teacher for domain, teacher in teachers.items() if isinstance(teacher, str)}
        distinct = dict.fromkeys(paths.values())
        self._tokenizers = {path: checkpoint.open_tokenizer(path) for path in distinct}
        for path, own in self._tokenizers.items():
            if not any_tokenizer:
                _same_tokenizer(path, own, student)
        super().__init__(paths, compute, mesh)

    def model(self, domain: str) -> checkpoint.Model:
        """A domain's teacher, ready to answer; the one before it leaves the device."""
        return checkpoint.Model(*self(domain), self._tokenizers[self._paths[domain]])

    def scores(self, domain: str, rollouts: Sequence[Rollout]) -> Callable[[Rollout], np.ndarray]:
        """Log-probabilities of answers' tokens under a domain's endpoint, at temperature 1, by rollout: float32 [N].

        Each host asks for its share.
        """
        client = self._clients[domain]

        def ask(one: Rollout) -> list[float]:
            return [float(x) for x in client.echo([*one.prompt, *map(int, one.tokens)]).logp[len(one.prompt) :]]

        with ThreadPoolExecutor(under_way(client.endpoint)) as threads:
            logp = hosts.together(list(threads.map(ask, hosts.share(rollouts))))
        found = {id(one): np.asarray(values, np.float32) for one, values in zip(rollouts, logp, strict=True)}
        return lambda one: found[id(one)]


def _same_tokenizer(path: str, teacher: Tokenizer, student: Tokenizer) -> None:
    if teacher.fingerprint != student.fingerprint:
        raise ValueError(
            f"teacher {path} has another tokenizer ({teacher.fingerprint[:12]}) than the student "
            f"({student.fingerprint[:12]}): their tokens cannot be compared; learn its answers as text instead, with "
            "the objective SequenceLevel and on_policy 0, or by SFT on what it generated"
        )


def _reads_as(student: Tokenizer, client: Client) -> None:
    text = client.echo(student.encode(PROBE)).text
    if not text.startswith(PROBE):
        raise ValueError(
            f"teacher {client.endpoint.model} at {client.endpoint.url} has another tokenizer than the student: it "
            f"reads {PROBE!r} as {text[:80]!r}; their tokens cannot be compared: learn its answers as text instead, by "
            "SFT on what it generated"
        )
