"""Regex rules over parameter names: factors of weight decay and of the learning rate, and freezing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffjax.train import paths


def decayed_weights(weight_decay: float, rules: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Adds `weight_decay * factor * param` to each update, the factor of the first rule that matches the name.

    Args:
      weight_decay: the common coefficient.
      rules: `[(regex, factor), ...]`; they must cover every parameter.

    Raises:
      ValueError: from `init` and `update`, if a parameter is covered by no rule, or `params` is not given.
    """

    def init(params):
        factors(rules, params, "decay")
        return optax.EmptyState()

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("weight decay needs the parameters: call update(grads, state, params)")
        table = factors(rules, params, "decay")
        return jax.tree.map(lambda u, f, p: u + weight_decay * f * p, updates, table, params), state

    return optax.GradientTransformation(init, update)


def scaled_by_rules(rules: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiplies each update by the factor of the first rule that matches the parameter's name.

    Args:
      rules: `[(regex, factor), ...]`; they must cover every parameter.

    Raises:
      ValueError: from `init` and `update`, if a parameter is covered by no rule.
    """

    def init(params):
        factors(rules, params, "lr")
        return optax.EmptyState()

    def update(updates, state, params=None):
        return jax.tree.map(lambda u, f: u * f, updates, factors(rules, updates, "lr")), state

    return optax.GradientTransformation(init, update)


def frozen(inner: optax.GradientTransformation, patterns: Sequence[str]) -> optax.GradientTransformationExtraArgs:
    """`inner` over the parameters that none of `patterns` is found in; the others keep their bits and have no moments.

    What `inner` measures over all parameters, such as the global norm of a clip, it measures over those it is given.
    Numbers below the normal range of their type are no exception to what XLA does with them: it may flush them to zero.

    Args:
      inner: any optimiser.
      patterns: regexes over names `"a/b/c"`, each of which must be found in one at least.

    Raises:
      ValueError: from `init`, for a pattern that is found in no name, or if nothing is left to train.
    """
    compiled = [re.compile(pattern) for pattern in patterns]

    def trained(tree):
        keep = lambda path, _: not any(regex.search(paths.name(path)) for regex in compiled)
        return jax.tree_util.tree_map_with_path(keep, tree)

    masked = optax.masked(inner, trained)

    def init(params):
        names = list(paths.named_leaves(params))
        for regex in compiled:
            if not any(regex.search(name) for name in names):
                some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise ValueError(f"optim freeze {regex.pattern!r} is found in no parameter's name; names: {some}")
        if not any(jax.tree.leaves(trained(params))):
            raise ValueError(f"optim freeze {list(patterns)!r} leaves no parameter to train; remove a pattern")
        return masked.init(params)

    def update(updates, state, params=None, **extra):
        moved, state = masked.update(updates, state, params, **extra)
        # -0.0 is the one number that leaves every float, 0.0 and -0.0 among them, as it is when it is added.
        still = lambda keep, u: u if keep else jnp.full_like(u, -0.0)
        return jax.tree.map(still, trained(updates), moved), state

    return optax.GradientTransformationExtraArgs(init, update)


def factors(rules: Sequence[tuple[str, float]], tree: Any, kind: str) -> Any:
    """A tree like `tree` with the factor of the first rule that matches each leaf's name.

    Raises:
      ValueError: as `paths.match`.
    """
    table = paths.match(rules, paths.named_leaves(tree), kind)
    return jax.tree_util.tree_map_with_path(lambda path, _: table[paths.name(path)], tree)
