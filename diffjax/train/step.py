"""One training step, a pure function of the state and the batch, and the metrics that it adds up on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from diffjax.train.objectives import row_loss
from diffjax.train.parallel.accumulate import Gradient, RowLoss, whole
from diffjax.train.parts import Parts
from diffjax.train.state import TrainState

# Inner edges of the bins of log-SNR in which the loss is reported; the outer two bins are open.
LOGSNR_EDGES = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
NEVER = np.iinfo(np.int32).max


class BatchStats(NamedTuple):
    """What a message about a bad batch needs: `min`, `max`, `mean` over its finite pixels, `finite` (the fraction of
    pixels that are), `labels [num_classes + 1]` (how many of each after dropout, the last is the null class), and what
    it gave: the mean `loss`, `grad_norm`, and `param_norm` after the update."""

    min: jax.Array
    max: jax.Array
    mean: jax.Array
    finite: jax.Array
    labels: jax.Array
    loss: jax.Array
    grad_norm: jax.Array
    param_norm: jax.Array


class Metrics(NamedTuple):
    """Metrics of one step, or summed over a window of steps.

    Attributes:
      steps: how many, int32.
      loss: sum over steps of the mean loss, before the objective makes anything else of it.
      terms: the same of what the objective adds, by name.
      bin_loss: [8] sum of the losses of the samples in each bin of log-SNR.
      bin_count: [8] how many samples that was.
      grad_norm: sum of the global norms of the gradient, before clipping.
      update_norm: sum of the global norms of what was added to the parameters.
      param_norm: global norm of the parameters after the last step.
      bad_step: index (from 0) of the first step whose loss, gradient or parameters are not finite, else `NEVER`.
      batch: that step's batch, else that of the last step.
      guard: `diffjax.train.survival.guard.Guard` of a window under `config.guard`, else empty.
    """

    steps: jax.Array
    loss: jax.Array
    terms: dict[str, jax.Array]
    bin_loss: jax.Array
    bin_count: jax.Array
    grad_norm: jax.Array
    update_norm: jax.Array
    param_norm: jax.Array
    bad_step: jax.Array
    batch: BatchStats
    guard: Any = ()


def make_train_step(
    parts: Parts, config: ConfigDict, gradient: Callable[[RowLoss], Gradient] = whole
) -> Callable[[TrainState, dict], tuple[TrainState, Metrics]]:
    """`train_step(state, batch) -> (state, metrics)`, pure and jittable.

    The batch is `{"image": [B, H, W, C], "label": [B] int}`. Update i draws all its randomness (noise levels, noise,
    label dropout, network dropout) from `fold_in(key(config.seed), i)`, so it is the same in a resumed run. `gradient`
    says how the gradient of a loss over rows is computed: at once, in microbatches, on several devices.
    """
    num_classes = parts.dataset.num_classes

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        # Named streams: adding one later must not change the others.
        keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(("time", "noise", "label", "net", "guess"))}
        rows = _drawn(parts, config.label_dropout, batch, keys)
        total, (losses, logsnr, terms), grads = gradient(row_loss(parts))(state.params, rows, keys["net"])
        loss, y = jnp.mean(losses), rows["y"]
        updates, opt_state = parts.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        ema = {spec: parts.ema[spec].update(average, params, step) for spec, average in state.ema.items()}

        grad_norm, param_norm = optax.tree.norm(grads), optax.tree.norm(params)
        finite = jnp.isfinite(loss) & jnp.isfinite(jnp.mean(total)) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
        bins = jnp.digitize(logsnr, jnp.asarray(LOGSNR_EDGES))
        count = jax.nn.one_hot(bins, len(LOGSNR_EDGES) + 1)
        metrics = Metrics(
            steps=jnp.ones((), jnp.int32),
            loss=loss,
            terms={name: jnp.mean(values) for name, values in terms.items()},
            bin_loss=jnp.dot(losses, count, precision=jax.lax.Precision.HIGHEST),
            bin_count=jnp.sum(count, axis=0),
            grad_norm=grad_norm,
            update_norm=optax.tree.norm(updates),
            param_norm=param_norm,
            bad_step=jnp.where(finite, NEVER, state.step),
            batch=batch_stats(batch["image"], y, num_classes)._replace(
                loss=loss, grad_norm=grad_norm, param_norm=param_norm
            ),
        )
        return TrainState(step, params, ema, opt_state), metrics

    return train_step


def _drawn(parts, label_dropout, batch, keys):
    """The rows of a loss, with all that is random drawn for the whole batch: whoever computes a part of it computes
    the same."""
    x0, num_classes, objective = batch["image"], parts.dataset.num_classes, parts.objective
    eps = jax.random.normal(keys["noise"], x0.shape, jnp.promote_types(x0.dtype, jnp.float32))
    y = drop_labels(keys["label"], batch["label"], label_dropout, num_classes) if num_classes else None
    rows = {"x0": x0, "t": parts.time(keys["time"], len(x0)), "eps": eps, "y": y}
    if objective.pair:
        rows["eps"] = objective.pair(x0, eps)
    if objective.self_condition:
        rows["guess"] = jnp.tile(jax.random.bernoulli(keys["guess"], objective.self_condition), len(x0))
    return rows


def drop_labels(key: jax.Array, label: jax.Array, rate: float, num_classes: int) -> jax.Array:
    """Labels [B] int32 with each replaced by the null class, `num_classes`, with probability `rate`.

    Ho and Salimans 2022, arXiv:2207.12598, Algorithm 1.
    """
    return jnp.where(jax.random.bernoulli(key, rate, label.shape), num_classes, label).astype(jnp.int32)


def batch_stats(x, y, num_classes: int) -> BatchStats:
    """`BatchStats` of images [B, ...] and labels [B] (or None), without what the step gave."""
    x = x.astype(jnp.float32)
    ok = jnp.isfinite(x)
    count = jnp.maximum(jnp.sum(ok), 1)
    labels = jnp.zeros(num_classes + 1, jnp.int32)
    return BatchStats(
        min=jnp.min(x, initial=jnp.inf, where=ok),
        max=jnp.max(x, initial=-jnp.inf, where=ok),
        mean=jnp.sum(x, where=ok) / count,
        finite=jnp.mean(ok.astype(jnp.float32)),
        labels=labels if y is None else labels.at[y].add(1),
        loss=None,
        grad_norm=None,
        param_norm=None,
    )


def empty_window(num_classes: int, terms: tuple[str, ...] = ()) -> Metrics:
    """The window before its first step; `terms` are those of the objective."""
    zero = np.zeros((), np.float32)
    bins = np.zeros(len(LOGSNR_EDGES) + 1, np.float32)
    stats = BatchStats(zero, zero, zero, zero, np.zeros(num_classes + 1, np.int32), zero, zero, zero)
    added, never = {name: zero for name in terms}, np.array(NEVER, np.int32)
    return Metrics(np.zeros((), np.int32), zero, added, bins, bins, zero, zero, zero, never, stats)


def add(window: Metrics, metrics: Metrics) -> Metrics:
    """The window with one more step in it; once a step was bad, its batch is the one that stays."""
    summed = jax.tree.map(jnp.add, window, metrics)
    bad = window.bad_step != NEVER
    batch = jax.tree.map(lambda old, new: jnp.where(bad, old, new), window.batch, metrics.batch)
    first = jnp.minimum(window.bad_step, metrics.bad_step)
    return summed._replace(param_norm=metrics.param_norm, bad_step=first, batch=batch)


def with_window(train_step: Callable) -> Callable:
    """`(state, window, batch) -> (state, window)`: a step that adds its metrics to those of the window, on the device.

    The host then fetches one small tree per window, not one per step.
    """

    def step(state, window, batch):
        state, metrics = train_step(state, batch)
        return state, add(window, metrics)

    return step


def scalars(window: Metrics) -> dict[str, float]:
    """What is logged of a fetched window: means over its steps, and over the samples in each bin of log-SNR."""
    steps = max(int(window.steps), 1)
    ends = ("", *(f"{edge:g}" for edge in LOGSNR_EDGES), "")
    bins = [f"{lo},{hi}" for lo, hi in zip(ends, ends[1:], strict=False)]
    values = {
        "loss": float(window.loss) / steps,
        "grad_norm": float(window.grad_norm) / steps,
        "update_norm": float(window.update_norm) / steps,
        "param_norm": float(window.param_norm),
    }
    values |= {name: float(total) / steps for name, total in window.terms.items()}
    for name, total, count in zip(bins, window.bin_loss, window.bin_count, strict=True):
        if count:
            values[f"loss_logsnr[{name}]"] = float(total / count)
    return values
