"""Curation: which generated rows to train on, and preference pairs made of them. Nothing here touches an accelerator,
but a scorer may.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from ..data import pairs as preferences
from ..data import shards
from ..data.filters.funnel import Filter, Funnel, funnel, then
from ..data.row import Row
from ..sharding import hosts
from . import programs
from .metrics import Log

Scorer = Callable[[Sequence[Row], jax.sharding.Mesh | None], Sequence[float]]
"""What gives rows their rewards, such as `rewards.ScoreRows`: finite numbers, the higher the better. In a recipe a
frozen dataclass of settings with a `__call__`."""

NOTHING = "nothing-kept"
"""Where the reasons are if no row is left."""


@dataclass(frozen=True, kw_only=True)
class Curate:
    """Put the rows of `Generate` stages through `filters`, in that order; the best of what is left may be chosen.

    `rows` are the stages' folders, several for several rounds. With a `scorer`, each row that passes the filters is
    given its reward, by which `best` (such as `outcome.BestByReward`) then chooses: best-of-n, over all rounds. What is
    kept and what is dropped, with the filter and the reason, go to shards in the folder's `rows`.
    """

    rows: tuple[str, ...]
    filters: tuple[Filter, ...]
    scorer: Scorer | None = None
    best: tuple[Filter, ...] = ()
    format: shards.Format = "parquet"
    rows_per_shard: int = 10_000

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Read, filter, write.

        Raises:
            ValueError: for shards that are not what was written, or if no row is left.
        """
        if hosts.from_first((out / "rows").exists) or (self.scorer is None and not hosts.is_first()):
            return
        with Log(out, title=out.name, total=1) as log, log.phase("filter"):
            rows = [row for folder in self.rows for row in shards.read_rows(folder)]
            found = funnel(rows, self.filters)
            if self.scorer is not None:
                rewards = self.scorer(found.kept, mesh)
                scored = [replace(row, reward=float(x)) for row, x in zip(found.kept, rewards, strict=True)]
                found = replace(found, kept=tuple(scored))
            if self.best:
                found = then(found, funnel(found.kept, self.best))
            if hosts.is_first():
                self._write(out, found)
            log.write(1, {"rows": len(rows), "kept": len(found.kept)})
        if not found.kept:
            raise ValueError(_nothing_left(out / NOTHING, found))

    def _write(self, out: Path, found: Funnel) -> None:
        shutil.rmtree(out / NOTHING, ignore_errors=True)
        shards.write_rows(
            out / ("rows" if found.kept else NOTHING),
            found,
            (*self.filters, *self.best),
            title=out.name,
            rows_per_shard=self.rows_per_shard,
            format=self.format,
        )

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """Nothing is compiled."""
        return {}

    def result(self) -> None:
        """It makes no model."""
        return None


def _nothing_left(folder: Path, found: Funnel) -> str:
    worst = max(found.steps, key=lambda step: step.dropped, default=None)
    most = f"; {worst.filter} dropped the most, {worst.dropped} of {worst.domain}" if worst else ""
    return (
        f"none of {len(found.dropped)} rows was kept{most}: the reasons are in {folder}; change the filters, or "
        "generate more"
    )


Pairing = Callable[[Sequence[Sequence[Row]]], list[preferences.Pair]]
"""Makes preference pairs from the rows of some folders: a frozen dataclass of settings with a `__call__`."""


@dataclass(frozen=True, kw_only=True)
class BestAndWorst:
    """Each prompt's best and worst row by verdict, of all folders together: see `pairs.best_and_worst`."""

    min_margin: float = 0.0
    max_difference: int | None = None

    def __call__(self, rows: Sequence[Sequence[Row]], /) -> list[preferences.Pair]:
        """The pairs."""
        flat = [row for one in rows for row in one]
        found = preferences.best_and_worst(flat, rank=self._rank, min_margin=self.min_margin)
        return _close(found, self.max_difference)

    def _rank(self, row: Row) -> float:
        return preferences.by_score(row)


@dataclass(frozen=True, kw_only=True)
class Judged(BestAndWorst):
    """Each prompt's best and worst row by reward, as a judge or a reward model gave it."""

    def _rank(self, row: Row) -> float:
        return preferences.by_reward(row)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """The first folder's model over the second's, without a judge: see `pairs.delta`."""

    max_difference: int | None = None

    def __call__(self, rows: Sequence[Sequence[Row]], /) -> list[preferences.Pair]:
        """The pairs."""
        if len(rows) != 2:
            raise ValueError(f"delta pairs are of a strong and a weak model's rows, not of {len(rows)} folders")
        return _close(preferences.delta(*rows), self.max_difference)


def _close(found: list[preferences.Pair], most: int | None) -> list[preferences.Pair]:
    return found if most is None else preferences.close_in_length(found, max_difference=most)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Make preference pairs from the rows of `Generate` or `Curate` stages, in the folder's `pairs`."""

    rows: tuple[str, ...]
    pairing: Pairing

    def train(self, out: Path, mesh: Any = None) -> None:
        """Read, pair, write. Raises ValueError if there is no pair."""
        if (out / "pairs").exists():
            return
        with Log(out, title=out.name, total=1) as log, log.phase("filter"):
            found = self.pairing([shards.read_rows(folder) for folder in self.rows])
            if not found:
                raise ValueError(f"the rows of {', '.join(self.rows)} make no pair: no prompt has answers that differ")
            shards.write_pairs(out / "pairs", found, title=out.name)
            log.write(1, {"pairs": len(found)})

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """Nothing is compiled."""
        return {}

    def result(self) -> None:
        """It makes no model."""
        return None
