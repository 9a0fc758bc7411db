"""A training step of diffjax's trainer beside one of FlaxDiff's, for the same networks and batches.

    pip install --no-deps flaxdiff==0.2.11 && pip install einops termcolor rich
    python benchmarks/flaxdiff_trainer.py    # writes benchmarks/results/flaxdiff_trainer.json

The networks are those of the digits recipe, without dropout; FlaxDiff's `GeneralDiffusionTrainer` gets them as a Linen
module around the same pure function, with the same optimiser, one average and the images from memory. The losses are
not the same (EDM's here, that on the noise there), and differ by a few elementwise operations on a batch. Both trainers
run as their users would run them, in one process and in turn: while ours pauses to draw samples, every 10 steps, the
other takes its 10. A ratio above 1 says that ours is faster.

FlaxDiff's `DiffusionTrainer` cannot be measured: its step slices an array by a number that is random, which no `jit`
compiles. The one measured expects an attribute `wandb` that only a run with Weights & Biases has; it is set to None.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

from benchmarks.trainer_overhead import TURN, WINDOWS, about, config_of, summary, windows_in_turn
from diffjax.data import batches
from diffjax.runtime import set_up
from diffjax.train.parts import prepare

RESULTS = Path(__file__).parent / "results" / "flaxdiff_trainer.json"


class Labels:
    """FlaxDiff's encoder of a condition, for labels that are encoded already."""

    key = "y"

    def __init__(self, null):
        self.null = null

    def __call__(self, texts):
        return jnp.full(len(texts), self.null, jnp.int32)

    def encode_from_tokens(self, labels):
        return labels


def as_linen(model):
    """A network of diffjax as FlaxDiff takes it: its parameters are one entry of a Linen module's."""

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x, temb, y):
            return model.apply(self.param("network", model.init), x, temb, y.astype(jnp.int32))

    return Network()


def settings(name, windows):
    """The digits recipe with what both trainers can do."""
    config = config_of(name, windows)
    config.model.dropout, config.augment, config.ema = 0.0, (), config.ema[:1]
    config.optim = dict(name="adamw", lr=1e-3, clip=0.0)
    return config


def flaxdiff_steps(name, folder):
    """`run() -> milliseconds per step` over a turn of FlaxDiff's training loop."""
    from flaxdiff.inputs import ConditionalInputConfig, DiffusionInputConfig
    from flaxdiff.schedulers import CosineContinuousNoiseScheduler
    from flaxdiff.trainer import GeneralDiffusionTrainer

    config, parts = prepare(settings(name, 1))
    classes, shape = parts.dataset.num_classes, parts.dataset.shape
    condition = ConditionalInputConfig(Labels(classes), conditioning_data_key="label", pretokenized=True)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = GeneralDiffusionTrainer(
            as_linen(parts.model), optax.adamw(1e-3), CosineContinuousNoiseScheduler(),
            DiffusionInputConfig("image", shape, [condition]), jax.random.key(0), unconditional_prob=0.1,
            distributed_training=False, checkpoint_base_path=folder,
        )  # fmt: skip
    trainer.wandb = None
    step = trainer._define_train_step(config.batch_size)
    stream = batches(parts.dataset.train, config.batch_size, seed=0)
    # It expects pixels of 0 to 255.
    items = ({"image": 127.5 * (batch["image"] + 1), "label": batch["label"]} for batch in stream)
    state, rngs = trainer.state, trainer.rngstate

    def run():
        nonlocal state, rngs
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            loss, _, state, rngs = trainer.train_loop(state, step, items, TURN, 0, rngs)
            jax.block_until_ready(state)
        assert np.isfinite(loss), loss
        return 1e3 * (time.perf_counter() - start) / TURN

    return run


def measure(name, windows):
    """The row of one network."""
    with tempfile.TemporaryDirectory() as folder:
        row = summary(windows_in_turn(settings(name, windows), flaxdiff_steps(name, folder)))
    low, high = row["interval"]
    return {
        "pairs": row["pairs"],
        "flaxdiff_ms": row["other_ms"],
        "diffjax_ms": row["trainer_ms"],
        "ratio": round(1 / row["ratio"], 3),
        "interval": [round(1 / high, 3), round(1 / low, 3)],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=("dit", "unet"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if importlib.util.find_spec("flaxdiff") is None:
        parser.error("FlaxDiff is not installed: pip install --no-deps flaxdiff==0.2.11")
    set_up()
    rows = {}
    for name in arguments.networks:
        rows[name] = measure(name, WINDOWS[name])
        print(name, json.dumps(rows[name]), flush=True)
    report = about("python benchmarks/flaxdiff_trainer.py") | {"networks": rows}
    report["versions"]["flaxdiff"] = importlib.metadata.version("flaxdiff")
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
