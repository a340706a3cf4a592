"""Teachers of a distillation: any number in host memory, one at a time on the device."""

from collections.abc import Mapping
from typing import Any

import jax

from ..data.tokenizer import Tokenizer
from ..model.config import ModelConfig
from . import checkpoint
from .compute import Compute


class Teachers:
    """Opens each teacher once, keeps it in host memory beside its mesh, and hands it to the device when asked.

    Raises ValueError for a teacher whose tokenizer is not the student's: token distributions over different
    vocabularies cannot be compared.
    """

    def __init__(self, paths: Mapping[str, str], student: Tokenizer, compute: Compute, mesh: jax.sharding.Mesh) -> None:
        distinct = dict.fromkeys(paths.values())
        for path in distinct:
            _same_tokenizer(path, checkpoint.open_tokenizer(path), student)
        self._configs: dict[str, ModelConfig] = {
            path: compute.configure(checkpoint.open_config(path)) for path in distinct
        }
        self._hosted = {path: _moved(checkpoint.open_model(path, mesh).params, "pinned_host") for path in distinct}
        self._paths = dict(paths)
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


def _moved(params: Any, kind: str) -> Any:
    return jax.block_until_ready(jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), params))


def _same_tokenizer(path: str, teacher: Tokenizer, student: Tokenizer) -> None:
    if teacher.fingerprint != student.fingerprint:
        raise ValueError(
            f"teacher {path} has another tokenizer ({teacher.fingerprint[:12]}) than the student "
            f"({student.fingerprint[:12]}): distil it from its generated text instead, by SFT"
        )
