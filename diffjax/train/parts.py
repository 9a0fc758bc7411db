"""From a config to the objects of a run, checked abstractly: nothing is allocated."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffjax import registry
from diffjax.core.types import Head, Level, Model
from diffjax.train import checks
from diffjax.train.config import FIX, fill, naming
from diffjax.train.errors import ConfigError
from diffjax.train.monitor import writers
from diffjax.train.objectives import Objective, build_objective, network_of


class Parts(NamedTuple):
    """The objects that a config names.

    Attributes:
      dataset: `diffjax.data.Dataset`.
      augment: functions `(batch, rng) -> batch`, in order.
      schedule: `t -> Level`.
      head: `Head`.
      time: `(key, n) -> t [n]`.
      weight: `Level -> [B]`, or None for the head's own.
      model: `Model`.
      optimizer: `optax.GradientTransformation`.
      lr: `step -> learning rate`.
      ema: `{spec: Ema}`, in the config's order.
      objective: what is minimised beside the plain loss.
    """

    dataset: Any
    augment: tuple[Callable, ...]
    schedule: Any
    head: Head
    time: Callable
    weight: Callable | None
    model: Model
    optimizer: Any
    lr: Callable
    ema: dict[str, Any]
    objective: Objective = Objective()


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with every default filled in, checked key by key and built abstractly; nothing is allocated.

    Raises:
      ConfigError: for an unknown key, a wrong type, an impossible value, an unknown name, or settings that do not fit
        together (a patch that does not divide the image, a sampling grid on which the head is undefined).
    """
    return prepare(config)[0]


def prepare(config: ConfigDict) -> tuple[ConfigDict, Parts]:
    """`resolve(config)` and the objects that it names.

    Raises:
      ConfigError: as `resolve`.
    """
    resolved = fill(config)
    # Not in `assemble`: a run may be opened for inference on other devices than it was trained on.
    mesh = checks.fitting_mesh(resolved)
    parts = assemble(resolved)
    checks.check_mesh(resolved, parts, mesh)
    return resolved, parts


def assemble(config: ConfigDict, dataset: Any = None) -> Parts:
    """The objects that a filled config names; the network is only traced, no parameter is allocated.

    Args:
      config: filled.
      dataset: what `config.data` names, where it is known without opening it; see `diffjax.data.without_items`.

    Raises:
      ConfigError: for an unknown name, or settings that do not fit together.
    """
    from diffjax import core, data
    from diffjax.train import optim

    schedule = _build(config, "schedule", core.SCHEDULES)
    head = _build(config, "head", core.HEADS)
    time = _build(config, "time", core.TIMES)
    with naming("config.time"):
        checks.check_times(config, schedule, time)
    weight = _build(config, "weight", core.WEIGHTS, schedule=schedule) if config.weight else None
    objective = build_objective(config, schedule)
    _check_sampling(config, schedule, head)
    averages = {}
    for spec in config.ema:
        with naming("config.ema"):
            averages[spec] = registry.build(spec, optim.EMAS, "ema")
    with naming("config.ema_snapshots"):
        optim.snapshots.check(config.ema_snapshots, config.ema)
    opened = dataset is None
    dataset = _build(config, "data", data.SOURCES) if opened else dataset
    checks.check_guidance(config, dataset.num_classes)
    with naming("config.augment"):
        augment = tuple(registry.build(spec, data.AUGMENTS, "augmentation") for spec in config.augment)
    if opened and config.batch_size > len(dataset.train):
        raise ConfigError(
            f"config.batch_size is {config.batch_size}; it must be at most the {len(dataset.train)} training items"
            + FIX.format(path="config.batch_size")
        )
    facts = dict(shape=dataset.shape, num_classes=dataset.num_classes)
    facts |= dict(shapes=dataset.shapes) if len(dataset.shapes) > 1 else {}
    network = partial(network_of, objective, **facts)
    with naming("config.model"):
        model = network(dict(config.model))
    checks.check_time_scale(config, schedule, model)
    with naming("config.optim"):
        model, base = optim.with_base(model, config.optim.mup, dict(config.model), network)
        optimizer = optim.build_optimizer(config.optim, config.num_steps, base=base, fixed=model.fixed)
        lr = optim.build_lr(config.optim, config.num_steps)
    _check_model(config, model, dataset, optimizer)
    if config.tensorboard:
        with naming("config.tensorboard"):
            writers.require_tensorboard()
    return Parts(dataset, augment, schedule, head, time, weight, model, optimizer, lr, averages, objective)


def grid(spacing: str, schedule: Any, steps: int) -> Level:
    """The sampling grid of a spec such as `"karras(s_max=40.0)"` on a schedule: `Level[steps + 1]`.

    Raises:
      ValueError: for an unknown spacing, arguments that it does not take, or a schedule on which it has no meaning.
    """
    from diffjax.core import SPACINGS

    name, args, kwargs = registry.parse(spacing)
    fn = registry.lookup(name, SPACINGS, "spacing")
    try:
        inspect.signature(fn).bind(schedule, steps, *args, **kwargs)
    except TypeError as error:
        allowed = list(inspect.signature(fn).parameters)[2:]
        raise ValueError(f"spacing {name!r}: {error}; arguments: {', '.join(allowed) or 'none'}") from None
    return fn(schedule, steps, *args, **kwargs)


def _build(config, key, known, **offered):
    """What `config[key]` names; of `offered` it is given the arguments that it takes."""
    with naming(f"config.{key}"):
        name, _, _ = registry.parse(config[key])
        takes = inspect.signature(registry.lookup(name, known, key)).parameters
        return registry.build(config[key], known, key, **{k: v for k, v in offered.items() if k in takes})


def _check_sampling(config, schedule, head):
    """Fails now, not after the training, on a solver, spacing or grid that the network could not be used with."""
    from diffjax import sampling

    sample = config.sample
    with naming("config.sample.solver"):
        registry.build(sample.solver, sampling.SOLVERS, "solver", schedule=schedule)
    with naming("config.sample.spacing"):
        levels = grid(sample.spacing, schedule, sample.steps)
    with naming("config.sample"):
        head.check(levels)


def _check_model(config, model, dataset, optimizer):
    """Traces parameters, network and optimiser at the batch's shapes: whatever cannot fit together fails here."""
    for other in dataset.shapes[1:]:
        try:
            _trace(config, model, dataset, other)
        except Exception as error:
            raise ConfigError(
                f"config.data has batches of {len(dataset.shapes)} shapes, and config.model cannot take {other}: "
                f"{error}; choose buckets whose sides it divides, a network such as 'dit' or 'unet', or no buckets"
            ) from error
    params = _trace(config, model, dataset, dataset.shape)
    with naming("config.optim"):
        jax.eval_shape(optimizer.init, params)


def _trace(config, model, dataset, image_shape):
    """The abstract parameters of the network, applied to a batch of images of one shape."""
    shape = (config.batch_size, *image_shape)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    t = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    y = jax.ShapeDtypeStruct(shape[:1], jnp.int32) if dataset.num_classes else None

    def trace(key, x, t, y):
        params = model.init(key)
        out = model.apply(params, x, t, y, key=key)
        return params, out[0] if isinstance(out, tuple) else out

    with naming("config.model"):
        params, out = jax.eval_shape(trace, jax.eval_shape(lambda: jax.random.key(0)), x, t, y)
        if out.shape != shape:
            raise ValueError(f"the network maps {shape} to {out.shape}; it must return the shape of x")
    return params
