"""A whole training step beside PyTorch's, in one run: the same networks, batches and optimiser, float32, two threads.

    python benchmarks/train_step.py --oracle .venv-oracle/bin/python    # writes benchmarks/results/train_step.json

A step draws times, noise and label dropout, computes the flow-matching loss and its gradient, and updates AdamW and an
average of the parameters. Ours is the compiled step of the trainer, with the metrics that it adds up; PyTorch's is
eager (`train_step_torch.py`), with fused AdamW, its own attention and channels-last convolutions. Both networks start
from the same parameters and must agree on a batch. Rounds alternate between the two; a time is the median over rounds
of the median over steps, `ratio` the median over rounds of PyTorch's time over ours.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

THREADS = 2
# XLA makes as many threads as there are cores it may run on.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:THREADS]))

from diffjax.runtime import keep_freed_memory  # noqa: E402

keep_freed_memory()

import jax  # noqa: E402
import numpy as np  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from processes import Peer  # noqa: E402

import diffjax as dj  # noqa: E402
from diffjax.train import paths  # noqa: E402
from diffjax.train.parallel import sharding  # noqa: E402
from diffjax.train.parts import prepare  # noqa: E402
from diffjax.train.setup import compile_step  # noqa: E402
from diffjax.train.state import abstract_state, init_state  # noqa: E402

HERE = Path(__file__).parent
NETWORKS = {
    # The blocks of DiT-S at the tokens of its ImageNet latents; fewer of them.
    "dit": dict(
        shape=(32, 32, 4), batch=8, model=dict(name="dit", patch=2, width=384, depth=4, heads=6, scan=False)
    ),
    "unet": dict(
        shape=(32, 32, 3), batch=16,
        model=dict(name="unet", width=64, mults=(1, 2), blocks=1, attention=(16,), head_width=64, groups=32),
    ),
}  # fmt: skip
SMOKE = {
    "dit": dict(shape=(8, 8, 4), batch=4, model=dict(name="dit", patch=2, width=32, depth=2, heads=2, scan=False)),
    "unet": dict(
        shape=(8, 8, 3), batch=4,
        model=dict(name="unet", width=16, mults=(1, 2), blocks=1, attention=(4,), head_width=16, groups=8),
    ),
}  # fmt: skip
OPTIM = dict(lr=1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
CLASSES = 10


class Ours:
    """The compiled step of the trainer on one batch."""

    def __init__(self, setting):
        given = dict(
            data=f"synthetic(shape={setting['shape']}, num_classes={CLASSES})", batch_size=setting["batch"],
            schedule="flow()", head="flow", time="uniform()", model=setting["model"],
            optim=dict(OPTIM, name="adamw", clip=0.0), ema=("decay(0.9999)",),
        )  # fmt: skip
        self.config, self.parts = prepare(ConfigDict(given))
        mesh = sharding.make_mesh(sharding.parse_mesh("data=1"), devices=jax.devices()[:1])
        where = sharding.state_sharding(mesh, abstract_state(self.parts), self.parts.model.rules, "data")
        rng = np.random.default_rng(0)
        state = jax.jit(lambda key: init_state(self.parts, key))(jax.random.key(0))
        # The output and the gates start at zero, which hides everything behind them.
        moved = lambda p: p + 0.02 * rng.standard_normal(p.shape).astype(np.float32)
        params = jax.tree.map(moved, state.params)
        self.params = {name: np.array(leaf) for name, leaf in paths.named_leaves(params).items()}
        self.batch = {
            "image": rng.standard_normal((setting["batch"], *setting["shape"])).astype(np.float32),
            "label": rng.integers(0, CLASSES, setting["batch"]).astype(np.int32),
        }
        self.fixed = (
            rng.standard_normal(self.batch["image"].shape).astype(np.float32),
            rng.uniform(size=setting["batch"]).astype(np.float32),
        )
        self.output = np.asarray(self.parts.model.apply(params, *self.fixed, self.batch["label"]))
        start = time.perf_counter()
        self.step_fn, empty, _ = compile_step(self.config, self.parts, mesh, where)
        self.compile_s = time.perf_counter() - start
        self.state, self.window = sharding.place(state._replace(params=params), where), empty()
        self.placed = sharding.place_batch(self.batch, mesh)

    def time(self, steps):
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            self.state, self.window = self.step_fn(self.state, self.window, self.placed)
            jax.block_until_ready(self.state)
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def job(self, folder):
        """What the other side needs to be the same."""
        file = os.path.join(folder, "job.npz")
        x, t = self.fixed
        np.savez(file, x=x, t=t, **self.batch, **{f"param:{name}": leaf for name, leaf in self.params.items()})
        model = {key: list(v) if isinstance(v, tuple) else v for key, v in self.parts.model.config.items()}
        rest = dict(num_classes=CLASSES, label_dropout=float(self.config.label_dropout), **OPTIM)
        return dict(
            file=file, output=os.path.join(folder, "out.npy"), model=model, shape=self.batch["image"].shape, **rest
        )


def measure(setting, peer, rounds, steps):
    """The row of one network."""
    ours = Ours(setting)
    row = {
        "batch_size": setting["batch"],
        "shape": setting["shape"],
        "model": setting["model"],
        "parameters": sum(leaf.size for leaf in ours.params.values()),
        "compile_s": round(ours.compile_s, 2),
    }
    if peer:
        with tempfile.TemporaryDirectory() as folder:
            job = ours.job(folder)
            answer = peer.ask(job)
            apart = float(np.max(np.abs(np.load(job["output"]) - ours.output)))
        if answer["parameters"] != row["parameters"] or apart > 1e-3 * np.std(ours.output):
            raise RuntimeError(f"the networks differ: {answer['parameters']} parameters, outputs {apart:.2g} apart")
        row |= {"torch": answer["torch"], "outputs_apart": float(f"{apart:.2g}")}
    ours.time(2), peer and peer.ask({"steps": 2})
    pairs = [(ours.time(steps), peer.ask({"steps": steps})["ms"] if peer else None) for _ in range(rounds)]
    row["diffjax_ms"] = round(statistics.median(a for a, _ in pairs), 2)
    if peer:
        row["torch_ms"] = round(statistics.median(b for _, b in pairs), 2)
        row["ratio"] = round(statistics.median(b / a for a, b in pairs), 3)
        row["ratios"] = [round(b / a, 3) for a, b in pairs]
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", help="a Python with PyTorch; without it only our side is timed")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--smoke", action="store_true", help="tiny networks; writes nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "train_step.json")
    arguments = parser.parse_args()
    torch = arguments.oracle, str(HERE / "train_step_torch.py"), str(THREADS)
    peer = Peer(*torch) if arguments.oracle else None
    settings = SMOKE if arguments.smoke else NETWORKS
    rows = {}
    for name in arguments.networks:
        rows[name] = measure(settings[name], peer, arguments.rounds, arguments.steps)
        print(name, json.dumps(rows[name]), flush=True)
    if peer:
        peer.close()
    report = {
        "command": "python benchmarks/train_step.py --oracle .venv-oracle/bin/python",
        "device": f"{jax.devices()[0].device_kind}, {THREADS} of {os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "diffjax": dj.__version__},
        "networks": rows,
    }
    if not arguments.smoke:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
