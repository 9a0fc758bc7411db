"""Curves: losses from a run's `metrics.jsonl`, sample quality against the number of network evaluations."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from diffjax import files
from diffjax.viz.figure import COLOURS, FAINT, INK, TEXT, TITLE, new_figure, wrap


def read_metrics(path: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`{name: (steps, values)}` of every number in a `metrics.jsonl`, as `diffjax.files.read_rows` reads it.

    After a resume the later of two lines with the same step counts.

    Raises:
      OSError: if there is no such file, or it cannot be read.
    """
    found: dict[str, dict[int, float]] = {}
    for row in files.read_rows(path):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, {})[row["step"]] = float(value)
    ordered = {name: sorted(points.items()) for name, points in found.items()}
    return {name: (np.array([s for s, _ in p]), np.array([v for _, v in p])) for name, p in ordered.items()}


def loss_curves(metrics: Mapping, *, title: str = "Training loss") -> Figure:
    """A figure of the training loss against steps, whole and, where recorded, per band of noise.

    Args:
      metrics: `{name: (steps, values)}` as `read_metrics` returns it; `loss` and every band,
        `loss_logsnr[lo,hi]`, are drawn; an end that is missing is an open band.
      title: the heading.

    Raises:
      ValueError: where no loss was recorded.
    """
    names = [name for name in metrics if name == "loss" or name.startswith("loss_logsnr[")]
    if not names:
        raise ValueError(f"no 'loss' among the metrics: {', '.join(metrics) or 'none'}")
    bands = sorted((name for name in names if name != "loss"), key=lambda name: _band(name)[0])
    figure, axes = _axes(820, 460, title, "training step", "loss")
    # Bands are ordered, so their colours run through a scale.
    shades = colormaps["viridis"](np.linspace(0.05, 0.9, max(len(bands), 1)))
    for name, colour in zip(bands, shades, strict=False):
        axes.plot(*metrics[name], color=colour, lw=1.1, label=_band(name)[1], marker=_marker(metrics[name]), ms=4)
    if "loss" in metrics:
        label = "all levels" if bands else "loss"
        axes.plot(*metrics["loss"], color=INK, lw=2.0, label=label, marker=_marker(metrics["loss"]), ms=5)
    if all(np.all(metrics[name][1] > 0) for name in names):
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    _legend(axes, len(names))
    return figure


def quality_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    floor: tuple[float, float] | None = None,
    lines: Mapping[str, float] | None = None,
    ylabel: str = "Fréchet distance (lower is better)",
    title: str = "Sample quality against cost",
) -> Figure:
    """A figure of a distance against the number of network evaluations, both on log axes.

    Args:
      curves: `{solver: [(nfe, value), ...]}`.
      floor: `(mean, std)` of the distance between two halves of the real data, drawn as a band: no sampler can be
        expected below it.
      lines: `{name: value}` drawn as dashed horizontals, such as a baseline.
      ylabel: what is measured.
      title: the heading.
    """
    figure, axes = _axes(820, 460, title, "network evaluations per sample (NFE)", ylabel)
    for colour, (name, points) in zip(COLOURS * 3, curves.items(), strict=False):
        nfe, values = zip(*sorted(points), strict=True)
        axes.plot(nfe, values, color=colour, lw=1.8, marker="o", ms=5, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for style, (name, value) in zip(((4, 3), (1, 2), (6, 2, 1, 2)) * 3, (lines or {}).items(), strict=False):
        axes.axhline(value, color=FAINT, lw=1.2, dashes=style, label=name)
    if floor is not None:
        mean, std = floor
        axes.axhspan(max(mean - std, mean / 2), mean + std, color="#b9c6d2", alpha=0.7, lw=0,
                     label=f"floor: real images ({mean:.2f})")
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    _legend(axes, len(curves) + len(lines or {}) + 1)
    return figure


def _axes(width, height, title, xlabel, ylabel):
    """`(figure, axes)` with the heading, the axis labels and a pale grid."""
    figure = new_figure(width, height)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    axes = figure.add_subplot()
    axes.set_title(wrap(title, width - 120, TITLE, "bold"), fontsize=TITLE, fontweight="bold", color=INK, loc="left")
    axes.set_xlabel(xlabel, fontsize=TEXT + 1, color=INK)
    axes.set_ylabel(ylabel, fontsize=TEXT + 1, color=INK)
    axes.tick_params(labelsize=TEXT, colors=INK)
    axes.grid(True, which="major", color="#e3e6e8", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _band(name: str) -> tuple[float, str]:
    """Where the band `loss_logsnr[lo,hi]` begins, and what it is called."""
    lo, hi = name.removeprefix("loss_logsnr[").removesuffix("]").split(",")
    if not lo:
        return -np.inf, f"log-SNR below {hi}"
    return float(lo), f"log-SNR {lo} to {hi}" if hi else f"log-SNR above {lo}"


def _marker(curve) -> str | None:
    """A dot where there is one point alone, of which no line would show."""
    return "o" if np.count_nonzero(np.isfinite(curve[1])) == 1 else None


def _legend(axes, count):
    """A legend beside the axes, where it hides no curve; none for a single curve."""
    if count <= 1:
        return
    axes.legend(fontsize=TEXT, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0)


def _plain_ticks(axis):
    """Numbers as `0.2`, not `2 x 10^-1`, on a log axis, and more of them where it spans less than a decade."""
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    subs = (1.0,) if decades > 4 else (1.0, 2.0, 5.0) if decades > 1 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
