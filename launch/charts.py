"""The report's charts as inline SVG: learning curves of a stage, scores with their intervals."""

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .funnels import Stage as Funnel

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
START, TEACHER, OTHER = "#7b8794", "#0a7f5a", "#2563eb"
LINES = ("#2563eb", "#d9480f", "#0a7f5a", "#9333ea", "#b45309", "#0e7490")
LABELS = {
    "reward": "mean reward of the sampled answers",
    "kl": "KL(student || teacher) per token, nats",
    "loss": "loss",
}
STYLE: Any = {  # names of matplotlib's settings, which its types list one by one
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
}


def curves(name: str, settings: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Reward and KL, or the loss, over the steps of a stage; None for stages that do not learn step by step."""
    shown = [key for key in ("reward", "kl") if any(key in line for line in lines)]
    shown = shown or [key for key in ("loss",) if any(key in line for line in lines)]
    if not shown or settings["kind"] in ("Evaluate", "Generate"):
        return None
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.4 * len(shown), 2.5), layout="constrained")
        for axes, key in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            _curve(axes, key, lines)
        return _svg(figure, f"learning curves of {name}")


def _curve(axes: Axes, key: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """One number over the steps; the reward also by domain where there are several."""
    parts = sorted({field for line in lines for field in line if field.startswith(f"{key}/")})
    for color, field in zip(LINES[1:] * len(parts), parts if len(parts) > 1 else [], strict=False):
        steps, values = _series(lines, field)
        axes.plot(steps, smoothed(values), color=color, linewidth=1.1, label=field.partition("/")[2])
    steps, values = _series(lines, key)
    many = len(values) > 8
    axes.plot(steps, values, color=LINES[0], linewidth=0.8, alpha=0.3 if many else 0.0)
    axes.plot(steps, smoothed(values) if many else values, color=LINES[0], linewidth=2, label="all")
    if len(parts) > 1:
        axes.legend(loc="best", fontsize=8, ncols=2)
    axes.set_title(LABELS[key], color=INK)
    axes.set_xlabel("step")
    if key == "reward":
        axes.set_ylim(-0.02, 1.02)
    elif key == "kl":
        axes.set_ylim(bottom=min(0.0, *values))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _series(lines: Sequence[Mapping[str, Any]], field: str) -> tuple[list[int], np.ndarray]:
    having = [line for line in lines if field in line]
    return [line["step"] for line in having], np.asarray([line[field] for line in having], float)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a window of about a tenth of the steps around each; shorter at the ends."""
    half = max(1, len(values) // 20)
    return np.asarray([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def scores(summary: Mapping[str, Any]) -> str:
    """A panel per domain: every model's score with its 95% interval, start and teacher as lines to compare with."""
    rows = summary["rows"]
    names = list(dict.fromkeys(domain for row in rows for domain in row["scores"]))
    columns = min(3, len(names))
    depth = math.ceil(len(names) / columns)
    with mpl.rc_context({**STYLE, "svg.hashsalt": "scores"}):
        figure = Figure(figsize=(1.4 + 2.8 * columns, depth * (0.8 + 0.27 * len(rows))), layout="constrained")
        grid = figure.subplots(depth, columns, squeeze=False, sharey=True, sharex=True)
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        for axes, domain in zip(grid.flat, names, strict=False):
            _panel(axes, domain, rows, summary["teachers"].get(domain))
        return _svg(figure, "scores with 95% intervals")


def _panel(axes: Axes, domain: str, rows: Sequence[Mapping[str, Any]], teacher: str | None) -> None:
    for place, row in enumerate(rows):
        if domain not in row["scores"]:
            continue
        score = row["scores"][domain]
        color = START if place == 0 else TEACHER if row["name"] == teacher else OTHER
        axes.plot([100 * score["low"], 100 * score["high"]], [place, place], color=color, linewidth=2, alpha=0.45)
        axes.plot(100 * score["mean"], place, "o", color=color, markersize=6)
        if place == 0 or row["name"] == teacher:
            axes.axvline(100 * score["mean"], color=color, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-5, 105)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_title(domain, color=INK, fontweight="bold")
    axes.xaxis.set_major_formatter("{x:.0f}%")


def funnel(one: Funnel) -> str:
    """A panel per domain: a bar for each filter, as long as the share of the generated rows that it left."""
    columns = min(3, len(one.left))
    depth = math.ceil(len(one.left) / columns)
    with mpl.rc_context({**STYLE, "svg.hashsalt": one.name}):
        figure = Figure(figsize=(1.8 + 2.7 * columns, depth * (0.7 + 0.24 * len(one.steps))), layout="constrained")
        grid = figure.subplots(depth, columns, squeeze=False, sharey=True, sharex=True)
        for axes in grid.flat[len(one.left) :]:
            axes.set_visible(False)
        for axes, (domain, counts) in zip(grid.flat, one.left.items(), strict=False):
            _bars(axes, domain, one.steps, counts)
        return _svg(figure, f"rows left after each filter of {one.name}")


def _bars(axes: Axes, domain: str, steps: Sequence[str], counts: Sequence[int]) -> None:
    places = range(len(steps))
    widths = [100 * count / max(counts[0], 1) for count in counts]
    axes.barh(places, [100] * len(steps), color=GRID, height=0.7)
    axes.barh(places, widths, color=[START, *[OTHER] * (len(steps) - 2), TEACHER][: len(steps)], height=0.7)
    for place, count in zip(places, counts, strict=True):
        axes.text(102, place, f"{count:,}", va="center", color=INK, fontsize=8)
    axes.set_yticks(places, steps)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False)
    axes.set_xlim(0, 125)
    axes.set_ylim(len(steps) - 0.5, -0.5)
    axes.set_xticks([0, 50, 100])
    axes.set_title(domain, color=INK, fontweight="bold")
    axes.xaxis.set_major_formatter("{x:.0f}%")


def _svg(figure: Figure, label: str) -> str:
    """The figure as an element to put into a page; it scales with its box up to its own size."""
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    body = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), count=1, flags=re.DOTALL).partition("<svg ")[2]
    width, height = figure.get_size_inches() * 96
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{html.escape(label)}" viewBox="0 0 {width * 0.75:g} {height * 0.75:g}" '
        f'style="width:{width:.0f}px;max-width:100%">{body.partition(">")[2]}'
    )
