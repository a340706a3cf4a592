"""Merging: several fine-tuned models of one origin become one, parameter by parameter, in float32.

One array of each model is in memory at a time, beside the merged model. Stacked layers are merged each by itself.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from ..model.config import RUNTIME_FIELDS, ModelConfig
from ..sharding import mesh as meshes
from . import checkpoint, merge_math, programs
from .metrics import Log
from .stop import check_stop

Merge = Callable[..., jax.Array]


class _Merging:
    """What all merges share. A subclass names its models and says how to merge one tensor."""

    def sources(self) -> tuple[str, ...]:
        """Paths of the models to read, those that are merged first; a base, if any, is the last."""
        raise NotImplementedError

    def tensor(self, name: str, tensors: Sequence[jax.Array]) -> jax.Array:
        """One tensor of the merged model from that of every source."""
        raise NotImplementedError

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Merge; the model is then in `out`/model.

        Raises:
            ValueError: if the models differ in architecture or tokenizer.
        """
        mesh = mesh or meshes.make_mesh()
        paths = self.sources()
        config = compatible(paths)
        names = [name for name, _ in checkpoint.abstract_leaves(config, mesh)]
        streams = [checkpoint.leaves(path, mesh) for path in paths]
        params: dict[str, Any] = {}
        with Log(out, title=out.name, total=len(names)) as log, jax.set_mesh(mesh):
            for index, arrivals in enumerate(zip(*streams, strict=True)):
                with log.phase("merge"):
                    name, tensors = arrivals[0][0], [tensor for _, tensor in arrivals]
                    merge = self._compiled(name, tensors[0].sharding)
                    checkpoint.put_leaf(params, name, jax.block_until_ready(merge(tensors)))
                check_stop()
                log.write(index + 1, {})
            with log.phase("checkpoint"):
                tokenizer = checkpoint.open_tokenizer(paths[0])
                checkpoint.save_model(out / "model", checkpoint.Model(config, params, tokenizer))

    def _compiled(self, name: str, where: Any) -> Any:
        return _jitted(self, self._alike(name), where)

    def _alike(self, name: str) -> str:
        """What parameters that are merged by the same program have in common: being stacked, or not."""
        return "layers." if name.startswith("layers.") else ""

    def _leaf(self, name: str, tensors: Sequence[jax.Array]) -> jax.Array:
        """A stacked parameter is merged layer by layer, others whole."""
        merge = functools.partial(self.tensor, name)
        return (jax.vmap(merge) if name.startswith("layers.") else merge)(list(tensors))

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """The merge of the largest parameter, as often as it takes to merge them all."""
        config = checkpoint.open_config(self.sources()[0])
        leaves = checkpoint.abstract_leaves(config, mesh)
        name, leaf = max(leaves, key=lambda item: item[1].size)
        calls = sum(one.size for _, one in leaves) / leaf.size
        of = self._compiled(name, leaf.sharding)
        return {"merge": programs.Program(function=of, arguments=([leaf] * len(self.sources()),), calls=calls)}

    def result(self) -> ModelConfig:
        """The shape of the model that the stage makes."""
        return checkpoint.open_config(self.sources()[0])


@functools.cache
def _jitted(merging: _Merging, name: str, where: Any) -> Any:
    return jax.jit(functools.partial(merging._leaf, name), out_shardings=where)


@dataclass(frozen=True, kw_only=True)
class Linear(_Merging):
    """Weighted average; equal weights unless given. https://arxiv.org/abs/2203.05482"""

    models: tuple[str, ...]
    weights: tuple[float, ...] = ()

    def sources(self) -> tuple[str, ...]:
        """See `_Merging`."""
        return self.models

    def tensor(self, name: str, tensors: Sequence[jax.Array]) -> jax.Array:
        """See `_Merging`."""
        return merge_math.linear(tensors, self.weights or (1.0,) * len(tensors))


@dataclass(frozen=True, kw_only=True)
class Slerp(_Merging):
    """Spherical interpolation of two models' task vectors from `base`. https://arxiv.org/abs/2406.16768"""

    models: tuple[str, str]
    base: str
    t: float = 0.5

    def sources(self) -> tuple[str, ...]:
        """See `_Merging`."""
        return (*self.models, self.base)

    def tensor(self, name: str, tensors: Sequence[jax.Array]) -> jax.Array:
        """See `_Merging`."""
        first, second, base = tensors
        return merge_math.slerp(first, second, self.t, base=base)


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(_Merging):
    """Base plus `scale` times the weighted sum of task vectors. https://arxiv.org/abs/2212.04089"""

    models: tuple[str, ...]
    base: str
    weights: tuple[float, ...] = ()
    scale: float = 1.0

    def sources(self) -> tuple[str, ...]:
        """See `_Merging`."""
        return (*self.models, self.base)

    def tensor(self, name: str, tensors: Sequence[jax.Array]) -> jax.Array:
        """See `_Merging`."""
        *models, base = tensors
        return merge_math.task_arithmetic(base, models, weights=self.weights or None, scale=self.scale)


@dataclass(frozen=True, kw_only=True)
class Ties(_Merging):
    """Trim to `density`, elect signs, average what agrees. https://arxiv.org/abs/2306.01708"""

    models: tuple[str, ...]
    base: str
    density: float = 0.2
    scale: float = 1.0

    def sources(self) -> tuple[str, ...]:
        """See `_Merging`."""
        return (*self.models, self.base)

    def tensor(self, name: str, tensors: Sequence[jax.Array]) -> jax.Array:
        """See `_Merging`."""
        *models, base = tensors
        return merge_math.ties(base, models, density=self.density, scale=self.scale)


@dataclass(frozen=True, kw_only=True)
class Dare(_Merging):
    """Drop entries of the task vectors with probability `drop`, rescale, add up. https://arxiv.org/abs/2311.03099"""

    models: tuple[str, ...]
    base: str
    drop: float = 0.5
    weights: tuple[float, ...] = ()
    scale: float = 1.0
    seed: int = 0

    def sources(self) -> tuple[str, ...]:
        """See `_Merging`."""
        return (*self.models, self.base)

    def _alike(self, name: str) -> str:
        return name  # its noise depends on it

    def _leaf(self, name: str, tensors: Sequence[jax.Array]) -> jax.Array:
        return self.tensor(name, tensors)

    def tensor(self, name: str, tensors: Sequence[jax.Array]) -> jax.Array:
        """See `_Merging`; entries are dropped one by one, so stacked layers need no mapping."""
        *models, base = tensors
        key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(name.encode()))
        return merge_math.dare(base, models, drop=self.drop, key=key, weights=self.weights or None, scale=self.scale)


def compatible(paths: Sequence[str]) -> ModelConfig:
    """The config that all models share.

    Raises:
        ValueError: naming the first field in which two architectures differ, or two different tokenizers.
    """
    if len(paths) < 2:
        raise ValueError(f"merging needs at least two models, not {list(paths)}")
    first = checkpoint.open_config(paths[0])
    tokenizer = checkpoint.open_tokenizer(paths[0])
    for path in paths[1:]:
        other = checkpoint.open_config(path)
        for field in dataclasses.fields(ModelConfig):
            ours, theirs = (vars(config)[field.name] for config in (first, other))
            if ours != theirs and field.name not in RUNTIME_FIELDS:
                raise ValueError(
                    f"{paths[0]} has {field.name} {ours} and {path} has {theirs}: only models of one architecture can "
                    "be merged"
                )
        if checkpoint.open_tokenizer(path).fingerprint != tokenizer.fingerprint:
            raise ValueError(f"{paths[0]} and {path} have different tokenizers: their weights mean different tokens")
    return first
