"""Models that a stage only reads: any number in host memory, one at a time on the device."""

from collections.abc import Mapping
from typing import Any

import jax

from ..model.config import ModelConfig
from . import checkpoint
from .compute import Compute


class Hosted:
    """Opens each model once, keeps it in host memory beside its mesh, and hands it to the device when asked."""

    def __init__(self, paths: Mapping[str, str], compute: Compute, mesh: jax.sharding.Mesh) -> None:
        distinct = dict.fromkeys(paths.values())
        self._configs: dict[str, ModelConfig] = {
            path: compute.configure(checkpoint.open_config(path)) for path in distinct
        }
        self._hosted = {path: _moved(checkpoint.open_model(path, mesh).params, "pinned_host") for path in distinct}
        self._paths = dict(paths)
        self._on_device: tuple[str, Any] | None = None

    def __call__(self, name: str) -> tuple[ModelConfig, Any]:
        """Config and device parameters of the model of that name; the one before it leaves the device.

        That needs the caller to have let go of it.
        """
        path = self._paths[name]
        if self._on_device is None or self._on_device[0] != path:
            self._on_device = None
            self._on_device = path, _moved(self._hosted[path], "device")
        return self._configs[path], self._on_device[1]

    def leave(self) -> None:
        """Take the model that is there off the device."""
        self._on_device = None


def _moved(params: Any, kind: str) -> Any:
    return jax.block_until_ready(jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), params))
