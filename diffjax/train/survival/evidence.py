"""What is written down about a bad step: which items it saw, and what they do to the network."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax import files
from diffjax.train import step as steps
from diffjax.train.parallel import processes, sharding
from diffjax.train.parallel.accumulate import whole

log = logging.getLogger(__name__)

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


def write(session: Any, state: Any, bad: Mapping[int, str], stats: steps.BatchStats) -> list[str]:
    """The paths of `evidence/step_<step>.json`, each written together with a `.npz` of the batch.

    Each batch is read again, and its loss and gradient are computed again, with the noise of that step, from the
    parameters at hand: those of the last good checkpoint, or, when a step was skipped, of a few steps later. Evidence
    decides nothing about a run: what cannot be had is logged, and the iterator is left where it was. All processes make
    the same call.

    Args:
      session: of the loop.
      state: a good state, which is left as it is.
      bad: what was reported of each bad step, by its index (from 0).
      stats: of the batch of the first of them when it was bad.
    """
    everywhere = sharding.replicated(session.mesh)
    run = jax.jit(probe(session.parts, session.config), out_shardings=everywhere)
    paths = []
    for step, text in bad.items():
        number, batch = session.iterator.batch_of(step), None
        with _told(step):
            batch = again(session.iterator, number)
        # Who cannot read its rows must not leave the others waiting in the computation.
        if not processes.least(batch is not None):
            continue
        with _told(step):
            like = state._replace(step=jnp.full_like(state.step, step))
            found = jax.device_get(run(like, sharding.place_batch(batch, session.mesh)))
            facts = {"step": step + 1, "message": text, "batch": number}
            facts["batch_ids"] = np.asarray(session.iterator.batch_ids(number)).tolist()
            if step == next(iter(bad)):
                facts["seen"] = {name: np.asarray(value).tolist() for name, value in stats._asdict().items()}
            paths.append(store(session.workdir, facts | {"parameters_of_step": int(state.step)}, found))
    return paths


def again(iterator: Any, number: int) -> dict[str, np.ndarray]:
    """The batch of a number, read anew; the iterator is left where it was, also when that fails."""
    before = iterator.get_state()
    try:
        iterator.set_state({"next_index": number})
        return next(iterator)
    finally:
        iterator.set_state(before)


def store(workdir: str, facts: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Writes facts and what was found as `.json` and `.npz`, in the first process alone; the path of the first.

    Raises:
      OSError: disk full, folder gone or read-only.
    """
    told = dict(facts) | {
        "loss": float(np.mean(found["losses"])),
        "loss_by_logsnr": by_level(found["losses"], found["logsnr"]),
        "gradient_norm_by_module": {name: float(value) for name, value in sorted(found["norms"].items())},
    }
    path = os.path.join(workdir, FOLDER, f"step_{facts['step']}.json")
    if processes.is_first():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        arrays = found["batch"] | {"losses": found["losses"], "logsnr": found["logsnr"]}
        np.savez(path.removesuffix(".json") + ".npz", **arrays)
        files.write_text(path, json.dumps(_finite(told), indent=1) + "\n")
    return path


@contextlib.contextmanager
def _told(step: int):
    """Turns whatever goes wrong about the evidence of a step into a warning."""
    try:
        yield
    except Exception as error:
        log.warning("no evidence about step %d: %s: %s", step + 1, type(error).__name__, error)


def probe(parts: Any, config: Any):
    """`(state, batch) -> {"losses": [B], "logsnr": [B], "norms": {module: norm}, "batch": batch}`: a step up to its
    gradient."""

    def run(state, batch):
        found: dict = {"batch": batch}

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
