"""Take in a model of another format once, so that later stages restore it in seconds and sharded."""

from dataclasses import dataclass
from pathlib import Path

import jax

from ..model.config import ModelConfig
from ..sharding import mesh as meshes
from . import checkpoint, programs


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Load `source` (a Hugging Face folder, a GGUF file, a known name) and store it as a model of ours."""

    source: str

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Convert; the model is then in `out`/model."""
        checkpoint.save_model(out / "model", checkpoint.open_model(self.source, mesh or meshes.make_mesh()))

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """Nothing is compiled."""
        return {}

    def result(self) -> ModelConfig:
        """The shape of the model that the stage makes."""
        return checkpoint.open_config(self.source)
