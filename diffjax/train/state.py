"""The state of a training run, and a finished or running one opened for inference."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffjax import registry
from diffjax.core.types import Head, Model
from diffjax.train import paths
from diffjax.train.checkpoint.params import CHECKPOINTS, RAW
from diffjax.train.errors import ConfigError
from diffjax.train.objectives import trained_schedule
from diffjax.train.optim import schedule_free, snapshots
from diffjax.train.parts import Parts, assemble
from diffjax.train.survival.workdir import read_config, read_data_facts


class TrainState(NamedTuple):
    """Everything that the next update depends on, apart from the data; randomness is `fold_in(key(seed), step)`.

    Attributes:
      step: updates done, int32 [].
      params: nested dict of float32 arrays.
      ema: `{spec: params}`, one running average of the parameters per entry of `config.ema`.
      opt_state: the optimiser's own pytree.
    """

    step: jax.Array
    params: dict
    ema: dict[str, dict]
    opt_state: Any


class Run(NamedTuple):
    """A trained network with what is needed to sample from it and to judge it.

    Attributes:
      config: the resolved config that it was trained with.
      dataset: `diffjax.data.Dataset`; without its items where they were not asked for.
      model: `Model`.
      params: the averaged (or raw) parameters, a nested dict.
      schedule: `t -> Level`.
      head: what the network's output means.
      step: updates done, an int.
      ema: which average `params` are, or `"raw"`.
    """

    config: ConfigDict
    dataset: Any
    model: Model
    params: dict
    schedule: Any
    head: Head
    step: int
    ema: str = RAW


def init_state(parts: Parts, key: jax.Array) -> TrainState:
    """The state before the first update; jittable. Averages start at the parameters.

    Args:
      parts: what the config names.
      key: the run's key, `jax.random.key(seed)`.
    """
    return start_state(parts, init_params(parts, key))


def init_params(parts: Parts, key: jax.Array) -> dict:
    """The network's own first parameters of a run with that key; jittable."""
    # Update i draws from fold_in(key, i); the largest 32-bit number is a stream that no update reaches.
    return parts.model.init(jax.random.fold_in(key, np.uint32(2**32 - 1)))


def start_state(parts: Parts, params: dict) -> TrainState:
    """The state before the first update of a run that starts from `params`; jittable."""
    copies = {spec: average.init(params) for spec, average in parts.ema.items()}
    return TrainState(jnp.zeros((), jnp.int32), params, copies, parts.optimizer.init(params))


def abstract_state(parts: Parts) -> TrainState:
    """Shapes and dtypes of the state, `jax.ShapeDtypeStruct` leaves; nothing is allocated."""
    return jax.eval_shape(lambda: init_state(parts, jax.random.key(0)))


def load_run(
    workdir: str, *, ema: str | None = None, step: int | str | None = None, data: str | None = None, items: bool = True
) -> Run:
    """Opens a run for inference.

    Args:
      workdir: what `diffjax train --workdir` was given.
      ema: which average, one of `config.ema`; `"raw"` for the parameters themselves; `"schedule_free"` for those that
        such an optimiser evaluates; `"posthoc(std=0.07)"` for a power-function average that was not tracked, rebuilt
        from the run's `ema_snapshots`, for the step of any of them. Default the first average, else
        `"schedule_free"`, else `"raw"`.
      step: which checkpoint; default the newest readable one. `"best"` is the one with the lowest mean training loss
        since the checkpoint before it, of the raw parameters as they were trained: not of the average, nor on held-out
        data.
      data: the same data where they lie now, if `config.data` no longer finds them.
      items: whether the images themselves are needed. Without them, and without `data`, the run's own note of what it
        was trained on is enough where there is one, and the `dataset` has None for its sources.

    Raises:
      ConfigError: if there is no run, no such average or no such checkpoint.
    """
    from diffjax.train.checkpoint import open_checkpoints

    config = read_config(workdir)
    config.data = data or config.data
    chosen = choose_ema(config, ema)
    parts = assemble(config, None if items or data else read_data_facts(workdir, config))
    run = Run(config, parts.dataset, parts.model, {}, parts.schedule, parts.head, 0, chosen)
    if snapshots.is_posthoc(chosen):
        try:
            at, found = snapshots.rebuild(workdir, config.ema, chosen, step)
        except ValueError as error:
            raise ConfigError(f"{workdir!r}: {error}") from error
        return opened(run, jax.tree.map(jnp.asarray, fit(parts, found)), at)
    checkpoints = open_checkpoints(os.path.join(workdir, CHECKPOINTS), keep=config.keep, best_metric="loss")
    steps = checkpoints.steps()
    if step == "best" and steps:
        # None, where no checkpoint has a score, would mean the newest below.
        step = checkpoints.best_step() or "best"
    if not steps or step not in (None, *steps):
        asked = "no checkpoint yet" if step is None else f"no checkpoint of step {step}"
        raise ConfigError(
            f"{workdir!r} holds {asked}; saved steps: {', '.join(map(str, steps)) or 'none'}; "
            "one is written every config.checkpoint_every steps and at the end"
        )
    at, found = checkpoints.restore_part("params" if chosen in (RAW, schedule_free.NAME) else f"ema/{chosen}", step)
    if chosen == schedule_free.NAME:
        where = schedule_free.where_z_is(abstract_state(parts).opt_state)
        found = schedule_free.average(found, checkpoints.restore_part(f"opt_state/{where}", at)[1], config.optim.b1)
    return opened(run, fit(parts, found), at)


def opened(run: Run, params: dict, step: int) -> Run:
    """The run with these parameters, and the schedule as they have it."""
    return run._replace(params=params, step=step, schedule=trained_schedule(run.schedule, params))


def fit(parts: Parts, found: dict) -> dict:
    """The arrays of `found` in the structure that the model's own parameters have, matched by name.

    Raises:
      ValueError: if names or shapes differ: the code of the network has changed since.
    """
    like, found = abstract_state(parts).params, paths.named_leaves(found)
    wanted = paths.named_leaves(like)
    wrong = sorted(set(wanted) ^ set(found)) or [n for n in wanted if wanted[n].shape != found[n].shape]
    if wrong:
        raise ValueError(f"the checkpoint does not fit the network, whose code has changed since: {', '.join(wrong)}")
    return jax.tree_util.tree_map_with_path(lambda path, _: found[paths.name(path)], like)


def choose_ema(config: ConfigDict, ema: str | None) -> str:
    """The key of the average to use: `ema` if the config has it or it can be made, the first one that it has for None.

    Raises:
      ConfigError: for an average that the run does not keep.
    """
    free = registry.parse(config.optim.name)[0] == schedule_free.NAME
    known = (*config.ema, *([schedule_free.NAME] if free else []), RAW)
    if ema is None:
        return known[0]
    if ema not in known and not snapshots.is_posthoc(ema):
        more = ", and 'posthoc(std=...)'" if config.ema_snapshots else ""
        hint = registry.nearest(ema, known)
        raise ConfigError(f"unknown ema {ema!r}; this run keeps: {', '.join(known)}{more}{hint}")
    return ema
