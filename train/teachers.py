"""Teachers of a distillation: any number in host memory, one at a time on the device."""

from collections.abc import Mapping
from typing import Any

import jax

from ..data.tokenizer import Tokenizer
from ..model.config import ModelConfig
from . import checkpoint
from .compute import Compute
from .endpoint import Endpoint


class Teachers:
    """Opens each teacher once, keeps it in host memory beside its mesh, and hands it to the device when asked.

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
        for endpoint in {teacher for teacher in teachers.values() if isinstance(teacher, Endpoint)}:
            endpoint.check_tokenizer(student)
        paths = {domain: teacher for domain, teacher in teachers.items() if isinstance(teacher, str)}
        distinct = dict.fromkeys(paths.values())
        self._tokenizers = {path: checkpoint.open_tokenizer(path) for path in distinct}
        for path, own in self._tokenizers.items():
            if not any_tokenizer:
                _same_tokenizer(path, own, student)
        self._configs: dict[str, ModelConfig] = {
            path: compute.configure(checkpoint.open_config(path)) for path in distinct
        }
        self._hosted = {path: _moved(checkpoint.open_model(path, mesh).params, "pinned_host") for path in distinct}
        self._paths = paths
        self._on_device: tuple[str, Any] | None = None

    def __call__(self, domain: str) -> tuple[ModelConfig, Any]:
        """Config and device parameters of a domain's teacher; the one before it leaves the device.

        That needs the caller to have let go of it.
        """
        path = self._paths[domain]
        if self._on_device is None or self._on_device[0] != path:
            self._on_device = None
            self._on_device = path, _moved(self._hosted[path], "device")
        return self._configs[path], self._on_device[1]

    def model(self, domain: str) -> checkpoint.Model:
        """A domain's teacher, ready to answer; the one before it leaves the device."""
        return checkpoint.Model(*self(domain), self._tokenizers[self._paths[domain]])


def _moved(params: Any, kind: str) -> Any:
    return jax.block_until_ready(jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), params))


def _same_tokenizer(path: str, teacher: Tokenizer, student: Tokenizer) -> None:
    if teacher.fingerprint != student.fingerprint:
        raise ValueError(
            f"teacher {path} has another tokenizer ({teacher.fingerprint[:12]}) than the student "
            f"({student.fingerprint[:12]}): their tokens cannot be compared; learn its answers as text instead, with "
            "the objective SequenceLevel and on_policy 0, or by SFT on what it generated"
        )
