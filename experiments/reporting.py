"""What the reports of the studies share: reading a sweep's csv, filling a README between its markers."""

import csv
import shutil
from pathlib import Path

BEGIN, END = "<!-- results: written by report.py -->", "<!-- end of results -->"


def read_runs(folder: Path, sweep: str) -> list[dict]:
    """The finished runs of a sweep, numbers as floats; with `sweep` given its csv is copied beside the report first.

    Raises:
      SystemExit: if there is no csv, or a run in it has not finished.
    """
    kept = folder / "runs.csv"
    if sweep:
        shutil.copyfile(Path(sweep) / "runs.csv", kept)
    if not kept.exists():
        raise SystemExit(f"{kept} is missing: run the sweep of README.md, then this with --sweep=FOLDER")
    with open(kept, newline="", encoding="utf-8") as file:
        rows = [{key: number(value) for key, value in row.items()} for row in csv.DictReader(file)]
    left = [row["run"] for row in rows if row["status"] != "finished"]
    if left:
        raise SystemExit(f"not finished: {', '.join(left)}; run the sweep again, it goes on")
    return rows


def number(text: str):
    """The text as a float where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def table(heads: list[str], rows: list[list]) -> str:
    """A Markdown table; floats with three significant digits."""
    shown = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *shown))


def fill(readme: Path, text: str) -> None:
    """Puts `text` between the markers of a README.

    Raises:
      SystemExit: if the markers are not there.
    """
    page = readme.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise SystemExit(f"{readme} needs the lines {BEGIN!r} and {END!r}, where the results go")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}", encoding="utf-8")
