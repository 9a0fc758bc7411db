"""What is written down about a bad step: which items it saw, and what they do to the network."""

from __future__ import annotations

import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.train import step as steps
from diffjax.train.parallel import sharding
from diffjax.train.parallel.accumulate import whole

FOLDER = "evidence"


def message(window: steps.Metrics, limit: float, saved: list[int], folder: str) -> str:
    """Which step went wrong, on what batch, what it can be repeated from, and what to try."""
    good = f"last good checkpoint: step {max(saved)} in {folder}" if saved else "no checkpoint yet"
    return (
        f"{describe(window, limit)}; {good}, nothing later was saved; lower config.optim.lr, set config.optim.clip or "
        "config.guard.on_bad, or look at the data"
    )


def describe(window: steps.Metrics, limit: float) -> str:
    """Which step of a window went wrong, and what its batch looked like."""
    b = window.batch
    labels = " ".join(f"{i}:{n}" for i, n in enumerate(b.labels[:-1]) if n) + f" null:{b.labels[-1]}"
    spiked = all(map(np.isfinite, (b.loss, b.grad_norm, b.param_norm))) and b.loss > limit
    what = f"has a loss above {limit:.4g}, config.guard.spike times its median" if spiked else "is not finite"
    return (
        f"step {int(window.bad_step) + 1} {what}: loss {b.loss:.4g}, gradient norm {b.grad_norm:.4g}, "
        f"parameter norm {b.param_norm:.4g}; "
        f"its batch: images min {b.min:.4g} mean {b.mean:.4g} max {b.max:.4g}, {100 * b.finite:.4g} % finite, "
        f"labels {labels}"
    )


def write(session: Any, state: Any, step: int, text: str, stats: steps.BatchStats) -> str:
    """The path of `evidence/step_<step>.json`, written together with a `.npz` of the batch.

    The batch is read again, and its loss and gradient are computed again, with the noise of that step, from the
    parameters at hand: those of the last good checkpoint, or, when a step was skipped, of a few steps later.

    Args:
      session: of the loop.
      state: a good state, which is left as it is.
      step: index (from 0) of the bad step.
      text: what was reported.
      stats: of the batch when it was bad.
    """
    number = session.iterator.batch_of(step)
    before = session.iterator.get_state()
    session.iterator.set_state({"next_index": number})
    batch = next(session.iterator)
    session.iterator.set_state(before)
    placed = sharding.place_batch(batch, session.mesh)
    like = state._replace(step=jnp.full_like(state.step, step))
    everywhere = sharding.replicated(session.mesh)
    run = jax.jit(probe(session.parts, session.config), out_shardings=everywhere)
    found = jax.device_get(run(like, placed))
    facts = {
        "step": step + 1,
        "message": text,
        "batch": number,
        "batch_ids": np.asarray(session.iterator.batch_ids(number)).tolist(),
        "seen": {name: np.asarray(value).tolist() for name, value in stats._asdict().items()},
        "parameters_of_step": int(state.step),
        "loss": float(np.mean(found["losses"])),
        "loss_by_logsnr": by_level(found["losses"], found["logsnr"]),
        "gradient_norm_by_module": {name: float(value) for name, value in sorted(found["norms"].items())},
    }
    path = os.path.join(session.workdir, FOLDER, f"step_{step + 1}.json")
    if jax.process_index() == 0:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        np.savez(path.removesuffix(".json") + ".npz", **batch, losses=found["losses"], logsnr=found["logsnr"])
        with open(path, "w", encoding="utf-8") as file:
            json.dump(_finite(facts), file, indent=1)
            file.write("\n")
    return path


def probe(parts: Any, config: Any):
    """`(state, batch) -> {"losses": [B], "logsnr": [B], "norms": {module: norm}}`: a step up to its gradient."""

    def run(state, batch):
        found: dict = {}

        def gradient(loss_fn):
            inner = whole(loss_fn)

            def seen(params, rows, key):
                result = inner(params, rows, key)
                _, (losses, logsnr, *_), grads = result
                norms = {name: optax.tree.norm(tree) for name, tree in _modules(grads).items()}
                found.update(losses=losses, logsnr=logsnr, norms=norms)
                return result

            return seen

        steps.make_train_step(parts, config, gradient)(state, batch)
        return found

    return run


def by_level(losses: np.ndarray, logsnr: np.ndarray) -> dict[str, float]:
    """Mean loss of the samples in each bin of log-SNR that has any."""
    ends = ("", *(f"{edge:g}" for edge in steps.LOGSNR_EDGES), "")
    bins = np.digitize(logsnr, steps.LOGSNR_EDGES)
    return {f"{ends[i]},{ends[i + 1]}": float(np.mean(losses[bins == i])) for i in np.unique(bins)}


def _modules(grads: dict) -> dict:
    """Subtrees by name: the children of `blocks` and the like one by one, every other top-level entry whole."""
    found = {}
    for name, tree in grads.items():
        nested = isinstance(tree, dict) and all(isinstance(child, dict) for child in tree.values())
        found |= {f"{name}/{key}": child for key, child in tree.items()} if nested else {name: tree}
    return found


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes its name."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
