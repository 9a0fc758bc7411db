"""What the runs of a sweep came to: one row a run as csv, one row a combination as a Markdown table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffjax.sweep.plan import Run

# Columns of the table and panels of the plot, where the runs have them: key, heading.
COLUMNS = {
    "loss": "training loss",
    "heldout_loss": "held-out loss",
    "fd_relu": "FD-relu",
    "fd_tanh": "FD-tanh",
    "fd_pixels": "FD-pixels",
    "c2st": "C2ST",
    "closer": "closer",
    "accuracy": "accuracy",
    "seconds": "seconds",
}
DRAWN = ("heldout_loss", "fd_relu", "fd_pixels", "loss")


def finished_report(run: Run) -> dict | None:
    """The report of a run whose training reached its last step and was evaluated there, else None."""
    path = Path(run.workdir) / "eval" / "report.json"
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    last = min(run.config.num_steps, run.config.stop_at or run.config.num_steps)
    return report if report["step"] == last else None


def results(run: Run, seconds: float | None = None) -> dict[str, Any]:
    """The numbers of a finished run: its last logged training loss, held-out loss, metrics of its samples, seconds.

    Empty for a run that has not finished.
    """
    report = finished_report(run)
    if report is None:
        return {}
    found: dict[str, Any] = {"loss": last_loss(Path(run.workdir) / "metrics.jsonl")}
    found["heldout_loss"] = report.get("heldout", {}).get("loss")
    found |= next(iter(report["rows"].values()))
    found["seconds"] = seconds
    return {key: value for key, value in found.items() if value is not None}


def last_loss(path: Path) -> float | None:
    """The training loss of the last line of a log that has one: the mean since the line before it."""
    from diffjax.viz import read_metrics

    metrics = read_metrics(path) if path.exists() else {}
    return float(metrics["loss"][1][-1]) if "loss" in metrics else None


def rows_of(runs: Sequence[Run], status: Mapping[str, Mapping]) -> list[dict[str, Any]]:
    """One row a run: `{"run", "status", grid keys ..., "seed", metrics ...}`."""
    rows = []
    for run in runs:
        known = status.get(run.name, {})
        found = results(run, known.get("seconds"))
        state = "finished" if found else known.get("status", "waiting")
        rows.append({"run": run.name, "status": state} | run.values | {"seed": run.seed} | found)
    return rows


def combinations(runs: Sequence[Run], rows: Sequence[Mapping]) -> dict[tuple, list[Mapping]]:
    """The rows of each combination of settings, over its seeds, in the order of the runs."""
    groups: dict[tuple, list[Mapping]] = {}
    for run, row in zip(runs, rows, strict=True):
        groups.setdefault(settings_of(run), []).append(row)
    return groups


def settings_of(run: Run) -> tuple:
    """The `(key, value)` pairs that tell the combination of a run, without its seed."""
    return tuple((key, value) for key, value in run.values.items() if key != "seed")


def as_csv(rows: Sequence[Mapping]) -> str:
    """All rows with all their columns, in the order in which they come up."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def as_markdown(runs: Sequence[Run], rows: Sequence[Mapping]) -> str:
    """One row a combination: how many of its runs finished, and of each metric the mean and, over seeds, the range."""
    groups = combinations(runs, rows)
    keys = [key for key, _ in next(iter(groups))]
    shown = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = [[*(f"`{key}`" for key in keys), "finished", *(COLUMNS[key] for key in shown)]]
    for settings, members in groups.items():
        done = sum(row["status"] == "finished" for row in members)
        cells = [f"`{value}`" for _, value in settings] + [f"{done} of {len(members)}"]
        lines.append(cells + [cell([row[key] for row in members if key in row]) for key in shown])
    rule = ["---"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:])) + "\n"


def cell(values: Sequence[float]) -> str:
    """`0.31 (0.29 to 0.33)`: the mean and the range of a metric over seeds; a dash for none."""
    if not values:
        return "-"
    mean = f"{sum(values) / len(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3g} to {max(values):.3g})"


def label(settings: tuple, short: Mapping[str, str]) -> str:
    """What a combination is called in a picture."""
    return ", ".join(f"{short[key]}={value}" for key, value in settings) or "the config"
