"""Log-probabilities of given answers under a fixed model: computed once, kept on disk with that model's identity."""

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..data.pack import Group, pack_groups
from ..sharding import hosts
from . import bucket, checkpoint, fingerprint, score
from .compute import Compute
from .metrics import Log
from .stop import check_stop

SHARD = 1024
"""Prompts whose answers are scored and stored at a time; what an interruption may cost."""


class Scored(NamedTuple):
    """A prompt's answers as they were scored: a checksum of their tokens, and log-probs per token of each."""

    checksum: int
    logp: list[np.ndarray]


class Reference:
    """The reference's log-probs of the answers to some prompts, by the prompts' numbers.

    `folder` holds identity.json (a fingerprint of the weights, the tokenizer, the precision) and a file for each
    `SHARD` prompts, so an interrupted computation goes on where it was; the model is on the device only meanwhile.
    """

    def __init__(
        self,
        folder: Path,
        path: str,
        *,
        groups: Callable[[int], Group],
        wanted: Sequence[int],
        compute: Compute,
        mesh: jax.sharding.Mesh,
    ) -> None:
        """Read what is stored and compute the rest.

        Args:
            folder: where the log-probs are kept.
            path: the reference, a model as `checkpoint.open_model` takes it.
            groups: the tokens of a prompt and its answers, by number; they must fit in one row.
            wanted: the prompts' numbers.
            compute: precision and sizes.
            mesh: where the reference lies while it scores.

        Raises:
            ValueError: if `folder` belongs to another reference or to other prompts.
        """
        model = checkpoint.open_model(path, mesh)
        model = model._replace(config=compute.configure(model.config))
        self.folder = folder
        self.identity = _remember(folder, model, path)
        self._found: dict[int, Scored] = {}
        blocks = [wanted[start : start + SHARD] for start in range(0, len(wanted), SHARD)]
        with Log(folder, title=f"{folder.parent.name} {folder.name}", total=len(blocks)) as log, jax.set_mesh(mesh):
            for number, numbers in enumerate(blocks):
                file = folder / f"{number:06d}.npz"
                if not hosts.from_first(file.exists):
                    check_stop()
                    with log.phase("teacher"):
                        _store(file, _score(model, [groups(i) for i in numbers], compute, mesh), numbers)
                    bucket.refresh()  # one host writes, all read
                self._found |= _read(file, numbers)
                log.write(number + 1, {})

    def logp(self, number: int, group: Group) -> list[np.ndarray]:
        """Log-probs of each answer's tokens [N]. Raises ValueError if the answers are not those that were scored."""
        found = self._found[number]
        if found.checksum != _checksum(group):
            raise ValueError(
                f"the answers to prompt {number} are not those whose reference log-probs are in {self.folder}: the "
                "data has changed; delete that folder to compute them again, or restore the data"
            )
        return found.logp


def _remember(folder: Path, model: checkpoint.Model, path: str) -> dict[str, str]:
    """The model's identity, which `folder` has or is given."""
    now = {
        "weights": fingerprint.of(model.params),
        "tokenizer": model.tokenizer.fingerprint,
        "dtype": model.config.dtype,
    }
    file = folder / "identity.json"
    if hosts.is_first() and not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(now, indent=2) + "\n")
        partial.rename(file)
    stored = json.loads(hosts.from_first(file.read_text))
    if stored != now:
        changed = ", ".join(name for name in now if stored.get(name) != now[name])
        raise ValueError(
            f"{folder} holds log-probs of another reference than {path} is now (it differs in {changed}): delete that "
            "folder to compute them again, or restore the reference"
        )
    return now


def _score(model: checkpoint.Model, groups: list[Group], compute: Compute, mesh: jax.sharding.Mesh) -> list[Scored]:
    packed = pack_groups(groups, length=compute.row_tokens)
    logp = iter(
        score.examples(lambda micro: score.token_logp(model.config, model.params, micro), packed, compute, mesh)
    )
    return [Scored(_checksum(group), [next(logp) for _ in group.answers]) for group in groups]


def _checksum(group: Group) -> int:
    """Of prompt and answers, with where one ends and the next begins."""
    parts = [np.asarray(part, np.int32) for part in (group.prompt, *(answer.tokens for answer in group.answers))]
    return zlib.crc32(np.concatenate([[len(part) for part in parts], *parts]).astype("<i4").tobytes())


def _store(file: Path, scored: list[Scored], numbers: Sequence[int]) -> None:
    if not hosts.is_first():
        return
    arrays: dict[str, Any] = {
        "numbers": np.asarray(numbers, np.int64),
        "checksums": np.asarray([one.checksum for one in scored], np.uint32),
        "answers": np.asarray([len(one.logp) for one in scored], np.int32),
        "lengths": np.asarray([len(logp) for one in scored for logp in one.logp], np.int32),
        "logp": np.concatenate([logp for one in scored for logp in one.logp]).astype(np.float32),
    }
    partial = file.with_suffix(".partial")
    with partial.open("wb") as opened:
        np.savez(opened, **arrays)
    partial.rename(file)


def _read(file: Path, numbers: Sequence[int]) -> dict[int, Scored]:
    with np.load(file, allow_pickle=False) as stored:
        if stored["numbers"].tolist() != list(numbers):
            raise ValueError(
                f"{file} holds the log-probs of other prompts than are asked for: the data or its order has changed; "
                f"delete {file.parent} to compute them again"
            )
        logp = iter(np.split(stored["logp"], np.cumsum(stored["lengths"])[:-1]))
        rows = zip(stored["numbers"].tolist(), stored["checksums"].tolist(), stored["answers"].tolist(), strict=True)
        return {number: Scored(checksum, [next(logp) for _ in range(count)]) for number, checksum, count in rows}
