"""Error of samplers against network calls, ours beside diffusers' and k-diffusion's, on exact denoisers.

    python benchmarks/nfe_vs_error.py                    # all: results/nfe_vs_error.json and a picture
    python benchmarks/nfe_vs_error.py --targets ring8    # this target anew, the others as they are in the file
    python benchmarks/nfe_vs_error.py --draw             # nothing anew: table, bars and picture from the files

The peers run in another environment, `--oracle` (default `.venv-oracle/bin/python`: diffusers, k-diffusion, torch);
where it is missing their committed numbers are used, and the report says so. docs/benchmark.md has the definitions.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

import ours  # noqa: E402
import targets  # noqa: E402

import diffjax as dj  # noqa: E402
from diffjax.viz.figure import COLOURS, FAINT, INK, TEXT, TITLE, new_figure, save  # noqa: E402

HERE = Path(__file__).parent
PEERS = HERE / "results" / "nfe_vs_error_peers.json"
RESULTS = HERE / "results" / "nfe_vs_error.json"
PICTURE = HERE.parent / "docs" / "images" / "nfe_vs_error.png"
COLUMNS = ["rmse", "median", "flips", "calls"]
HIGH_DIMENSIONAL = ("digits64",)


def short(value):
    return float(f"{value:.4g}") if np.isfinite(value) else None


def peers_report(oracle: Path, out: Path, again: bool) -> tuple[dict, str]:
    """The peers' numbers and where they are from: measured now, or committed."""
    source = "committed numbers"
    if again and oracle.exists():
        subprocess.run([oracle, HERE / "peers.py", "--out", out], check=True)
        source = "measured in this run"
    report = json.loads(out.read_text())
    for name, digest in report["targets"].items():
        if digest != targets.TARGETS[name]().digest:
            raise SystemExit(f"{out} is for another {name} ({digest}); run it again with --oracle")
    return report, source


def measure(name: str, kept: dict, part: str) -> dict:
    """`{process: {method: {nfe: [rmse, median, flips, calls]}}}` of our deterministic samplers on one target.

    Only those with `part` in their name are run; of the others `kept` has the rows.
    """
    rows = {}
    run, methods = ours.Runner(name), [method for method in ours.deterministic() if part in method.name]
    for process in (make() for make in targets.PROCESSES.values()):
        schedule, exact = ours.SCHEDULES[process.name](), targets.ends(run.target, process)
        kept_cell = kept.get(process.name, {}).items()
        cell = rows[process.name] = {key: row for key, row in kept_cell if part and part not in key}
        for method in methods:
            for nfe in ours.BUDGETS:
                planned = method.plan(schedule, run.target, nfe)
                if planned is None:
                    continue
                x, calls = run(*planned, targets.unit_noise(run.target))
                if calls > nfe:
                    raise RuntimeError(f"{method.name} made {calls} calls at a budget of {nfe}")
                found = targets.errors(run.target, x, exact)
                cell.setdefault(method.name, {})[nfe] = [short(found[key]) for key in COLUMNS[:3]] + [calls]
        print(f"{name} {process.name}: {len(cell)} methods, {time.process_time():.0f} s", flush=True)
    return rows


def measure_stochastic() -> tuple[dict, dict]:
    """On VP: `{method: {nfe: [kl, calls]}}` on gauss16 and `{target: {method: {nfe: [spread, weights]}}}`."""
    schedule, kl, law = dj.ddpm(), {}, {}
    gauss, others = ours.Runner("gauss16"), {name: ours.Runner(name) for name in ours.LAW_TARGETS}
    for method in ours.stochastic():
        for nfe in ours.BUDGETS:
            value, calls = ours.gaussian_kl(gauss, method, schedule, nfe)
            kl.setdefault(method.name, {})[nfe] = [short(value), calls]
        for name, run in others.items():
            for nfe in ours.LAW_BUDGETS:
                x, _ = run(*method.plan(schedule, run.target, nfe), targets.unit_noise(run.target, ours.LAW_SAMPLES))
                found = [short(value) for value in targets.law(run.target, x).values()]
                law.setdefault(name, {}).setdefault(method.name, {})[nfe] = found
    return kl, law


def best(cell: dict, nfe: int, column: str, names=None) -> tuple[float, str]:
    """The smallest value of a column at a budget, and whose it is."""
    index = COLUMNS.index(column)
    found = [
        (rows[str(nfe)][index], name)
        for name, rows in cell.items()
        if str(nfe) in rows and rows[str(nfe)][index] is not None and (names is None or name in names)
    ]
    return min(found, default=(float("inf"), "none"))


def summarise(rows: dict, peers: dict) -> dict:
    """Per target, process and budget: the best peer by median and by RMSE, ours, and the ratios theirs / ours."""
    out = {}
    for target, processes in rows.items():
        for process, cell in processes.items():
            for nfe in ours.BUDGETS:
                row = out.setdefault(target, {}).setdefault(process, {}).setdefault(str(nfe), {})
                for column in ("median", "rmse"):
                    value, name = best(peers["rows"][target][process], nfe, column)
                    row[f"peer {column}"] = [short(value), name]
                    value_fixed, name = best(cell, nfe, column, set(cell) - set(ours.HEADLINES))
                    row[f"fixed {column}"] = [short(value_fixed), name]
                    for label in ours.HEADLINES:
                        mine, _ = best(cell, nfe, column, (label,))
                        if np.isfinite(mine):
                            row[f"{label} {column}"] = [mine, short(value / mine)]
    return out


def ratios(summary: dict, label: str, column: str, budgets, wanted) -> list[tuple[float, str]]:
    """Every ratio theirs / ours of a method over cells, with the cell's name."""
    return [
        (row[f"{label} {column}"][1], f"{target} {process} {nfe}")
        for target, processes in summary.items()
        for process, cells in processes.items()
        for nfe, row in cells.items()
        if int(nfe) in budgets and wanted(target) and f"{label} {column}" in row
    ]


def bars(summary: dict) -> list[dict]:
    """What was asked of the recommended samplers: the share of cells that meet it, and the worst ones."""
    plain, scalar = ours.HEADLINES[0], ours.HEADLINES[1]
    high, ring, held_out = HIGH_DIMENSIONAL.__contains__, "ring8".__eq__, targets.HELD_OUT.__contains__
    tuned = lambda target: not held_out(target)
    asked = [
        ("median 2x below the best peer, 64-D", scalar, "median", (8, 10, 15, 20, 30, 50), high, 2.0),
        ("median 2x below the best peer, ring8", scalar, "median", (20, 30, 50), ring, 2.0),
        ("median level with the best peer at 5", scalar, "median", (5,), lambda t: high(t) or ring(t), 1.0),
        ("RMSE below the best peer, 64-D", plain, "rmse", (10, 15, 20, 30, 50), high, 1.0),
        ("median below the best peer, 64-D", plain, "median", (30, 50), high, 1.0),
        ("median below the best peer, every tuned target", scalar, "median", (8, 10, 15, 20, 30, 50), tuned, 1.0),
        ("held out: median 2x below the best peer", scalar, "median", (8, 10, 15, 20, 30, 50), held_out, 2.0),
        ("held out: median level with the best peer at 5", scalar, "median", (5,), held_out, 1.0),
        ("held out: median below the best peer", scalar, "median", (8, 10, 15, 20, 30, 50), held_out, 1.0),
        ("held out: RMSE below the best peer", plain, "rmse", (10, 15, 20, 30, 50), held_out, 1.0),
    ]
    out = []
    for what, label, column, budgets, wanted, least in asked:
        found = sorted(ratios(summary, label, column, budgets, wanted))
        missed = [f"{cell}: {ratio:.2f}" for ratio, cell in found if ratio < least]
        out.append({"bar": what, "method": label, "budgets": budgets, "cells": len(found), "missed": missed})
    return out


def table(summary: dict, target: str, process: str) -> list[str]:
    """A cell as Markdown: medians with RMSE, columns are budgets."""
    cells = summary[target][process]
    lines = ["| " + " | ".join(["NFE", *cells]) + " |", "|" + "---|" * (len(cells) + 1)]
    peer = [f"{row['peer median'][0]:.2g} ({row['peer rmse'][0]:.2g})" for row in cells.values()]
    lines.append("| " + " | ".join(["best peer", *peer]) + " |")
    who = [row["peer median"][1].replace("diffusers ", "").replace("k-diffusion ", "k: ") for row in cells.values()]
    lines.append("| " + " | ".join(["who, by median", *who]) + " |")
    ours_fixed = [f"{row['fixed median'][0]:.2g} ({row['fixed rmse'][0]:.2g})" for row in cells.values()]
    lines.append("| " + " | ".join(["best of ours, fixed", *ours_fixed]) + " |")
    lines.append("| " + " | ".join(["who, by median", *(row["fixed median"][1] for row in cells.values())]) + " |")
    for label in ours.HEADLINES:
        if all(f"{label} median" in row for row in cells.values()):
            mine = [f"{row[f'{label} median'][0]:.2g} ({row[f'{label} rmse'][0]:.2g})" for row in cells.values()]
            lines.append("| " + " | ".join([label, *mine]) + " |")
    return lines


def stochastic_tables(report: dict, peers: dict) -> list[str]:
    """KL and law of the best samplers of either side that draw noise, as Markdown."""
    lines = ["", "Nats per dimension on gauss16, VP-linear:", ""]
    budgets = [str(n) for n in ours.BUDGETS]
    lines += ["| " + " | ".join(["sampler", *budgets]) + " |", "|" + "---|" * (len(budgets) + 1)]
    for side, kl in (("", peers["kl"]), ("ours: ", report["kl"])):
        for name in sorted(kl, key=lambda name: min(kl[name][n][0] or np.inf for n in ("20", "30")))[:6]:
            lines.append("| " + " | ".join([side + name, *(f"{kl[name][n][0]:.2g}" for n in budgets)]) + " |")
    for target in report["law"]:
        columns = [f"{what}, {n}" for what in ("spread", "weights") for n in ours.LAW_BUDGETS]
        lines += ["", f"Law of {ours.LAW_SAMPLES} samples of {target}, VP-linear (1 is exact):", ""]
        lines += ["| " + " | ".join(["sampler", *columns]) + " |", "|" + "---|" * (len(columns) + 1)]
        for side, found in (("", peers["law"].get(target, {})), ("ours: ", report["law"][target])):
            away = lambda row: sum(abs(np.log(max(row[str(n)][0] or 1e9, 1e-9))) for n in ours.LAW_BUDGETS[1:])
            for name in sorted(found, key=lambda name: away(found[name]))[:6]:
                values = [found[name][str(n)][k] for k in (0, 1) for n in ours.LAW_BUDGETS]
                lines.append(
                    "| " + " | ".join([side + name, *("-" if v is None else f"{v:.2g}" for v in values)]) + " |"
                )
    return lines


def draw(rows: dict, peers: dict, path: Path) -> Path:
    """Median error against NFE, a panel for each target and process; the peers are a band, their best its edge."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

    names = list(rows)
    figure = new_figure(1180, 110 + 215 * len(names))
    axes = figure.subplots(len(names), len(targets.PROCESSES), sharex=True, squeeze=False)
    x = np.array(ours.BUDGETS)
    for i, target in enumerate(names):
        for j, process in enumerate(targets.PROCESSES):
            panel, cell = axes[i, j], peers["rows"][target][process]
            values = np.array([[np.nan if (v := r[str(n)][1]) is None else v for n in x] for r in cell.values()])
            low, middle = np.nanmin(values, 0), np.nanmedian(values, 0)
            panel.fill_between(x, low, middle, color="#dddddd", lw=0, label="peers, best to middle")
            panel.plot(x, low, color=INK, lw=1.6, label="best peer at each NFE")
            known = {k: r for k, r in rows[target][process].items() if k not in ours.HEADLINES}
            lowest = [best(known, n, "median")[0] for n in x]
            panel.plot(x, lowest, color=FAINT, lw=1.2, ls="--", label="best of our fixed solvers")
            for label, colour in zip(ours.HEADLINES, COLOURS, strict=False):
                if mine := rows[target][process].get(label):
                    points = [(int(n), row[1]) for n, row in mine.items() if row[1]]
                    panel.plot(*zip(*points, strict=True), color=colour, lw=1.5, marker="o", ms=3, label=label)
            panel.set(xscale="log", yscale="log", title=f"{target}, {process}" if i == 0 else None)
            panel.set_title(f"{target}, {process}", size=TEXT, color=INK)
            panel.set_ylim(bottom=max(panel.get_ylim()[0], 1e-5))  # an exact method would flatten the others
            panel.xaxis.set_major_locator(FixedLocator(x))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.tick_params(labelsize=TEXT - 1, colors=FAINT)
            panel.grid(alpha=0.25, lw=0.5)
    for panel in axes[-1]:
        panel.set_xlabel("network calls", size=TEXT, color=FAINT)
    for panel in axes[:, 0]:
        panel.set_ylabel("median error / sigma_data", size=TEXT, color=FAINT)
    handles = {
        label: handle for panel in axes.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    height = figure.get_size_inches()[1]
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="upper center",
        ncols=3,
        fontsize=TEXT,
        frameon=False,
        bbox_to_anchor=(0.5, 1 - 0.35 / height),
    )
    figure.suptitle("Distance to the exact end point of the probability flow", size=TITLE, y=1 - 0.15 / height)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.85 / height))
    return save(figure, path)


def collect(arguments, kept: dict) -> dict:
    """The report without the peers: what was asked for anew, the rest as it was."""
    rows = kept.get("rows", {})
    rows |= {name: measure(name, rows.get(name, {}), arguments.methods) for name in arguments.targets}
    kl, law = measure_stochastic() if arguments.stochastic else (kept.get("kl", {}), kept.get("law", {}))
    return {
        "command": "python benchmarks/nfe_vs_error.py",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, float64",
        "versions": {name: metadata.version(name) for name in ("diffjax", "jax", "numpy", "scipy", "scikit-learn")},
        "targets": {name: make().digest for name, make in targets.TARGETS.items()},
        "columns": COLUMNS,
        "rows": {name: rows[name] for name in targets.TARGETS if name in rows},
        "kl": kl,
        "law_columns": ["spread", "weights"],
        "law": law,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", type=Path, default=HERE.parent / ".venv-oracle" / "bin" / "python")
    parser.add_argument("--committed", action="store_true", help="do not run the peers: take their committed numbers")
    parser.add_argument("--targets", nargs="*", default=list(targets.TARGETS), choices=list(targets.TARGETS))
    parser.add_argument("--methods", default="", help="only those with this in their name; other rows are kept")
    parser.add_argument("--no-stochastic", dest="stochastic", action="store_false")
    parser.add_argument("--draw", action="store_true", help="measure nothing: table, bars and picture from the files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "benchmark.md", help="gets the tables")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    if arguments.draw:
        arguments.targets, arguments.stochastic, arguments.committed = [], False, True
    peers, source = peers_report(arguments.oracle, PEERS, not arguments.committed)
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    report = json.loads(json.dumps(collect(arguments, kept)))
    report["peers"] = kept.get("peers", source) if arguments.draw else source
    summary = report["summary"] = summarise(report["rows"], peers)
    report["bars"] = bars(summary)
    targets.dump(report, arguments.out)
    lines = []
    for target, processes in summary.items():
        for process in processes:
            lines += ["", f"**{target}, {process}**", "", *table(summary, target, process)]
    lines += ["", f"Peers: {report['peers']}.", ""]
    judged = []
    for bar in report["bars"]:
        met = bar["cells"] - len(bar["missed"])
        missed = "; ".join(bar["missed"]) or "none"
        judged.append(f"- {bar['method']}, {bar['bar']}: {met} of {bar['cells']} cells. Missed: {missed}.")
    drawn = stochastic_tables(report, peers) if report["kl"] else []
    print(*lines, *judged, *drawn, sep="\n")
    if arguments.page.exists():
        for marker, part in (("tables", lines), ("bars", ["", *judged, ""]), ("stochastic", [*drawn, ""])):
            targets.write_between(arguments.page, marker, part)
    print(draw(report["rows"], peers, arguments.picture))


if __name__ == "__main__":
    main()
