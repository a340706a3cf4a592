"""Runs recipes: `run(name, stage)` trains a stage once, remembers its settings, and skips it when it is done."""

import contextlib
import dataclasses
import inspect
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from ..model.config import ModelConfig
from ..sharding import hosts
from ..train import attempts, bucket, stop
from ..train.curate import AnyTwo, Pair
from ..train.evaluate import OverSeeds
from ..train.programs import Programs
from ..train.stop import Interrupted, check_stop

ON_ONE_HOST = (Pair, OverSeeds)
"""Stages that the first host does while the others wait."""


class Stage(Protocol):
    """A frozen dataclass of settings that can be trained."""

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Do the work, going on from whatever `out` holds; the result is in `out`."""
        ...

    def programs(self, mesh: jax.sharding.Mesh) -> Programs:
        """The programs that `train` runs, with abstract arguments."""
        ...

    def result(self) -> ModelConfig | None:
        """The shape of the model that `train` makes; None if it makes none."""
        ...


class Run(Protocol):
    """What a recipe is given: call it with a name and a stage, get the path of the stage's folder."""

    def __call__(self, name: str, stage: Stage, /) -> str: ...


class SettingsChangedError(ValueError):
    """A stage of this name was started with other settings; the message shows which."""


class Training:
    """The `run` that trains: stages one after the other under one folder.

    A finished stage is skipped, an unfinished one goes on from its newest checkpoint, so running again resumes. On
    several hosts each has one; the first alone writes what belongs to the run, the others wait where they depend on it.
    """

    def __init__(
        self,
        out: Path,
        *,
        smoke: bool = False,
        mesh: jax.sharding.Mesh | None = None,
        started: float | None = None,
        only: Collection[str] = (),
    ) -> None:
        """`started` is when the process began (Unix time), which the first stage is charged with.

        With `only`, stages of these names are trained; others are taken for done, by other processes in other places.
        """
        self.out, self.smoke, self.mesh, self._started, self.only = out, smoke, mesh, started, only
        self.names: list[str] = []

    def __call__(self, name: str, stage: Stage) -> str:
        """Train the stage unless it is done.

        Raises:
            SettingsChangedError: if the name stands for other settings already.
            Interrupted: if a signal has asked to stop.
        """
        check_stop()
        stage = shrunk(stage) if self.smoke else stage
        folder = self.out / name
        self.names.append(name)
        if self.only and name not in self.only:
            return str(folder)
        remember(folder, stage, self.out)
        if not hosts.from_first((folder / "DONE").exists):
            stop.set_lossless(True)
            begun, self._started = self._started or time.time(), None
            with _attempt(folder, begun):
                if hosts.is_first() or not isinstance(stage, ON_ONE_HOST):
                    stage.train(folder, self.mesh)
            hosts.barrier()  # no host may find it done that has not helped
            if hosts.is_first():
                (folder / "DONE").touch()
            bucket.publish()
        if hosts.is_first() and not _keeps(stage):
            # Only after DONE: a kill in between must not leave an unfinished stage with torn checkpoints.
            bucket.remove(folder / "checkpoints")
        return str(folder)


def remember(folder: Path, stage: Stage, out: Path) -> None:
    """Write the settings of a stage to `folder`/stage.json, or compare them with those that are there.

    Of several hosts the first does so before the others, and none goes on before all have.

    Raises:
        SettingsChangedError: if they differ.
    """
    if hosts.is_first():
        _write_or_compare(folder, stage, out)
    bucket.refresh()
    if not hosts.is_first():
        _write_or_compare(folder, stage, out)
    hosts.barrier()


def _write_or_compare(folder: Path, stage: Stage, out: Path) -> None:
    now = relative(settings(stage), out)
    path = folder / "stage.json"
    if path.exists():
        changes = differences(json.loads(path.read_text()), now)
        if changes:
            raise SettingsChangedError(
                f"{folder} was started with other settings ({'; '.join(changes)}): "
                "give another --out, restore the settings, or delete that folder"
            )
        return
    if not hosts.is_first():
        raise FileNotFoundError(
            f"{hosts.name()} does not see {path}, which the first host has written: give an --out on storage that "
            "all hosts share (NFS, a mounted bucket, gs://BUCKET/PATH)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(now, indent=2) + "\n")
    partial.rename(path)


@contextlib.contextmanager
def _attempt(folder: Path, begun: float) -> Iterator[None]:
    """Note in `folder`/attempts.jsonl when the attempt began and how it ended."""
    if not hosts.is_first():
        yield
        return
    attempts.begin(folder, begun)
    end = "failed"
    try:
        yield
        end = "done"
    except (Interrupted, KeyboardInterrupt):
        end = "interrupted"
        raise
    finally:
        attempts.end(folder, end)


def _keeps(stage: Any) -> bool:
    """Whether the stage's settings ask for checkpoints that outlive it."""
    return "compute" in {field.name for field in dataclasses.fields(stage)} and stage.compute.keep_every > 0


SMOKE = {"steps": 2, "limit": 4}
"""What `--smoke` shrinks: fields of stages, and the most that they may then be."""


def shrunk(stage: Any) -> Any:
    """The stage with few steps and items, to see a recipe run from end to end.

    Filters are left out and pairs are of any answers: of those of a model that has learned nothing they would leave
    nothing.
    """
    fields = {field.name for field in dataclasses.fields(stage)}
    smaller: dict[str, Any] = {k: min(v, getattr(stage, k)) for k, v in SMOKE.items() if k in fields}
    lenient = {"filters": (), "pairing": AnyTwo()}
    return dataclasses.replace(stage, **smaller, **{name: value for name, value in lenient.items() if name in fields})


def settings(value: Any) -> Any:
    """Plain JSON of a stage: nested dataclasses become objects that name their class, functions their full name.

    Fields that a dataclass leaves out of comparisons (`compare=False`) may differ when a run goes on.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        compared = (field.name for field in dataclasses.fields(value) if field.compare)
        fields = {name: settings(vars(value)[name]) for name in compared}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): settings(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [settings(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if inspect.isfunction(value) and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(f"a stage's settings hold a {type(value).__name__} ({value!r}), which cannot be written as JSON")


def relative(value: Any, out: Path) -> Any:
    """Settings with OUT for the run folder in paths below it, so that a run may be moved."""
    if isinstance(value, dict):
        return {key: relative(item, out) for key, item in value.items()}
    if isinstance(value, list):
        return [relative(item, out) for item in value]
    inside = isinstance(value, str) and value.startswith(f"{out}/")
    return value.replace(str(out), "OUT", 1) if inside else value


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Where two settings differ, as `field: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            change
            for key in keys
            for change in differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            change
            for i, (a, b) in enumerate(zip(old, new, strict=True))
            for change in differences(a, b, f"{where}[{i}]")
        ]
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]
