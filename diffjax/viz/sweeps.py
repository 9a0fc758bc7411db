"""Dots of a sweep: every run's number, settings below each other, so that the spread of seeds is seen beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from diffjax.viz.figure import COLOURS, INK, TEXT, TITLE, line_height, new_figure, text_width


def sweep_dots(
    names: Sequence[str], panels: Mapping[str, Sequence[Sequence[float]]], *, title: str = "Runs of the sweep"
) -> Figure:
    """A figure with a panel for each metric: a row for each setting, a dot for each of its runs, a bar at their mean.

    Args:
      names: of the settings, from top to bottom.
      panels: `{metric: [values of the runs of each setting]}`; a setting may have none.
      title: the heading.

    Raises:
      ValueError: if a panel has another number of settings than `names`.
    """
    for metric, values in panels.items():
        if len(values) != len(names):
            raise ValueError(f"panel {metric!r} has {len(values)} settings for {len(names)} names")
    left = 40 + max(text_width(name) for name in names)
    width, height = left + 260 * len(panels), 110 + 1.7 * line_height() * max(len(names), 2)
    figure = new_figure(width, height)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    figure.suptitle(
        f"{title} (dot: a run, bar: their mean)", fontsize=TITLE, fontweight="bold", color=INK, x=0.02, ha="left"
    )
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, colour, (metric, rows) in zip(axes, COLOURS * 3, panels.items(), strict=False):
        for place, values in enumerate(rows):
            if values:
                mean = sum(values) / len(values)
                axis.plot([min(values), max(values)], [place, place], color=colour, lw=1.2, alpha=0.6)
                axis.plot([mean, mean], [place - 0.28, place + 0.28], color=colour, lw=2.2)
                axis.plot(values, [place] * len(values), "o", color=colour, ms=4.5, mec="white", mew=0.6)
        axis.set_xlabel(metric, fontsize=TEXT + 1, color=INK)
        axis.grid(True, axis="both", color="#e3e6e8", lw=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=TEXT, colors=INK)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    return figure
