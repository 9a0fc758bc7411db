"""How the cost of a step grows with devices: plans of one config on meshes of 8 to 512 devices that are not here.

    python benchmarks/plan_scaling.py    # writes benchmarks/results/plan_scaling.json, docs/images/plan_scaling.png

The batch stays the same, the parameters are split over all devices (`sharding="rules"` on the axis `fsdp`), and the
times are rooflines: see `diffjax.train.parallel.plan`. Nothing is measured but the compilation.
"""

import argparse
import json
import platform
from pathlib import Path

import jax

import diffjax as dj
from diffjax.train import config as configs
from diffjax.train.parallel.accelerators import accelerator
from diffjax.train.parallel.plan import estimate, plan

HERE = Path(__file__).parent
SIZES = (8, 16, 32, 64, 128, 256, 512)


def measure(path, name, sizes):
    rows = []
    for n in sizes:
        found = plan(configs.load(path), f"fsdp={n},tensor=1", sharding="rules")
        time = estimate(found, accelerator(name))
        rows.append(
            {
                "devices": n,
                "state_gib": round(sum(found.state.values()) / 2**30, 3),
                "activations_gib": round(found.activations / 2**30, 3),
                "sent_gib": round(sum(row.sent() for row in found.collectives) / 2**30, 3),
                "collectives": sum(row.count for row in found.collectives),
                "compute_ms": round(1e3 * time.compute, 2),
                "memory_ms": round(1e3 * time.memory, 2),
                "link_ms": round(1e3 * time.link, 2),
                "step_ms": round(1e3 * time.step, 2),
                "fits": time.fits,
                "compile_s": round(found.seconds, 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


def draw(report, out):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, chip = report["rows"], accelerator(report["accelerator"])
    n = [row["devices"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for key, label, marker in (
        ("compute_ms", "compute", "o"), ("link_ms", "links", "s"), ("memory_ms", "memory", "^"),
    ):  # fmt: skip
        left.plot(n, [row[key] for row in rows], marker=marker, label=label)
    left.set(xscale="log", yscale="log", xlabel="devices", ylabel="ms a step", title="Time, each part by itself")
    for key, label, marker in (("state_gib", "state and gradients", "o"), ("activations_gib", "activations", "s")):
        right.plot(n, [row[key] for row in rows], marker=marker, label=label)
    right.axhline(chip.hbm / 2**30, color="black", linestyle="--", linewidth=1, label="memory of a device")
    right.set(xscale="log", yscale="log", xlabel="devices", ylabel="GiB on a device", title="Memory")
    for axes in (left, right):
        axes.set_xticks(n, [str(k) for k in n], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(f"{report['config']}, batch {report['batch_size']}, on {report['accelerator']}")
    figure.savefig(out, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/dit_12b.py")
    parser.add_argument("--accelerator", default="tpu_v5p")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="only these; other rows are kept")
    parser.add_argument("--draw", action="store_true", help="only draw what the file holds")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "plan_scaling.json")
    parser.add_argument("--image", type=Path, default=HERE.parent / "docs" / "images" / "plan_scaling.png")
    arguments = parser.parse_args()
    if not arguments.draw:
        kept = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
        rows = {row["devices"]: row for row in kept}
        rows |= {row["devices"]: row for row in measure(arguments.config, arguments.accelerator, arguments.sizes)}
        report = {
            "command": "python benchmarks/plan_scaling.py",
            "config": arguments.config,
            "accelerator": arguments.accelerator,
            "batch_size": int(configs.fill(configs.load(arguments.config)).batch_size),
            "versions": {"python": platform.python_version(), "jax": jax.__version__, "diffjax": dj.__version__},
            "rows": [rows[n] for n in sorted(rows)],
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    draw(json.loads(arguments.out.read_text()), arguments.image)


if __name__ == "__main__":
    main()
