"""From the csv of the sweep to the table, the picture and the findings in README.md.

python experiments/parameterisation/report.py --sweep=runs/parameterisation
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from diffjax import viz

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import reporting  # noqa: E402

FACTORS = {"head": "parameterisation", "schedule": "schedule", "weight": "weighting"}
METRICS = {"fd_relu": "FD-relu", "heldout_loss": "held-out loss"}


def additive_fit(rows, metric):
    """Least squares of `log metric` on one effect per level of each factor: `{factor: {level: effect}}` and the rest.

    Effects of a factor sum to zero. The rest is `(standard deviation, degrees of freedom)` of what the sum of the
    factors does not explain: interactions and the noise of single runs together.
    """
    values = np.log([row[metric] for row in rows])
    columns, names = [np.ones(len(rows))], []
    for factor in FACTORS:
        levels = list(dict.fromkeys(row[factor] for row in rows))
        for level in levels[:-1]:
            columns.append([(row[factor] == level) - 1.0 * (row[factor] == levels[-1]) for row in rows])
        names.append((factor, levels))
    design = np.stack([np.asarray(column, float) for column in columns], axis=1)
    found, *_ = np.linalg.lstsq(design, values, rcond=None)
    freedom = len(rows) - design.shape[1]
    spread = math.sqrt(np.sum((values - design @ found) ** 2) / freedom) if freedom else float("nan")
    effects, rest = {}, list(found[1:])
    for factor, levels in names:
        own = [rest.pop(0) for _ in levels[:-1]]
        effects[factor] = dict(zip(levels, [*own, -sum(own)], strict=True))
    return effects, (spread, freedom)


def comparisons(rows, metric):
    """`(factor, a, b, ratio, lo, hi)`: how many times larger the metric is with level a than with b, 95 % interval."""
    effects, (spread, freedom) = additive_fit(rows, metric)
    found = []
    for factor, levels in effects.items():
        count = {level: sum(row[factor] == level for row in rows) for level in levels}
        for a, b in itertools.combinations(levels, 2):
            reach = student.ppf(0.975, freedom) * spread * math.sqrt(1 / count[a] + 1 / count[b])
            ends = (levels[a] - levels[b] + sign * reach for sign in (0, -1, 1))
            found.append((factor, a, b, *(math.exp(end) for end in ends)))
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sweep", default="", help="folder of the sweep; default the runs.csv that is kept here")
    rows = reporting.read_runs(HERE, parser.parse_args(argv).sweep)
    reporting.fill(HERE / "README.md", text_of(rows))
    names = [", ".join(str(row[factor]) for factor in FACTORS) for row in rows]
    panels = {heading: [[row[key]] for row in rows] for key, heading in METRICS.items()}
    viz.save(viz.sweep_dots(names, panels, title="Parameterisation, schedule and weighting"), HERE / "runs.png")


def text_of(rows) -> str:
    """The results as Markdown: every run, what a factor changes, and what that says."""
    ordered = sorted(rows, key=lambda row: row["fd_relu"])
    every = reporting.table(
        [*FACTORS.values(), *METRICS.values(), "FD-tanh", "accuracy", "seconds"],
        [[*(f"`{row[f]}`" for f in FACTORS), *(row[m] for m in METRICS), row["fd_tanh"], row["accuracy"],
          round(row["seconds"])] for row in ordered],
    )  # fmt: skip
    parts = [f"{len(rows)} runs, best samples first.", every, "![every run](runs.png)"]
    for metric, heading in METRICS.items():
        spread, freedom = additive_fit(rows, metric)[1]
        found = comparisons(rows, metric)
        body = reporting.table(
            ["", "ratio", "95 % interval", "verdict"],
            [[f"{FACTORS[f]}: `{a}` over `{b}`", ratio, f"{lo:.3g} to {hi:.3g}", verdict(a, b, lo, hi)]
             for f, a, b, ratio, lo, hi in found],
        )  # fmt: skip
        intro = (
            f"**{heading}**: geometric means compared, from an additive model of its logarithm. What that does not "
            f"explain has a standard deviation of {100 * spread:.0f} % with {freedom} degrees of freedom."
        )
        parts += [intro, body]
    best, worst = ordered[0], ordered[-1]
    shown = lambda row: ", ".join(f"`{row[factor]}`" for factor in FACTORS)
    parts.append(
        f"The best run by FD-relu is {shown(best)} with {best['fd_relu']:.3g}, the worst {shown(worst)} with "
        f"{worst['fd_relu']:.3g}. The order by held-out loss "
        + ("begins with the same run." if best is min(rows, key=lambda row: row["heldout_loss"]) else
           f"begins with another one, {shown(min(rows, key=lambda row: row['heldout_loss']))}: the two metrics do not "
           "rank alike.")
    )  # fmt: skip
    return "\n\n".join(parts)


def verdict(a, b, lo, hi) -> str:
    """What an interval of a ratio, of something that should be small, says."""
    if lo > 1:
        return f"`{b}` is better"
    return f"`{a}` is better" if hi < 1 else "not told apart"


if __name__ == "__main__":
    main()
