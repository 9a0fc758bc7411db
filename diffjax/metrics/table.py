"""Reports as a table of plain text."""

from __future__ import annotations

from collections.abc import Mapping

# Metric -> heading, the good direction or value, factor, decimals.
COLUMNS = {
    "mmd2": ("MMD2 e3", "0", 1e3, 2),
    "c2st": ("C2ST", "0.5", 1, 3),
    "closer": ("closer", "0.5", 1, 3),
    "precision": ("prec", "higher", 1, 3),
    "recall": ("recall", "higher", 1, 3),
    "density": ("dens", "1", 1, 3),
    "coverage": ("cover", "higher", 1, 3),
    "inception_score": ("IS", "higher", 1, 2),
    "class_tv": ("classTV", "lower", 1, 3),
    "accuracy": ("acc", "higher", 1, 3),
}


def table(rows: Mapping[str, Mapping[str, float]], floor: str = "floor", good: Mapping[str, str] | None = None) -> str:
    """Aligned text, one line per row, one column per metric, the second line saying what is good.

    Each Frechet distance (a name that starts with `fd_`) is followed by its multiple of the row called `floor`, if
    there is one. A metric that a row lacks is a dash.

    Args:
      rows: name -> metrics, as from `report` and `baseline_rows`; columns come in the order of first appearance.
      floor: name of the row of real data.
      good: metric -> good direction or value, in place of the usual one, such as that of `closer` for unequal halves.
    """
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    columns = [["", "good is", *rows]]
    for name in names:
        heading, ideal, factor, decimals = COLUMNS.get(name, (name.replace("fd_", "FD-"), "lower", 1, 3))
        ideal = (good or {}).get(name, ideal)
        if not name.startswith("fd_") and name not in COLUMNS:
            ideal = ""
        columns.append([heading, ideal, *(_cell(row.get(name), factor, decimals) for row in rows.values())])
        unit = rows.get(floor, {}).get(name)
        if name.startswith("fd_") and unit:
            columns.append(["x floor", "1", *(_cell(row.get(name), 1 / unit, 2) for row in rows.values())])
    widths = [max(map(len, column)) for column in columns]
    columns[0] = [cell.ljust(widths[0]) for cell in columns[0]]
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def _cell(value: float | None, factor: float, decimals: int) -> str:
    return "-" if value is None else f"{value * factor:.{decimals}f}"
