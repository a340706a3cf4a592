"""The numbers of metrics.jsonl, shown elsewhere as well: TensorBoard's event files, a project of Weights & Biases.

metrics.jsonl is the record; these are views of it, opened only where asked for. Their packages are optional.
"""

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable


@runtime_checkable
class Tracker(Protocol):
    """Takes the numbers of a step, and is closed after the last."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Wanted(NamedTuple):
    """Which trackers every stage opens."""

    tensorboard: bool = False
    wandb: str = ""  # name of the project


_wanted = Wanted()


def request(wanted: Wanted) -> None:
    """Have every stage shown there.

    Raises:
        ImportError: for a package that is not installed.
    """
    global _wanted
    if wanted.tensorboard:
        _package("tensorboardX", "tensorboard")
    if wanted.wandb:
        _package("wandb", "wandb")
    _wanted = wanted


def opened(folder: Path, *, start: int) -> list[Tracker]:
    """The trackers of a stage that writes to `folder` and has made `start` steps; what is past them is shown anew."""
    found: list[Tracker] = []
    if _wanted.tensorboard:
        found.append(TensorBoard(folder, start=start))
    if _wanted.wandb:
        found.append(Wandb(folder, project=_wanted.wandb))
    return found


def flat(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line of metrics.jsonl; those of nested ones by names such as seconds/train."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found[prefix + name] = float(value)
    return found


class TensorBoard:
    """Event files in `folder`/tensorboard: `tensorboard --logdir OUT` shows all stages of a run."""

    def __init__(self, folder: Path, *, start: int) -> None:
        module = _package("tensorboardX", "tensorboard")
        # Files are named by the second: without the suffix an attempt begun in the same one would overwrite them.
        self._writer = module.SummaryWriter(
            str(folder / "tensorboard"), purge_step=start + 1 if start else None, filename_suffix=f".{start}"
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Scalars of a step, on disk at once."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """End the event file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases per stage, grouped by run folder; one that goes on keeps its identity."""

    def __init__(self, folder: Path, *, project: str) -> None:
        module, group = _package("wandb", "wandb"), folder.resolve().parent
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run = module.init(
            project=project, group=group.name, name=f"{group.name}/{folder.name}", id=identity, resume="allow",
            dir=str(folder), reinit="finish_previous",
        )  # fmt: skip

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"the package {name} is not installed: run `pip install 'posttrain[{extra}]'`") from error
