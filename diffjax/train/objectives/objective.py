"""What a training step minimises beside the plain loss, as one value that a config names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffjax import core, registry
from diffjax.core.schedules import Learned
from diffjax.core.types import Array, Head, Level, Model, Prediction
from diffjax.train.config import naming
from diffjax.train.errors import ConfigError
from diffjax.train.objectives.conditioning import OWN, extend, self_conditioned
from diffjax.train.objectives.pairing import PAIRINGS, Pairing
from diffjax.train.objectives.schedule import levels_of, squared_for_levels
from diffjax.train.objectives.uncertainty import Uncertainty, uncertainty, weighed
from diffjax.train.objectives.variance import VARIANCES, LearnedRange, bound, check


class Objective(NamedTuple):
    """The `loss` group of a config; the default changes nothing.

    Attributes:
      space: the head in whose target the error is measured; None for the network's own, or that of the weight.
      pair: `(x0, eps) -> eps`, the noise in another order; None for the order in which it was drawn.
      self_condition: share of the steps in which the network is given its own estimate of x0.
      uncertainty: of the loss at a noise level, learned; None for none.
      variance: of a reverse step, the network's second output; None for none.
      schedule: the noise schedule that is trained, else None.
    """

    space: Head | None = None
    pair: Pairing | None = None
    self_condition: float = 0.0
    uncertainty: Uncertainty | None = None
    variance: LearnedRange | None = None
    schedule: Learned | None = None

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of what is logged beside the loss."""
        return ("uncertainty",) * bool(self.uncertainty) + ("vlb",) * bool(self.variance)

    @property
    def init(self) -> Callable[[jax.Array], dict] | None:
        """`(key) -> {name: params}`, or None for an objective without parameters."""
        own = {"uncertainty": self.uncertainty, "schedule": self.schedule}
        learned = {name: part for name, part in own.items() if part is not None}
        if not learned:
            return None
        return lambda key: {
            name: part.init(jax.random.fold_in(key, i)) for i, (name, part) in enumerate(learned.items())
        }

    def extend(self, network: Model) -> Model:
        """The network with the objective's parameters, its additional input and its additional output."""
        return extend(network, init=self.init, self_condition=self.self_condition > 0, variance=bool(self.variance))


def build_objective(config: ConfigDict, schedule: Any) -> Objective:
    """The `Objective` that `config.loss` names, or that a learned `config.schedule` asks for.

    Raises:
      ConfigError: for an unknown name, or settings that contradict each other.
    """
    loss, built = config.loss, {}
    known = {"space": core.HEADS, "pairing": PAIRINGS, "variance": VARIANCES}
    for key, names in known.items():
        with naming(f"config.loss.{key}"):
            built[key] = registry.build(loss[key], names, key) if loss[key] else None
    if built["space"] and config.weight:
        raise ConfigError(
            f"config.loss.space is {loss.space!r} and config.weight is {config.weight!r}: a weight is a factor of the "
            "error of eps; set one of them to ''"
        )
    if built["pairing"]:
        with naming("config.loss.pairing"):
            shape = jax.ShapeDtypeStruct((config.batch_size, 1), jnp.float32)
            jax.eval_shape(built["pairing"], shape, shape)
    if built["variance"]:
        with naming("config.loss.variance"):
            check(built["variance"], schedule)
    learned = schedule if isinstance(schedule, Learned) else None
    if learned and (config.weight != "elbo()" or loss.space or loss.uncertainty or loss.variance):
        raise ConfigError(
            f"config.schedule is {config.schedule!r}: a learned schedule is trained by the variational bound; set "
            "config.weight='elbo()' and leave config.loss.space, uncertainty and variance as they are"
        )
    own = uncertainty(loss.uncertainty) if loss.uncertainty else None
    return Objective(built["space"], built["pairing"], loss.self_condition, own, built["variance"], learned)


def network_of(objective: Objective, spec: Mapping, **facts) -> Model:
    """The network of a config's `model`, with the channels that the objective needs, and its parameters.

    Args:
      objective: as from `build_objective`.
      spec: `dict(name=..., ...)`.
      facts: what a network is offered: `shape` and `num_classes`.

    Raises:
      ValueError: as `registry.build`, or for a network that cannot have these channels.
    """
    from diffjax.models import MODELS

    channels = facts["shape"][-1]
    extra = {"extra_in": channels * (objective.self_condition > 0), "extra_out": channels * bool(objective.variance)}
    extra = {name: count for name, count in extra.items() if count}
    takes = inspect.signature(registry.lookup(spec["name"], MODELS, "model")).parameters
    for name in extra:
        if name not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            key = {"extra_in": "self_condition", "extra_out": "variance"}[name]
            raise ValueError(f"model {spec['name']!r} has no setting {name!r}, which config.loss.{key} needs")
    return objective.extend(registry.build(spec, MODELS, "model", **facts, **extra))


def row_loss(parts: Any) -> Callable:
    """`(params, rows, key) -> (losses [b], (plain losses [b], log-SNR [b], {term: [b]}))`, the loss of each row.

    The mean of the first is minimised; the second is the loss without what the objective makes of it. `rows` holds
    `x0`, times `t`, noise `eps`, labels `y` and, with self-conditioning, `guess`.
    """
    objective, schedule = parts.objective, parts.schedule

    def loss_fn(params, rows, key):
        x0, eps = rows["x0"], rows["eps"]

        def measure(params, level: Level, weight) -> tuple[Array, Prediction]:
            f = lambda x, t, **given: parts.model.apply(params, x, t, rows["y"], key=key, **given)
            if objective.self_condition:
                f = self_conditioned(f, parts.head, core.add_noise(x0, eps, level), level, rows["guess"])
            return core.loss(f, parts.head, x0, level, eps=eps, weight=weight, space=objective.space, predict=True)

        if objective.schedule is None:
            level = schedule(rows["t"])
            plain, prediction = measure(params, level, parts.weight)
        else:
            level, density = levels_of(objective.schedule.bind(params[OWN]["schedule"]), rows["t"])
            at = squared_for_levels(lambda params, path: measure(params, path[0], lambda _: path[1]))
            plain, prediction = at(params, (level, density))

        losses, terms = plain, {}
        if objective.uncertainty:
            u = objective.uncertainty.apply(params[OWN]["uncertainty"], level)
            losses = terms["uncertainty"] = weighed(losses, u)
        if objective.variance:
            terms["vlb"] = bound(objective.variance, schedule, prediction, x0, rows["t"])
            losses = losses + objective.variance.weight * terms["vlb"]
        return losses, (plain, level.logsnr, terms)

    return loss_fn


def trained_schedule(schedule: Any, params: Mapping) -> Any:
    """The schedule as the parameters of a run have it: itself, or a learned one bound to its own."""
    return schedule.bind(params[OWN]["schedule"]) if isinstance(schedule, Learned) else schedule
