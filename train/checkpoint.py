"""Checkpoints: training states that a killed run goes on from, and finished models. The only importer of Orbax.

A stage's folder holds `checkpoints/` while it trains and `model/` when it is done. A model folder is `model.json` (the
shape), `tokenizer/` and `params/` (Orbax, one array per parameter). Writes are atomic: Orbax renames a finished folder
into place, so a torn one is never read.
"""

import contextlib
import errno
import functools
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from ..data import tokenizer as tokenizers
from ..data.tokenizer import Tokenizer
from ..model import config as configs
from ..model import pretrained, transformer
from ..model.config import ModelConfig
from ..sharding import hosts
from . import bucket
from . import state as states

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a write does not fit: no space, over quota, over the largest file allowed."""

logging.getLogger("absl").setLevel(logging.ERROR)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says why and what to do."""


class Model(NamedTuple):
    """A model ready for use: shape, parameters, tokenizer."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer


class Checkpoints:
    """The training checkpoints of one stage, written in the background.

    The newest `keep` are kept, and those of steps that are multiples of `keep_every`, if it is not 0.
    """

    def __init__(self, folder: Path, *, keep: int = 2, keep_every: int = 0) -> None:
        self.folder = bucket.place(folder)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, cleanup_tmp_directories=True
        )
        self._failures: list[BaseException] = []
        handlers = {
            "state": _noted(_handler(), self._failures),
            "cursor": _noted(ocp.JsonCheckpointHandler(), self._failures),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, cursor: Mapping[str, Any]) -> None:
        """Start writing; returns once the arrays are copied. A step that is there already is left alone."""
        if step == self.latest():
            return
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), cursor=ocp.args.JsonSave(dict(cursor)))
        self.wait()
        with _explained(self.folder):
            bucket.publish()
            self._manager.save(step, args=args)

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The state of a step, laid out as `abstract` says (any mesh will do), and its cursor."""
        restore = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
        with _explained(self.folder):
            both = self._manager.restore(step, args=ocp.args.Composite(state=restore, cursor=ocp.args.JsonRestore()))
        return both.state, dict(both.cursor)  # pyright: ignore[reportAttributeAccessIssue]

    def wait(self) -> None:
        """Block until what was started is on disk, or could not be written by this host."""
        with _explained(self.folder):
            while self._manager.is_saving_in_progress():
                # Orbax says so only when all hosts have met, and those that could write wait for this one.
                if self._failures:
                    raise self._failures[0]
                time.sleep(0.01)
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and let go."""
        if not self._failures:
            self.wait()
            self._manager.close()


def save_model(folder: Path, model: Model) -> None:
    """Write a finished model; the folder appears only when it is whole. Every host must call."""
    folder = folder.resolve()
    partial = folder.with_name(folder.name + ".partial")
    with _explained(bucket.place(folder)):
        if hosts.is_first():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / "model.json").write_text(configs.to_json(model.config))
            model.tokenizer.save(partial / "tokenizer")
        hosts.barrier()
        with ocp.Checkpointer(_handler()) as writer:
            place = bucket.place(folder / "params") if bucket.is_remote(folder) else partial / "params"
            writer.save(place, args=ocp.args.PyTreeSave(model.params), force=True)
        if hosts.is_first():
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        bucket.refresh()


def model_folder(path_or_name: str | Path) -> Path | None:
    """The model folder that a stage's path, or a model folder itself, stands for; None if it is neither."""
    for candidate in (Path(path_or_name), Path(path_or_name) / "model"):
        if (candidate / "model.json").is_file():
            return candidate.resolve()
    return None


def open_model(path_or_name: str | Path, mesh: jax.sharding.Mesh) -> Model:
    """Load a model for use on a mesh: a stage's folder, a Hugging Face folder, a GGUF file, or a known name.

    The names "tiny" and "tiny-moe" make a small random model with a byte-level tokenizer on the spot.

    Raises:
        FileNotFoundError, ValueError: one sentence that says what is wrong with the path.
    """
    if path_or_name in configs.ON_THE_SPOT:
        return _tiny(str(path_or_name), mesh)
    folder = model_folder(path_or_name)
    if folder is None:
        config, params = pretrained.load(path_or_name, mesh=mesh)
        return Model(config, params, tokenizers.load(pretrained.locate(path_or_name)))
    config = configs.from_json(folder / "model.json")
    return Model(config, _restore_params(folder, states.abstract_params(config, mesh)), open_tokenizer(folder))


def open_config(path_or_name: str | Path) -> ModelConfig:
    """The shape of a model, without its weights."""
    if path_or_name in configs.ON_THE_SPOT:
        return _tiny_config(str(path_or_name))
    folder = model_folder(path_or_name)
    return configs.from_json(folder / "model.json") if folder else pretrained.read_config(path_or_name)


def open_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer of a model, without its weights."""
    if path_or_name in configs.ON_THE_SPOT:
        return tokenizers.tiny()
    folder = model_folder(path_or_name)
    return tokenizers.load(folder / "tokenizer" if folder else pretrained.locate(path_or_name))


def _tiny_config(name: str) -> ModelConfig:
    tokenizer = tokenizers.tiny()
    return configs.ON_THE_SPOT[name].replace(
        vocab_size=tokenizer.vocab_size, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id, bos_id=tokenizer.bos_id
    )


def _tiny(name: str, mesh: jax.sharding.Mesh) -> Model:
    config = _tiny_config(name)
    make = jax.jit(functools.partial(transformer.init, config), out_shardings=transformer.shardings(config, mesh))
    return Model(config, make(jax.random.key(0)), tokenizers.tiny())


def abstract_leaves(config: ModelConfig, mesh: jax.sharding.Mesh) -> list[tuple[str, jax.ShapeDtypeStruct]]:
    """Name (dotted), shape and sharding of every parameter."""
    found = jax.tree_util.tree_leaves_with_path(states.abstract_params(config, mesh))
    return [(".".join(key.key for key in keys), leaf) for keys, leaf in found]


def put_leaf(params: dict[str, Any], name: str, value: Any) -> None:
    """Store a parameter under its dotted name in a nested dict."""
    *above, last = name.split(".")
    for part in above:
        params = params.setdefault(part, {})
    params[last] = value


def leaves(path: str | Path, mesh: jax.sharding.Mesh) -> Iterator[tuple[str, jax.Array]]:
    """The parameters of a model one at a time, by name, sharded over the mesh.

    A model of ours is read array by array; another format is loaded whole first.
    """
    folder = model_folder(path)
    if folder is None:
        model = open_model(path, mesh)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(model.params):
            yield ".".join(key.key for key in keys), leaf
        return
    for name, leaf in abstract_leaves(configs.from_json(folder / "model.json"), mesh):
        tree: dict[str, Any] = {}
        put_leaf(tree, name, leaf)
        yield name, jax.tree.leaves(_restore_params(folder, tree, partial=True))[0]


def _restore_params(folder: Path, abstract: Any, *, partial: bool = False) -> Any:
    args = ocp.args.PyTreeRestore(
        abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=partial,
    )
    place = bucket.place(folder / "params")
    with _explained(place), ocp.Checkpointer(_handler()) as reader:
        return reader.restore(place, args=args)


def _handler() -> ocp.PyTreeCheckpointHandler:
    """No compression: float32 weights shrink by 8% for twice the time of reading and four times that of writing."""
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _noted(handler: Any, failures: list[BaseException]) -> Any:
    """The handler, which writes in the background, with a list of what went wrong there."""
    save, finalize = handler.async_save, handler.finalize

    async def async_save(*words: Any, **settings: Any) -> list[_Write]:
        return [_Write(one, failures) for one in await save(*words, **settings) or ()]

    def finish(directory: Any) -> None:
        with _noting(failures):
            finalize(directory)

    handler.async_save, handler.finalize = async_save, finish
    return handler


@dataclass(frozen=True)
class _Write:
    """One of Orbax's futures, whose failure is noted when somebody waits for it."""

    future: Any
    failures: list[BaseException]

    def result(self, timeout: float | None = None) -> Any:
        """See `orbax.checkpoint.future.Future`."""
        with _noting(self.failures):
            return self.future.result(timeout)


@contextlib.contextmanager
def _noting(failures: list[BaseException]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        failures.append(error)
        raise


@contextlib.contextmanager
def _explained(folder: Any) -> Iterator[None]:
    """Say what a full disk or bucket means, and that nothing was lost. TensorStore wraps what the system says."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL or any(os.strerror(known) in str(error) for known in FULL):
            raise CheckpointError(
                f"the disk that holds {folder} is full, or a quota or size limit is reached: free some space and run "
                "the same command again; the last complete checkpoint is untouched"
            ) from error
        if refusal := bucket.refusal(error):
            raise CheckpointError(
                f"{folder} cannot be used, the bucket says {refusal!r}: {bucket.REMEDY}; the last "
                "complete checkpoint is untouched"
            ) from error
        raise
