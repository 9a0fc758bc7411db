"""What a run leaves behind for its reader: a few lines, the same as JSON, and the curves."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from diffjax import files
from diffjax.train.monitor.clock import duration
from diffjax.train.monitor.writers import METRICS_FILE

SUMMARY_FILE, CURVES_FILE = "summary.json", "curves.png"


def summarize(workdir: str, facts: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    """A few lines about a run that has ended; writes `summary.json` and `curves.png` into its folder.

    Args:
      workdir: of the run, with its `metrics.jsonl`.
      facts: `step`, `last_step`, `batch_size`, `parameters`, `checkpoints` (saved steps), `compile_seconds`,
        `bad_items` and what else to record.
      seconds: wall clock by kind, `total` among them, of this start of the run.
    """
    from diffjax import viz

    rows = [row for row in files.read_rows(os.path.join(workdir, METRICS_FILE)) if "loss" in row]
    told = {"facts": dict(facts), "seconds": {k: round(v, 3) for k, v in seconds.items()}, **_digest(rows)}
    files.write_text(os.path.join(workdir, SUMMARY_FILE), json.dumps(told, indent=2, default=str) + "\n", tag="run")
    if len(rows) > 1 and told["loss"]:
        curves = viz.read_metrics(os.path.join(workdir, METRICS_FILE))
        viz.save(viz.loss_curves(curves), os.path.join(workdir, CURVES_FILE))
    return "\n".join(_lines(told, workdir))


def _digest(rows) -> dict[str, Any]:
    """First, last and least loss, and the medians of what is logged of speed."""
    finite = [row for row in rows if row["loss"] is not None]
    if not finite:
        return {"loss": {}, "median": {}}
    best = min(finite, key=lambda row: row["loss"])
    speed = ("images_per_s", "step_ms", "data_wait", "tflops_per_s", "mfu")
    values = {key: sorted(row[key] for row in rows if row.get(key) is not None) for key in speed}
    memory = [row["memory_gib"] for row in rows if row.get("memory_gib") is not None]
    return {
        "loss": {
            "first": finite[0]["loss"], "last": finite[-1]["loss"], "least": best["loss"], "least_at": best["step"],
        },
        "median": {key: found[len(found) // 2] for key, found in values.items() if found},
        "memory_gib": max(memory) if memory else None,
    }  # fmt: skip


def _lines(told: Mapping[str, Any], workdir: str):
    facts, seconds, speed, loss = told["facts"], told["seconds"], told["median"], told["loss"]
    total = max(seconds["total"], 1e-9)
    shares = ", ".join(f"{kind} {100 * s / total:.1f} %" for kind, s in seconds.items() if kind != "total")
    yield (
        f"step {facts['step']} of {facts['last_step']}: {facts['parameters']:,} parameters, "
        f"batch {facts['batch_size']}, {duration(total)} ({shares}) after {duration(facts['compile_seconds'])} of "
        "compiling"
    )
    if loss:
        yield (
            f"loss {loss['first']:.4g} -> {loss['last']:.4g}, least {loss['least']:.4g} "
            f"in the window that ends at step {loss['least_at']}"
        )
    if speed:
        parts = [f"{speed['images_per_s']:.4g} images/s", f"{speed['step_ms']:.4g} ms a step"]
        parts += [f"{speed['tflops_per_s']:.3g} TFLOP/s"] if "tflops_per_s" in speed else []
        parts += [f"MFU {100 * speed['mfu']:.1f} %"] if "mfu" in speed else []
        parts += [f"{told['memory_gib']:.3g} GiB at most"] if told.get("memory_gib") else []
        yield ", ".join(parts)
    if bad := facts["bad_items"]:
        yield f"items of the data that could not be read and were replaced by others: {bad}; see config.input.max_bad"
    saved = ", ".join(map(str, facts["checkpoints"])) or "none"
    yield f"checkpoints: {saved}; {os.path.join(workdir, SUMMARY_FILE)}"
