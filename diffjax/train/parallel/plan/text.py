"""A plan as text for a person."""

from __future__ import annotations

from collections.abc import Sequence

from diffjax.train.parallel.accelerators import Accelerator
from diffjax.train.parallel.plan.plan import Plan
from diffjax.train.parallel.plan.roofline import COMPUTE_SHARE, LINK_SHARE, MEMORY_SHARE, estimate

_FOOT = f"""
Activations are what differentiation keeps in the network's own dtypes, split over all devices; the temporary memory is
that of the program for CPU, which computes bfloat16 in float32 and has no fused attention: a pessimist's figure.
Collectives are those of the partitioned program, before a back end combines or hides them; an all-reduce of which every
device keeps one slice is counted as the reduce-scatter that TPU and GPU make of it (the CPU has none).
Times assume {COMPUTE_SHARE:.0%} of the peak FLOP/s, {MEMORY_SHARE:.0%} of the memory's and {LINK_SHARE:.0%} of
the links' bandwidth. A step takes at least the largest of the three, all else hidden behind it, and at most about their
sum.
"""


def plan_text(plan: Plan, accelerators: Sequence[Accelerator]) -> str:
    """The plan, and its estimate on each of the accelerators, as tables."""
    axes = ", ".join(f"{name}={size}" for name, size in plan.mesh.items())
    text = (
        f"mesh: {axes} ({plan.devices} devices), sharding {plan.sharding!r}, batch {plan.batch_size} "
        f"({plan.rows} rows on a device at once), {plan.dtype}; compiled in {plan.seconds:.0f} s\n"
        f"parameters: {plan.parameters:,}\n"
    )
    return text + _memory(plan) + _compute(plan) + _exchanges(plan) + _times(plan, accelerators) + _FOOT


def _memory(plan: Plan) -> str:
    rows = [(name, gib(size)) for name, size in plan.state.items()]
    rows += [("activations (estimate)", gib(plan.activations)), ("together", gib(plan.needed()))]
    rows += [("temporary memory on CPU", gib(plan.temporary))]
    return "\nmemory on a device, GiB\n" + table(rows)


def _compute(plan: Plan) -> str:
    rows = [("model", si(plan.flops.model)), ("hardware", si(plan.flops.hardware))]
    rows += [("hardware, a device", si(plan.flops.hardware / plan.devices))]
    return "\noperations of a step, FLOP\n" + table(rows)


def _exchanges(plan: Plan) -> str:
    if not plan.collectives:
        return "\ncollectives of a step: none\n"
    rows = [("kind", "dtype", "group", "count", "GiB", "sent, GiB")]
    large = [row for row in plan.collectives if row.bytes >= 1e-3 * plan.collectives[0].bytes]
    for row in large:
        rows.append((row.kind, row.dtype, str(row.group), f"{row.count:,}", gib(row.bytes), gib(row.sent())))
    small = plan.collectives[len(large) :]
    if small:
        total = (
            f"{sum(r.count for r in small):,}",
            gib(sum(r.bytes for r in small)),
            gib(sum(r.sent() for r in small)),
        )
        rows.append(("smaller ones", "", "", *total))
    return "\ncollectives of a step, on a device\n" + table(rows)


def _times(plan: Plan, accelerators: Sequence[Accelerator]) -> str:
    rows = [("accelerator", "compute", "memory", "links", "step", "bound by", "images/s", "MFU", "memory used")]
    for row in accelerators:
        found = estimate(plan, row)
        rate = plan.batch_size / found.step
        mfu = plan.flops.model / plan.devices / found.step / row.peak_flops
        used = f"{plan.needed() / row.hbm:.0%}" + ("" if found.fits else " does not fit")
        times = [f"{1e3 * t:.4g}" for t in (found.compute, found.memory, found.link, found.step)]
        rows.append((row.name, *times, found.bound, f"{rate:.4g}", f"{mfu:.0%}", used))
    warning = (
        "" if plan.dtype == "bfloat16" else f"the peaks are those of bfloat16, the network computes in {plan.dtype}\n"
    )
    return "\ntime of a step, ms\n" + table(rows) + warning


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, two spaces in."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"


def gib(size: float) -> str:
    """Bytes in GiB, four digits."""
    return f"{size / 2**30:.4g}"


def si(count: float) -> str:
    """A count with four digits and the prefix of its thousands."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if count >= 10**power:
            return f"{count / 10**power:.4g} {prefix}"
    return f"{count:.4g}"
