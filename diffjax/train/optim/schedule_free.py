"""Training without a schedule for the learning rate: what is evaluated is an average that the optimiser keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from optax import contrib

from diffjax.registry import parse
from diffjax.train import paths
from diffjax.train.optim.methods import Method, build_method

NAME = "schedule_free"


def base_method(spec: str, offered: Mapping[str, Any]) -> tuple[Method, float]:
    """The method inside `"schedule_free(base='adamw', power=2.0)"` and the power.

    The base has no momentum of its own: `b1` moves to the interpolation.

    Raises:
      ValueError: for arguments of another name, or a base that does not exist.
    """
    _, args, given = parse(spec)
    settings = {"base": "adamw", "power": 2.0} | given
    if args or len(settings) > 2:
        raise ValueError(f"{spec!r}: expected {NAME}(base='adamw', power=2.0), arguments by name")
    base = settings["base"].strip()
    base = {"adam": "rms", "adamw": "rms"}.get(base, base)
    return build_method(base, {**offered, "b1": 0.0}), float(settings["power"])


def schedule_free(
    inner: optax.GradientTransformation, lr: Callable, *, b1: float, power: float = 2.0
) -> optax.GradientTransformationExtraArgs:
    """Schedule-free training (Defazio et al. 2024, arXiv:2405.15682, Algorithm 1 for AdamW as `inner`).

    `inner` moves z by the gradient at y, x is the mean of all z weighted by the learning rate to `power`, and
    `y = (1 - b1) z + b1 x` are the parameters of the training; `evaluation_params` gives x. The state holds z.

    Args:
      inner: an optimiser without momentum, learning rate and sign included.
      lr: `step (0, 1, ...) -> float`, the same as in `inner`; for the weights of the mean.
      b1: share of x in y, in `(0, 1)`.
      power: of the learning rate in the weights, so that a warm-up hardly counts.

    Raises:
      ValueError: if `b1` is 0, from which x cannot be computed.
    """
    if not b1 > 0:
        raise ValueError(f"optim b1 {b1!r}: {NAME} needs 0 < b1 < 1, such as 0.9")
    # Its count starts at 1.
    return contrib.schedule_free(inner, lambda count: lr(count - 1), b1=b1, weight_lr_power=power)


def evaluation_params(opt_state: Any, params: Any) -> Any:
    """The parameters to evaluate: schedule-free's average x if that trains them, else `params` themselves. Jittable."""
    found = _states(opt_state)
    if not found:
        return params
    ((_, state),) = found
    return average(params, state.z, state.b1)


def average(y: Any, z: Any, b1: Any) -> Any:
    """x of `y = (1 - b1) z + b1 x`, by name; parameters that `z` lacks, as they were frozen, stay as they are."""
    moving = paths.named_leaves(z)

    def leaf(path, y):
        if paths.name(path) not in moving:
            return y
        state = contrib.ScheduleFreeState(b1, None, None, None, None, moving[paths.name(path)])
        return contrib.schedule_free_eval_params(state, y)

    return jax.tree_util.tree_map_with_path(leaf, y)


def where_z_is(opt_state: Any) -> str | None:
    """The name of the subtree of an optimiser's state that holds z, as `"1/z"`; None if it is not schedule-free."""
    found = _states(opt_state)
    return f"{paths.name(found[0][0])}/z" if found else None


def _states(opt_state):
    is_state = lambda node: isinstance(node, contrib.ScheduleFreeState)
    leaves = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_state)
    return [(path, node) for path, node in leaves if is_state(node)]
