"""Curation: which generated rows to train on, and preference pairs made of them. Nothing here touches an accelerator,
but a scorer may.
"""

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from ..data import pairs as preferences
from ..data import shards, streams
from ..data.filters.funnel import Dropped, Filter, Sieve, Step
from ..data.row import Row
from ..data.shard_folder import Format
from ..sharding import hosts
from . import programs
from .metrics import Log

Scores = Callable[[Sequence[Row]], Sequence[float]]
"""The rewards of some rows: finite numbers, the higher the better."""


@runtime_checkable
class Scorer(Protocol):
    """What gives rows their rewards, such as `rewards.ScoreRows`: a frozen dataclass of settings."""

    def open(self, mesh: jax.sharding.Mesh | None, /) -> Scores:
        """Make it ready to score batches of rows."""
        ...


NOTHING = "nothing-kept"
"""Where the reasons are if no row is left."""


@dataclass(frozen=True, kw_only=True)
class Curate:
    """Put the rows of `Generate` stages through `filters`, in that order; the best of what is left may be chosen.

    `rows` are the stages' folders, several for several rounds. With a `scorer`, each row that passes the filters is
    given its reward, by which `best` (such as `outcome.BestByReward`) then chooses: best-of-n, over all rounds. What is
    kept and what is dropped, with the filter and the reason, go to shards in the folder's `rows`. In memory are a
    shard's worth of rows at a time, and what filters remember (see `duplicates`).
    """

    rows: tuple[str, ...]
    filters: tuple[Filter, ...]
    scorer: Scorer | None = None
    best: tuple[Filter, ...] = ()
    format: Format = "parquet"
    rows_per_shard: int = 10_000

    def train(self, out: Path, mesh: jax.sharding.Mesh | None = None) -> None:
        """Read, filter, write.

        Raises:
            ValueError: for shards that are not what was written, or if no row is left.
        """
        if hosts.from_first((out / "rows").exists) or (self.scorer is None and not hosts.is_first()):
            return
        sieve, best = Sieve(self.filters), Sieve(self.best)
        with Log(out, title=out.name, total=1) as log, log.phase("filter"):
            writer = self._writer(out) if hosts.is_first() else None
            num_rows = num_kept = 0
            for kept, dropped in self._sifted(sieve, best, mesh):
                if writer:
                    writer.add(kept, dropped)
                num_kept += len(kept)
                num_rows += len(kept) + len(dropped)
            steps = (*sieve.steps(), *best.steps(sieve.domains))
            if writer:
                writer.publish(steps, folder=None if num_kept else out / NOTHING)
            log.write(1, {"rows": num_rows, "kept": num_kept})
        if not num_kept:
            raise ValueError(_nothing_left(out / NOTHING, num_rows, steps))

    def _writer(self, out: Path) -> shards.RowWriter:
        shutil.rmtree(out / NOTHING, ignore_errors=True)
        return shards.RowWriter(
            out / "rows",
            (*self.filters, *self.best),
            title=out.name,
            rows_per_shard=self.rows_per_shard,
            format=self.format,
        )

    def _sifted(
        self, sieve: Sieve, best: Sieve, mesh: jax.sharding.Mesh | None
    ) -> Iterator[tuple[list[Row], list[Dropped]]]:
        """What is kept of each batch of prompts, and what is dropped."""
        score = self.scorer.open(mesh) if self.scorer else None
        rows = streams.merged(*map(shards.scan_rows, self.rows))
        for batch in streams.batches(rows, size=self.rows_per_shard):
            kept, dropped = sieve(batch)
            if score and kept:
                kept = [replace(row, reward=float(x)) for row, x in zip(kept, score(kept), strict=True)]
            kept, others = best(kept)
            yield kept, [*dropped, *others]

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """Nothing is compiled."""
        return {}

    def result(self) -> None:
        """It makes no model."""
        return None


def _nothing_left(folder: Path, num_rows: int, steps: Sequence[Step]) -> str:
    worst = max(steps, key=lambda step: step.dropped, default=None)
    most = f"; {worst.filter} dropped the most, {worst.dropped} of {worst.domain}" if worst else ""
    return f"none of {num_rows} rows was kept{most}: the reasons are in {folder}; change the filters, or generate more"


Pairing = Callable[[Sequence[Sequence[Row]]], list[preferences.Pair]]
"""Makes preference pairs from a prompt's rows, folder by folder: a frozen dataclass of settings with a `__call__`."""


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
class AnyTwo:
    """Each prompt's first answer over the next that says something else: to try a recipe with, not to learn from."""

    def __call__(self, rows: Sequence[Sequence[Row]], /) -> list[preferences.Pair]:
        """The pairs."""
        first, *others = [row for one in rows for row in one]
        other = next((row for row in others if row.response != first.response), None)
        return [preferences.Pair(chosen=first, rejected=other)] if other else []


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
            prompts = streams.by_prompt([shards.scan_rows(folder) for folder in self.rows])
            pairs = (pair for rows in prompts for pair in self.pairing(rows))
            first = next(pairs, None)
            if first is None:
                raise ValueError(f"the rows of {', '.join(self.rows)} make no pair: no prompt has answers that differ")
            shards.write_pairs(out / "pairs", itertools.chain([first], pairs), title=out.name)
            log.write(1, {"pairs": shards.count_rows(out / "pairs", "pairs")})

    def programs(self, mesh: jax.sharding.Mesh) -> programs.Programs:
        """Nothing is compiled."""
        return {}

    def result(self) -> None:
        """It makes no model."""
        return None
