"""The coordinate check of muP on the DiT: how far activations move in the first steps, by width.

    python benchmarks/mup.py            # writes benchmarks/results/mup.json and docs/images/mup.png; a few minutes

A DiT of depth 2 with 4 heads at every width, AdamW, one batch of noise images, mean over seeds. Under the standard
parameterisation one learning rate moves a wide network further than a narrow one; under muP the movement is flat.
"""

import argparse
import json
import os
import platform
from pathlib import Path

import jax
import jax.numpy as jnp

from diffjax.models import dit
from diffjax.train.optim import build_optimizer, with_base
from diffjax.train.optim.coordinates import movements, slopes

ROOT = Path(__file__).parent.parent
SHOWN = ("tokens", "cond", "blocks/attention/out", "blocks/mlp/out", "output")


def settings(width, scale):
    return dict(name="dit", width=width, depth=2, heads=4, num_classes=10, scan=False, attention_scale=scale)


def build(spec):
    return dit(shape=(8, 8, 1), **{key: value for key, value in spec.items() if key != "name"})


def measure(width, base, lr, steps, seeds):
    """Movements after the last step, the mean over seeds."""
    spec = settings(width, "mup" if base else "sqrt")
    model, shapes = with_base(build(spec), f"base(width={base})" if base else "", spec, build)
    config = {"name": "adamw", "lr": lr, "mup": f"base(width={base})" if base else ""}
    optimizer = build_optimizer(config, steps, base=shapes)
    x, target = jax.random.normal(jax.random.key(0), (2, 16, 8, 8, 1))
    inputs = (x, jnp.linspace(0, 1, 16), jnp.arange(16) % 10)
    keys = [jax.random.key(seed) for seed in range(seeds)]
    return movements(model, optimizer, inputs, target, steps=steps, keys=keys)


def draw(report, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (kind, title) in zip(axes, (("standard", "standard"), ("mup", "muP")), strict=True):
        rows = report["movements"][kind]
        for name in SHOWN:
            label = f"{name} ({report['slopes'][kind][name]:+.2f})"
            axis.loglog(report["widths"], [row[name] for row in rows], "o-", label=label, base=2)
        axis.set(title=f"{title} parameterisation (slope)", xlabel="width", xticks=report["widths"])
        axis.set_xticklabels(report["widths"])
        axis.minorticks_off()
        axis.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.12))
    axes[0].set_ylabel(f"RMS change after {report['steps']} steps of AdamW")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT)
    args = parser.parse_args()
    bases = {"standard": 0, "mup": args.widths[0]}
    found = {k: [measure(w, base, args.lr, args.steps, args.seeds) for w in args.widths] for k, base in bases.items()}
    report = {
        "widths": args.widths, "lr": args.lr, "steps": args.steps, "seeds": args.seeds,
        "slopes": {kind: slopes(args.widths, rows) for kind, rows in found.items()},
        "movements": found,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
    }  # fmt: skip
    (args.out / "benchmarks" / "results" / "mup.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, args.out / "docs" / "images" / "mup.png")
    for kind, values in report["slopes"].items():
        print(kind, {name: round(values[name], 2) for name in SHOWN})


if __name__ == "__main__":
    main()
