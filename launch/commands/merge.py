"""`posttrain merge`: several fine-tuned models become one."""

import contextlib
from pathlib import Path

import rich.console

from ...sharding import hosts
from ...train import merge
from .. import cluster, lock
from ..recipe import Stage, Training


def linear(models: tuple[str, ...], out: Path, *, weights: tuple[float, ...]) -> None:
    """See `train.merge.Linear`."""
    _train(merge.Linear(models=models, weights=weights), out)


def slerp(models: tuple[str, str], out: Path, *, base: str, t: float) -> None:
    """See `train.merge.Slerp`."""
    _train(merge.Slerp(models=models, base=base, t=t), out)


def task_arithmetic(models: tuple[str, ...], out: Path, *, base: str, weights: tuple[float, ...], scale: float) -> None:
    """See `train.merge.TaskArithmetic`."""
    _train(merge.TaskArithmetic(models=models, base=base, weights=weights, scale=scale), out)


def ties(models: tuple[str, ...], out: Path, *, base: str, density: float, scale: float) -> None:
    """See `train.merge.Ties`."""
    _train(merge.Ties(models=models, base=base, density=density, scale=scale), out)


def dare(
    models: tuple[str, ...], out: Path, *, base: str, drop: float, weights: tuple[float, ...], scale: float, seed: int
) -> None:
    """See `train.merge.Dare`."""
    _train(merge.Dare(models=models, base=base, drop=drop, weights=weights, scale=scale, seed=seed), out)


def _train(stage: Stage, out: Path) -> None:
    """As a recipe's stage: its settings are kept beside the model, and other settings are not written over it."""
    with cluster.joined():
        with lock.held(out) if hosts.is_first() else contextlib.nullcontext():
            Training(out.parent)(out.name, stage)
        if hosts.is_first():
            rich.console.Console(markup=False).print(f"merged: {out / 'model'}", soft_wrap=True, highlight=False)
