"""Curves of one or several runs: as data for the page's charts, and as a PNG."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from stages.eval import TOP
from stages.report.facts import Facts

MOST_MARKS: Final = 10  # of a chart: a rate that changes every epoch would be nothing but lines and words
MOST_POINTS: Final = 600  # of a line; more are averaged, a screen shows no more
_COLOURS: Final = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#65a30d", "#db2777")


@dataclass(frozen=True)
class Series:
    """One line or row of dots; x is in epochs. ``colour`` numbers a colour of the theme, from 0."""

    name: str
    points: list[tuple[float, float]]
    colour: int
    style: str = "line"  # line | faint | dots


@dataclass(frozen=True)
class Chart:
    """``unit`` is number or percent; ``marks`` are vertical lines with a word; ``log`` offers a logarithmic axis."""

    key: str
    title: str
    y: str
    unit: str
    series: list[Series]
    marks: list[tuple[float, str]]
    log: bool = False

    def data(self) -> dict[str, Any]:
        """For the page's script."""
        return {
            "title": self.title,
            "y": self.y,
            "unit": self.unit,
            "log": self.log,
            "marks": [{"x": x, "text": text} for x, text in self.marks],
            "series": [
                {
                    "name": s.name,
                    "colour": s.colour % len(_COLOURS),
                    "style": s.style,
                    "points": [[_rounded(x), _rounded(y)] for x, y in s.points],
                }
                for s in self.series
            ],
        }


def charts(runs: Sequence[Facts], sampled: float | None = None) -> list[Chart]:
    """Loss, accuracy, speed and waiting, the runs on top of each other.

    ``sampled`` is the last checkpoint's accuracy on training pictures, for a report on one run.
    """
    several = len(runs) > 1
    marks = _rate_steps(runs[0]) if not several else []
    loss, accuracy, speed, wait = [], [], [], []
    for number, facts in enumerate(runs):
        prefix = f"{facts.name}: " if several else ""
        first, second = (number, number) if several else (0, 1)
        raw = _logged(facts, "loss")
        smooth = _moving_mean(raw)
        if smooth and not several:
            loss.append(Series("training, each logged batch", _thinned(raw), 0, "faint"))
        loss.append(Series(f"{prefix}training", _thinned(smooth or raw), first))
        seen = [(facts.epoch(r["step"]), r) for r in facts.validations]
        loss.append(Series(f"{prefix}validation", [(x, r["validation_loss"]) for x, r in seen], second, "dots"))
        accuracy.append(Series(f"{prefix}validation top-1", [(x, r["top1"]) for x, r in seen], first, "dots"))
        if not several and len(facts.classes) > TOP:
            accuracy.append(Series("validation top-5", [(x, r["top5"]) for x, r in seen], 1, "dots"))
        speed.append(Series(f"{prefix}images/s", _thinned(_logged(facts, "images_per_second")), number))
        wait.append(Series(f"{prefix}waiting", _thinned(_logged(facts, "data_wait")), number))
    if sampled is not None and not several:
        accuracy.append(Series("training top-1, a sample", [(runs[0].epoch(runs[0].step), sampled)], 2, "dots"))
    made = [
        Chart("loss", "Loss", "cross-entropy, nats", "number", loss, marks, log=True),
        Chart("accuracy", "Accuracy", "share of pictures, centre view", "percent", accuracy, marks),
        Chart("speed", "Speed", "training images per second", "number", speed, []),
        Chart("wait", "Waiting for data", "share of the training time", "percent", wait, []),
    ]
    return [c for c in made if any(s.points for s in c.series)]


def curves_png(shown: Sequence[Chart]) -> bytes:
    """The charts side by side as a PNG, for places that show no HTML."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(5.2 * len(shown), 3.6), dpi=110, layout="constrained")
    for place, chart in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), place + 1)
        for s in chart.series:
            axes.plot(
                [x for x, _ in s.points],
                [y for _, y in s.points],
                color=_COLOURS[s.colour % len(_COLOURS)],
                alpha=0.3 if s.style == "faint" else 1,
                label=s.name,
                marker="o" if s.style == "dots" else None,
                markersize=3.5,
            )
        for x, text in chart.marks:
            axes.axvline(x, color="#888888", linewidth=0.8, linestyle="--")
            above, unit = ("data", "axes fraction"), "offset points"
            axes.annotate(text, (x, 1), (0, 3), xycoords=above, textcoords=unit, ha="center", fontsize=7)
        axes.set_title(chart.title, pad=14)
        axes.set_xlabel("epoch")
        axes.set_ylabel(chart.y)
        axes.grid(alpha=0.25)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        if chart.unit == "percent":
            axes.set_ylim(top=max(0.02, axes.get_ylim()[1]))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend(fontsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _logged(facts: Facts, name: str) -> list[tuple[float, float]]:
    """A number of the training lines, by epoch."""
    return [(facts.epoch(r["step"]), r[name]) for r in facts.steps]


def _rate_steps(facts: Facts) -> list[tuple[float, str]]:
    """Where the learning rate changed, at the start of the epoch it changed in; nowhere if it changed all the time."""
    marks = []
    for before, after in itertools.pairwise(facts.steps):
        if after["lr"] != before["lr"]:
            marks.append((float(after.get("epoch", facts.epoch(after["step"]))), f"lr {after['lr']:.4g}"))
    return marks if len(marks) <= MOST_MARKS else []


def _moving_mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each y as the mean of itself and the ones before it, a sixtieth of all; empty where that is one."""
    span = len(points) // 60
    if span < 2:
        return []
    sums = np.cumsum([0.0, *(y for _, y in points)])
    ends = np.arange(1, len(points) + 1)
    starts = np.maximum(ends - span, 0)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    return [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """No more than ``MOST_POINTS`` points, each the mean of as many neighbours."""
    if len(points) <= MOST_POINTS:
        return points
    return [
        (float(part[:, 0].mean()), float(part[:, 1].mean())) for part in np.array_split(np.array(points), MOST_POINTS)
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
