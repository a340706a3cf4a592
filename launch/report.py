"""The report of a run: scores with intervals, how much of the teachers was recovered, where the time went."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import rich.box
from rich.table import Table

from ..train import attempts, evaluate, metrics
from ..train.evaluate import Score
from . import charts, comparison, funnels, machine
from .comparison import Comparison, Entry

PHASES = {
    "init": "imports, devices, opening the model",
    "compile": "compiling programs",
    "data": "reading and packing",
    "rollout": "sampling answers",
    "verify": "judging answers",
    "teacher": "scoring by teachers, references, critics",
    "train": "gradients and updates",
    "merge": "merging weights",
    "sync": "hosts waiting for each other",
    "checkpoint": "waiting for checkpoints and models to be written",
    "recovery": "restoring after an interruption",
    "wasted": "done and lost, or done again",
    "other": "everything else",
}
"""What wall time goes to, over all attempts."""
GOOD = ("rollout", "verify", "teacher", "train", "merge")
"""Goodput: the phases that a run exists for."""
OWN, SLOW, SLOW_SECONDS = ("data", "verify", "checkpoint"), 1.5, 1.0
"""Phases in which a host waits for no other, and what makes one a straggler: times the median, and seconds in all."""
SAMPLES = 4
"""Tasks per domain whose answers the page shows: the first ones, not chosen ones."""


class StageRecord(NamedTuple):
    """What a stage left behind: its settings, the lines of its metrics, wall seconds by phase, ends of its attempts."""

    name: str
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    seconds: dict[str, float]
    ends: tuple[str, ...]


def stage_records(out: Path) -> list[StageRecord]:
    """The stages of a run folder, in the order in which they were begun."""
    found = sorted(out.glob("*/stage.json"), key=lambda file: (file.stat().st_mtime_ns, file))
    return [_stage_record(file.parent) for file in found]


def _stage_record(folder: Path) -> StageRecord:
    lines = metrics.read(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    for line in lines:
        for phase, took in line["seconds"].items():
            seconds[phase if phase in seconds else "other"] += took
    ended = attempts.read(folder)
    for attempt in ended:
        for phase, took in attempt["phases"].items():
            seconds[phase if phase in seconds else "other"] += took
    wall = math.fsum(attempt["seconds"] for attempt in ended)
    seconds["other"] += max(0.0, wall - sum(seconds.values()))
    settings = json.loads((folder / "stage.json").read_text())
    return StageRecord(folder.name, settings, lines, seconds, tuple(attempt["end"] for attempt in ended))


def summarise(out: Path, compared: Comparison) -> dict[str, Any]:
    """What report.json holds.

    rows: name, scores {domain: {mean, low, high, n}}, recovery (mean over the domains where it is defined, or None),
    recovery_by_domain, seconds of the stages that made the model. funnels: by stage and domain, how many generated rows
    were left after each filter. shares and seconds: wall time by phase, over all
    stages. notes: why a recovery is undefined.
    """
    stages = {stage.name: stage for stage in stage_records(out)}
    scores = {entry.name: evaluate.read(Path(entry.evaluation)) for entry in compared.entries}
    by_phase = {phase: math.fsum(stage.seconds[phase] for stage in stages.values()) for phase in PHASES}
    total = math.fsum(by_phase.values())
    start = compared.entries[0].name if compared.entries else ""
    gains = {d: (scores[start][d].mean, scores[teacher][d].mean) for d, teacher in compared.teachers.items()}
    return {
        "title": compared.title,
        "rows": [_row(entry, scores[entry.name], {} if entry.name == start else gains) for entry in compared.entries],
        "teachers": dict(compared.teachers),
        "notes": [
            f"{domain}: its teacher {compared.teachers[domain]} gained nothing over {start} ({after:.1%}, was "
            f"{before:.1%}), so there is nothing to recover"
            for domain, (before, after) in gains.items()
            if after <= before
        ],
        "funnels": {one.name: one.left for one in funnels.read(out, list(stages))},
        "shares": {phase: seconds / total if total else 0.0 for phase, seconds in by_phase.items()},
        "seconds": by_phase,
        "goodput": math.fsum(by_phase[phase] for phase in GOOD) / total if total else 0.0,
        "restarts": {
            end: sum(stage.ends.count(end) for stage in stages.values()) for end in ("interrupted", "killed", "failed")
        },
        "stragglers": [found for stage in stages.values() for found in stragglers(stage.name, out / stage.name)],
        **machine.read(out),
    }


def _row(entry: Entry, scores: Mapping[str, Score], gains: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    recovery = {domain: recovered(scores[domain].mean, *gain) for domain, gain in gains.items()}
    defined = [value for value in recovery.values() if value is not None]
    return {
        "name": entry.name,
        "scores": {domain: score._asdict() for domain, score in scores.items()},
        "recovery": math.fsum(defined) / len(defined) if defined else None,
        "recovery_by_domain": recovery,
        "seconds": math.fsum(sum(_stage_record(Path(stage)).seconds.values()) for stage in entry.stages),
    }


def stragglers(stage: str, folder: Path) -> list[dict[str, Any]]:
    """Hosts that worked longer than the others where no host waits for another: stage, host, phase, times the median.

    A chip that is slow makes all of them wait, and is not seen here; a trace (`--profile`) shows it.
    """
    file = folder / "paces.jsonl"
    hosts: dict[str, dict[str, float]] = {}
    for line in metrics.read(file) if file.is_file() else []:
        for one in line["hosts"]:
            mine = hosts.setdefault(one["host"], dict.fromkeys(OWN, 0.0))
            for phase in OWN:
                mine[phase] += one["seconds"].get(phase, 0.0)
    found = []
    for phase in OWN if len(hosts) > 1 else ():
        median = statistics.median_low([mine[phase] for mine in hosts.values()])
        for host, mine in hosts.items():
            if mine[phase] > max(SLOW * median, SLOW_SECONDS):
                found.append({"stage": stage, "host": host, "phase": phase, "times": mine[phase] / max(median, 1e-3)})
    return found


def recovered(score: float, start: float, teacher: float) -> float | None:
    """(score - start) / (teacher - start); None where the teacher gained nothing."""
    return (score - start) / (teacher - start) if teacher > start else None


def write(out: Path, compared: Comparison) -> dict[str, Any]:
    """Write `out`/report.json and the page `out`/report.html; returns what is in the former."""
    summary = summarise(out, compared)
    (out / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    (out / "report.html").write_text(page(out, compared, summary), encoding="utf-8")
    return summary


def stored_comparison(out: Path) -> Comparison:
    """The comparison that the run ended with, or one without models for a run that has not ended.

    Raises:
        FileNotFoundError: if the folder holds no run.
    """
    if (out / "comparison.json").is_file():
        return comparison.read(out)
    if not any(out.glob("*/stage.json")):
        raise FileNotFoundError(f"{out} holds no run (no */stage.json): give the --out folder of `posttrain run`")
    return Comparison(title=f"{out.resolve().name} (not finished)", entries=(), teachers={})


def page(out: Path, compared: Comparison, summary: Mapping[str, Any]) -> str:
    """The self-contained HTML page of a run."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"duration": duration, "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False)}
    stages = stage_records(out)
    return environment.get_template("report.html").render(
        summary=summary,
        domains=domains(summary),
        scores_chart=charts.scores(summary) if summary["rows"] else None,
        curves=[
            (stage, chart) for stage in stages if (chart := charts.curves(stage.name, stage.settings, stage.lines))
        ],
        funnels=[(one, charts.funnel(one)) for one in funnels.read(out, [stage.name for stage in stages])],
        samples=samples(compared),
        phases=PHASES,
        good=GOOD,
        stages=stages,
        total=sum(summary["seconds"].values()),
    )


def samples(compared: Comparison) -> dict[str, list[dict[str, Any]]]:
    """By domain, the first tasks with the answers of the start, the domain's teacher and the last model."""
    if not compared.entries:
        return {}
    by_name = {entry.name: entry for entry in compared.entries}
    found: dict[str, list[dict[str, Any]]] = {}
    for domain, teacher in compared.teachers.items():
        shown = dict.fromkeys([compared.entries[0].name, teacher, compared.entries[-1].name])
        answers = {name: _answers(Path(by_name[name].evaluation), domain) for name in shown}
        first = next(iter(answers.values()))
        found[domain] = [
            {"prompt": row["prompt"], "answers": {name: rows[key] for name, rows in answers.items() if key in rows}}
            for key, row in list(first.items())[:SAMPLES]
        ]
    return found


def _answers(evaluation: Path, domain: str) -> dict[str, dict[str, Any]]:
    """Answers of an Evaluate stage to the tasks of a domain, by task id."""
    rows = [row for file in sorted((evaluation / "rollouts").glob("*.jsonl")) for row in metrics.read(file)]
    return {row["id"]: row for row in rows if row["domain"] == domain}


def domains(summary: Mapping[str, Any]) -> list[str]:
    """All domains that any model was scored on, in order."""
    return list(dict.fromkeys(domain for row in summary["rows"] for domain in row["scores"]))


def table(summary: Mapping[str, Any]) -> Table:
    """The comparison for the terminal: a row per model."""
    made = Table(title=summary["title"], title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("model", no_wrap=True)
    columns = domains(summary)
    for name in (*columns, "recovery", "time"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in summary["rows"]:
        made.add_row(row["name"], *_cells(row, columns))
    return made


def funnel_table(one: funnels.Stage) -> Table:
    """A funnel for the terminal: a row per filter, with what it left of each domain."""
    made = Table(title=f"{one.name}: rows left", title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("after", no_wrap=True)
    for domain in one.left:
        made.add_column(domain, justify="right", no_wrap=True)
    for step, counts in one.rows:
        made.add_row(step, *map(str, counts))
    return made


def _cells(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    shown = [score_text(row["scores"][domain]) if domain in row["scores"] else "" for domain in columns]
    return [*shown, "" if row["recovery"] is None else f"{row['recovery']:.0%}", duration(row["seconds"])]


def score_text(score: Mapping[str, float]) -> str:
    """Such as `62.5% [50, 74]`: the mean and its 95% interval."""
    return f"{score['mean']:.1%} [{100 * score['low']:.0f}, {100 * score['high']:.0f}]"


def duration(seconds: float) -> str:
    """Such as `8 s`, `4 min 10 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if 0 < seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
