"""Methods that turn a gradient into a direction; the learning rate and weight decay come after them."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from optax import contrib

from diffjax import registry
from diffjax.train import paths

# What Muon leaves to Adam: vectors, tables that a gather reads, and the layers that touch the data.
NO_MATRIX = r"(^|/)(bias|scale|embedding)$|^(inp|out)/"


class Method(NamedTuple):
    """A method with what the settings around it need to know.

    Attributes:
      direction: its output times `-lr` is the step.
      family: `"adam"` if the size of a coordinate of the output does not depend on that of the gradient, `"sgd"` if it
        is proportional to it, `""` for neither; what muP multiplies the learning rate by depends on it.
    """

    direction: optax.GradientTransformation
    family: str


def adam(*, b1: float, b2: float, eps: float) -> Method:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980, Algorithm 1)."""
    return Method(optax.scale_by_adam(b1=b1, b2=b2, eps=eps), "adam")


def lion(*, b1: float, b2: float) -> Method:
    """The sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675, Algorithm 2); wants lr 3 to 10 times
    below Adam's."""
    return Method(optax.scale_by_lion(b1=b1, b2=b2), "adam")


def sgd(*, b1: float) -> Method:
    """Gradient descent with momentum `b1`, or without any for 0."""
    return Method(optax.trace(decay=b1) if b1 else optax.identity(), "sgd")


def rms(*, b2: float, eps: float) -> Method:
    """Adam without a first moment, and without the memory of one."""
    return Method(optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True), "adam")


def adafactor(
    *, relative: bool = True, clip_rms: float = 1.0, decay: float = 0.8, least: int = 128, momentum: float = 0.0
) -> Method:
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235, Algorithms 4 and 5): of a matrix it keeps rows + columns.

    Arrays of more axes are factored over their two longest; RMS values are over a whole array, so over all the blocks
    of a stack at once.

    Args:
      relative: multiply the update by the RMS of the parameter, at least 1e-3, as in the paper; False as in
        arXiv:2106.04560, with Adam's learning rates.
      clip_rms: the largest RMS of an update before the learning rate; 0 for no limit.
      decay: the second moment's decay at step t is `1 - t ** -decay`.
      least: an array is factored if its two longest axes are at least this long.
      momentum: of the update; 0 for none and no memory of one (paper).
    """
    parts = [optax.scale_by_factored_rms(decay_rate=decay, min_dim_size_to_factor=least)]
    parts += [optax.clip_by_block_rms(clip_rms)] if clip_rms else []
    parts += [optax.scale_by_param_block_rms()] if relative else []
    parts += [optax.ema(momentum, debias=False)] if momentum else []
    return Method(optax.chain(*parts), "")


def muon(
    *, beta: float = 0.95, ns_steps: int = 5, nesterov: bool = True, rms: float = 0.2, adam: str = NO_MATRIX,
    b1: float, b2: float, eps: float,
) -> Method:  # fmt: skip
    """Muon (Jordan et al. 2024): momentum with its singular values set near 1, for matrices; Adam for the rest.

    An array `[in, out]` is a matrix, `[depth, in, out]` a stack, `[height, width, in, out]` a convolution and so
    one matrix of `height * width * in` rows, with one more axis in front a stack of those.

    Args:
      beta: of the momentum.
      ns_steps: Newton-Schulz iterations.
      nesterov: look ahead along the momentum.
      rms: RMS of an update of full rank, `rms * sqrt(max(in, out))` times the orthogonal matrix: with 0.2 one learning
        rate and weight decay serve both methods (Liu et al. 2025, arXiv:2502.16982). 0 multiplies by
        `sqrt(max(1, out / in))` instead, as the first version did.
      adam: regex over parameter names; where it is found, and for arrays of less than two axes, Adam with `b1, b2, eps`
        takes over.
    """
    rest = re.compile(adam)

    def numbers(path, leaf):
        if leaf.ndim < 2 or rest.search(paths.name(path)):
            return None
        # Muon reads axes that are neither rows nor columns as a stack.
        first = {2: 0, 3: 1, 4: 0, 5: 1}.get(leaf.ndim, 1)
        return contrib.MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

    def labels(tree):
        name = lambda path, leaf: "adam" if numbers(path, leaf) is None else "muon"
        return jax.tree_util.tree_map_with_path(name, tree)

    def scale(path, leaf):
        into, out = math.prod(leaf.shape[axis] for axis in numbers(path, leaf).reduction_axis), leaf.shape[-1]
        return leaf * (rms * max(into, out) ** 0.5 if rms else max(1.0, out / into) ** 0.5)

    axes = lambda tree: jax.tree_util.tree_map_with_path(numbers, tree)
    scaled = lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates)
    orthogonal = optax.chain(
        contrib.scale_by_muon(ns_steps=ns_steps, beta=beta, nesterov=nesterov, weight_dimension_numbers=axes),
        optax.stateless(scaled),
    )
    return Method(optax.partition({"muon": orthogonal, "adam": optax.scale_by_adam(b1=b1, b2=b2, eps=eps)}, labels), "")


def build_method(spec: str, offered: Mapping[str, Any]) -> Method:
    """The method that `"name(arg=1)"` names; of `offered` (`b1`, `b2`, `eps`) it is given what it takes.

    A function of someone else's is either the direction alone (`"optax:scale_by_radam"`), or a whole optimiser with a
    `learning_rate` (`"optax:novograd"`), which is then built with 1 and used for its direction; so its steps must be
    proportional to the learning rate.

    Raises:
      ValueError: for an unknown name, or arguments that it does not take.
    """
    name, _, _ = registry.parse(spec)
    if ":" not in name:
        return registry.build(spec, METHODS, "optimizer", **offered)
    if "schedule_free" in name:
        raise ValueError(f"optimizer {name!r}: use 'schedule_free(base=\"adamw\")', which knows the learning rate")
    built = registry.build(spec, {}, "optimizer", learning_rate=1.0, **offered)
    if not (hasattr(built, "init") and hasattr(built, "update")):
        raise ValueError(f"optimizer {name!r} gives {type(built).__name__}, not an optax.GradientTransformation")
    whole = "learning_rate" in inspect.signature(registry.lookup(name, {}, "optimizer")).parameters
    return Method(optax.chain(built, optax.scale(-1.0)) if whole else built, "")


METHODS = {"adam": adam, "adamw": adam, "adafactor": adafactor, "lion": lion, "muon": muon, "rms": rms, "sgd": sgd}
