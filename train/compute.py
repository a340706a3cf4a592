"""How a stage computes, apart from what it learns: precision, memory, mesh."""

from dataclasses import dataclass
from typing import Literal

import jax

from ..model.config import ModelConfig
from ..sharding import mesh as meshes


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Precision and memory settings.

    `dtype` None means bfloat16 activations on accelerators and float32 on CPU. `row_tokens` is the length of a packed
    row and `micro_rows` how many of them go through a model at a time (rounded up to fill the mesh's data axes).
    `slots` is how many answers are generated at a time. `save_every` counts steps between checkpoints, of which the
    newest `keep` are kept, and those of every `keep_every`th step, unless that is 0.
    """

    dtype: str | None = None
    remat: Literal["none", "dots", "full"] = "none"
    row_tokens: int = 256
    micro_rows: int = 4
    slots: int = 64
    save_every: int = 10
    keep: int = 2
    keep_every: int = 0

    def configure(self, config: ModelConfig) -> ModelConfig:
        """The model's config with this precision and remat policy."""
        dtype = self.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        return config.replace(dtype=dtype, remat=self.remat)

    def rows(self, mesh: jax.sharding.Mesh) -> int:
        """Rows of a micro-batch on a mesh: a multiple of the devices that share a batch."""
        parts = meshes.batch_parts(mesh)
        return -(-self.micro_rows // parts) * parts
