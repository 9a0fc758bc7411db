"""From the csv of the sweep to the fitted power law, the table and the picture in README.md.

python experiments/dit_scaling/report.py --sweep=runs/dit_scaling
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from diffjax import viz

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parents[1]))
import reporting  # noqa: E402

WIDTH = "model.width"


class PowerLaw(NamedTuple):
    """`y = scale * x ** -exponent` by least squares of logarithms.

    Attributes:
      exponent: b.
      low, high: its 95 % interval, of Student's t with `len(x) - 2` degrees of freedom.
      scale: a.
      spread: standard deviation of the residuals of `log y`.
    """

    exponent: float
    low: float
    high: float
    scale: float
    spread: float

    def __call__(self, x):
        return self.scale * np.asarray(x) ** -self.exponent


def fit(x, y) -> PowerLaw:
    """The power law through points with x > 0 and y > 0, at least three of them."""
    u, v = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    centred = u - u.mean()
    slope = centred @ v / (centred @ centred)
    residual = v - v.mean() - slope * centred
    freedom = len(u) - 2
    spread = math.sqrt(residual @ residual / freedom)
    reach = student.ppf(0.975, freedom) * spread / math.sqrt(centred @ centred)
    return PowerLaw(-slope, -slope - reach, -slope + reach, math.exp(v.mean() - slope * u.mean()), spread)


def compute_of(width: int) -> tuple[float, int, int]:
    """`(FLOPs of the whole training, parameters, updates)` of the study's config at a width, from the traced step."""
    import jax

    from diffjax.train import config as configs
    from diffjax.train.parallel.flops import step_flops
    from diffjax.train.parts import prepare
    from diffjax.train.state import abstract_state

    config = configs.load(str(HERE / "config.py"))
    configs.override(config, WIDTH, str(width))
    config, parts = prepare(config)
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract_state(parts).params))
    return step_flops(config, parts).model * config.num_steps, size, config.num_steps


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sweep", default="", help="folder of the sweep; default the runs.csv that is kept here")
    rows = reporting.read_runs(HERE, parser.parse_args(argv).sweep)
    widths = sorted({int(row[WIDTH]) for row in rows})
    spent = {width: compute_of(width) for width in widths}
    metric = lambda key: [[row[key] for row in rows if row[WIDTH] == width] for width in widths]
    losses, distances = metric("heldout_loss"), metric("fd_relu")
    flops = [spent[width][0] for width in widths]
    laws = [fit(flops, [np.exp(np.mean(np.log(v))) for v in values]) for values in (losses, distances)]
    reporting.fill(HERE / "README.md", text_of(widths, spent, losses, distances, laws))
    viz.save(picture(flops, losses, distances, laws), HERE / "scaling.png")


def text_of(widths, spent, losses, distances, laws) -> str:
    """The results as Markdown: every width, the fits, and how far a straight line describes them."""
    shown = lambda values: f"{np.mean(values):.3g} ({min(values):.3g} to {max(values):.3g})"
    body = reporting.table(
        ["width", "parameters", "training FLOPs", "held-out loss", "FD-relu", "runs"],
        [[width, f"{spent[width][1]:,}", spent[width][0], shown(loss), shown(fd), len(loss)]
         for width, loss, fd in zip(widths, losses, distances, strict=True)],
    )  # fmt: skip
    parts = [
        f"{sum(map(len, losses))} runs; means over seeds, with their range.",
        body,
        "![loss and distance](scaling.png)",
    ]
    flops = np.array([spent[width][0] for width in widths])
    for heading, values, law in (("held-out loss", losses, laws[0]), ("FD-relu", distances, laws[1])):
        means = np.array([np.exp(np.mean(np.log(v))) for v in values])
        half = len(means) // 2
        slopes = [
            -np.polyfit(np.log(flops[part]), np.log(means[part]), 1)[0] for part in (np.s_[: half + 1], np.s_[half:])
        ]
        parts.append(
            f"**{heading}** goes as compute to the power {-law.exponent:.3f}, 95 % interval {-law.high:.3f} to "
            f"{-law.low:.3f}; the means lie {100 * law.spread:.1f} % off the line (standard deviation). "
            + ("The interval holds zero: these runs do not show that compute helps." if law.low <= 0 <= law.high else
               f"Doubling the compute multiplies it by {2**-law.exponent:.3f}.")
            + f" In the smaller half of the sizes alone the power is {-slopes[0]:.3f}, in the larger half "
            f"{-slopes[1]:.3f}. " + bend(flops, means)
        )  # fmt: skip
    return "\n\n".join(parts)


def bend(x, y) -> str:
    """Whether `log y` bends over `log x`, by the 95 % interval of its quadratic term; "" for fewer than 4 points."""
    if len(x) < 4:
        return ""
    (curve, *_), covariance = np.polyfit(np.log(x), np.log(y), 2, cov=True)
    reach = student.ppf(0.975, len(x) - 3) * math.sqrt(covariance[0, 0])
    text = f"A quadratic term would be {curve:.3f}, 95 % interval {curve - reach:.3f} to {curve + reach:.3f}: "
    if curve - reach <= 0 <= curve + reach:
        return text + "a bend is not told from scatter here, which does not exclude one."
    return text + (
        "the curve flattens, so the law must not be extended beyond the largest size."
        if curve > 0
        else "the curve steepens, so the law holds between these sizes at best."
    )


def picture(flops, losses, distances, laws):
    """Both metrics against compute, on log axes, a dot a run, with the fits."""
    from diffjax.viz.figure import COLOURS, INK, TEXT, TITLE, new_figure

    figure = new_figure(860, 380)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    figure.suptitle("DiT width against compute, equal updates", fontsize=TITLE, fontweight="bold", color=INK)
    panels = zip(figure.subplots(1, 2), ("held-out loss", "FD-relu"), (losses, distances), laws, COLOURS, strict=False)
    for axes, heading, values, law, colour in panels:
        for x, runs in zip(flops, values, strict=True):
            axes.plot([x] * len(runs), runs, "o", color=colour, ms=5, mec="white")
        line = np.geomspace(min(flops), max(flops), 50)
        name = f"power {-law.exponent:.3f} ({-law.high:.3f} to {-law.low:.3f})"
        axes.plot(line, law(line), color=INK, lw=1.4, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("training FLOPs", fontsize=TEXT + 1, color=INK)
        axes.set_ylabel(heading, fontsize=TEXT + 1, color=INK)
        axes.tick_params(labelsize=TEXT, which="both")
        axes.grid(True, which="major", color="#e3e6e8", lw=0.8)
        axes.legend(fontsize=TEXT, frameon=False)
    return figure


if __name__ == "__main__":
    main()
