"""The results of ``bench.evidence`` as tables and as a picture of all curves."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from PIL import Image

from bench.evidence_plan import ABLATIONS, LOG_EVERY
from pipeline.run_dir import write_bytes

FIRST_STEPS: Final = 500  # of the training curves, compared apart from the rest
_CURVE: Final = 10  # logged losses whose mean is a point of a curve that is compared with another


def markdown(results: Sequence[dict[str, Any]], base: str) -> str:
    """The tables: every run with its seeds side by side, and the ablations beside the paper's figures."""
    names = list(dict.fromkeys(r["name"] for r in results))
    groups = {name: [r for r in results if r["name"] == name] for name in names}
    lines = [
        "# Evidence that it learns",
        "",
        "Accuracy in percent on the validation pictures, a figure a seed; chance is "
        f"{100 / results[0]['classes']:.3g} %."
        if results
        else "No run has begun.",
        "",
        "| run | epochs | top-1 centre | top-1 ten views | top-5 ten views | loss centre | leaves chance after | "
        "images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        cells = [
            name,
            _each(group, _epochs_done, same=True),
            _each(group, lambda r: _percent(r, "centre", "top1")),
            _each(group, lambda r: _percent(r, "ten_views", "top1")),
            _each(group, lambda r: _percent(r, "ten_views", "top5")),
            _each(group, lambda r: f"{r['centre']['loss']:.3f}" if "centre" in r else _state(r)),
            _each(group, _takeoff),
            _each(group, lambda r: "none" if r["images_per_second"] is None else f"{r['images_per_second']:,.0f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_curves(groups, base), *_ablations(groups, base), *_failures(results)]
    if results:
        last = results[-1]
        shared = f"; {last['jobs']} runs at a time shared it, so no rate is the machine's" if last["jobs"] > 1 else ""
        lines += [
            "",
            f"Machine: {last['machine']}; {last['date']}; {last['precision']}, batch {last['batch']}{shared}.",
        ]
    return "\n".join(lines) + "\n"


def apart(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], first: int, last: int
) -> tuple[float, ...] | None:
    """How far two training curves are apart in steps ``first`` to ``last``, each a mean over ten logged losses.

    The mean of a - b, the mean of its absolute value and the largest; None where the curves have no such steps both.
    """
    differences = [x[1] - y[1] for x, y in zip(a, b, strict=False)]
    step = [LOG_EVERY * (end + 1) for end in range(len(differences))]
    smooth = [
        statistics.mean(differences[end - _CURVE + 1 : end + 1])
        for end in range(_CURVE - 1, len(differences))
        if first <= step[end] - LOG_EVERY * _CURVE + 1 and step[end] <= last
    ]
    if not smooth:
        return None
    sizes = [abs(d) for d in smooth]
    return statistics.mean(smooth), statistics.mean(sizes), max(sizes)


def _curves(groups: dict[str, list[dict[str, Any]]], base: str) -> list[str]:
    """The training curve by hand beside PyTorch's, seed by seed, and how far two seeds are apart."""
    by_seed = [
        {r["seed"]: r for r in groups.get(name, []) if "failed" not in r} for name in (base, f"{base} in PyTorch")
    ]
    hand, torch = by_seed
    pairs = [(f"by hand - PyTorch, seed {s}", hand[s], torch[s]) for s in hand if s in torch]
    for who, runs in zip(("by hand", "PyTorch"), by_seed, strict=True):
        pairs += [(f"seed {s} - seed {t}, {who}", runs[s], runs[t]) for s, t in itertools.combinations(runs, 2)]
    end = max((LOG_EVERY * len(r["training"]) for runs in by_seed for r in runs.values()), default=0)
    spans = [(1, min(FIRST_STEPS, end)), *([(FIRST_STEPS + 1, end)] if end > FIRST_STEPS else [])]
    rows = []
    for name, one, other in pairs:
        found = [apart(one["training"], other["training"], *span) for span in spans]
        if None not in found:
            rows.append(f"| {name} | " + " | ".join(f"{f[0]:+.3f}, {f[1]:.3f}, {f[2]:.3f}" for f in found) + " |")
    head = [
        f"Training loss of {base}, the differences of two curves in nats: their mean, the mean of their size, the "
        f"largest. A point of a curve is the mean of {_CURVE} logged losses ({_CURVE * LOG_EVERY} steps):",
        "",
        f"| curves | {' | '.join(f'steps {first} to {last}' for first, last in spans)} |",
        f"|---|{'---|' * len(spans)}",
    ]
    return [*head, *rows, ""] if rows else []


def _ablations(groups: dict[str, list[dict[str, Any]]], base: str) -> list[str]:
    """Points of error that leaving something out costs, seed by seed, beside what others found on the full set."""
    whole = {r["seed"]: r for r in groups.get(base, []) if "ten_views" in r}
    rows = []
    for what, _, paper in ABLATIONS:
        group = [r for r in groups.get(f"{base} without {what}", []) if r["seed"] in whole]
        if not [r for r in group if "failed" in r or "ten_views" in r]:
            continue
        cells = [_each(group, partial(_cost, whole, view)) for view in ("centre", "ten_views")]
        rows.append(f"| {what} | {' | '.join(cells)} | {paper} |")
    head = [
        f"What it costs to leave something out of {base}, in points of top-1 error, a figure a seed:",
        "",
        "| left out | centre | ten views | paper, authors' logs (ILSVRC, top-1 / top-5) |",
        "|---|---|---|---|",
    ]
    return [*head, *rows] if rows else []


def _cost(whole: Mapping[int, dict[str, Any]], view: str, r: dict[str, Any]) -> str:
    if view not in r:
        return _state(r)
    if r["leaves_chance_after"] is None:
        return "at chance"
    return f"{100 * (whole[r['seed']][view]['top1'] - r[view]['top1']):+.1f}"


def _failures(results: Sequence[dict[str, Any]]) -> list[str]:
    failed = [r for r in results if "failed" in r]
    return ["", *(f"- {r['name']}, seed {r['seed']}: {r['failed']}" for r in failed)] if failed else []


def _each(group: Sequence[dict[str, Any]], text: Any, *, same: bool = False) -> str:
    values = [text(r) for r in group]
    return values[0] if same and len(set(values)) == 1 else " / ".join(values)


def _percent(r: dict[str, Any], view: str, key: str) -> str:
    return f"{100 * r[view][key]:.1f}" if view in r else _state(r)


def _epochs_done(r: dict[str, Any]) -> str:
    done = max((points[-1][0] for points in (r["training"], r["validation"]) if points), default=0)
    return f"{done:.3g} of {r['epochs']}"


def _state(r: dict[str, Any]) -> str:
    return "failed" if "failed" in r else "unfinished"


def _takeoff(r: dict[str, Any]) -> str:
    after = r["leaves_chance_after"]
    return "never" if after is None and "centre" in r else "not yet" if after is None else f"{after} epochs"


def picture(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Training loss and validation accuracy of every run, the seeds of one in one colour."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(12, 5.2), dpi=120, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    names = list(dict.fromkeys(r["name"] for r in results))
    colours = colormaps["tab20"].colors
    for r in results:
        look = {"color": colours[names.index(r["name"]) % len(colours)], "linewidth": 1.2}
        look |= {"linestyle": "--"} if r["by"] == "PyTorch" else {}
        look |= {"marker": ".", "markersize": 3}
        smooth = _epoch_means(r["training"])
        loss.plot([x for x, _ in smooth], [y for _, y in smooth], **look)
        first = next(other for other in results if other["name"] == r["name"]) is r
        accuracy.plot(
            [v[0] for v in r["validation"]],
            [v[1] for v in r["validation"]],
            label=r["name"] if first else None,
            **look,
        )
    loss.set(title="Training loss, mean of each epoch", xlabel="epoch", ylabel="nats", xlim=(0, None))
    # A run that diverges is cut off: the others are to be seen.
    loss.set_ylim(0, 1.3 * math.log(max((r["classes"] for r in results), default=10)))
    accuracy.set(title="Validation top-1, centre view", xlabel="epoch", xlim=(0, None), ylim=(0, 1))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (loss, accuracy):
        axes.grid(alpha=0.25)
    if results:
        figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    # A page of a few colours: a third of the bytes.
    small = io.BytesIO()
    Image.open(file).convert("RGB").quantize(128).save(small, format="png", optimize=True)
    write_bytes(path, small.getvalue())


def _epoch_means(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """A point an epoch, at its end."""
    epochs: dict[int, list[float]] = {}
    for x, y in points:
        epochs.setdefault(math.ceil(x), []).append(y)
    return [(float(epoch), statistics.mean(values)) for epoch, values in sorted(epochs.items())]
