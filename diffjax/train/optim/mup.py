"""Maximal update parameterisation: settings tuned on a narrow network hold on a wide one of the same depth.

Yang et al. 2022, arXiv:2203.03466, Table 3; Zheng et al. 2025, arXiv:2505.15270, show that it holds for diffusion
transformers as it stands. A dimension is a width if it differs between the network and a base network; nothing else
about the architecture is known here. Arrays are read as `[..., in, out]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffjax import registry
from diffjax.core.types import Model
from diffjax.train import paths

DRAWS = 16


class Growth(NamedTuple):
    """How much wider than in the base network the two sides of an array are.

    Attributes:
      fan_in: ratio of the second to last axis; 1 for vectors and where both networks have the same.
      fan_out: ratio of the last axis.
    """

    fan_in: float
    fan_out: float

    @property
    def role(self) -> str:
        """`"hidden"` (both sides grow), `"input"` (with vectors and tables), `"output"`, or `"fixed"`."""
        return {
            (True, True): "hidden",
            (True, False): "output",
            (False, True): "input",
            (False, False): "fixed",
        }[self.fan_in != 1, self.fan_out != 1]


def base_settings(spec: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the base network: those of `model` with what `"base(width=64, heads=1)"` changes.

    Raises:
      ValueError: for another form, or for a setting that the two share by necessity.
    """
    name, args, changes = registry.parse(spec)
    if name != "base" or args or not changes:
        raise ValueError(f"optim mup {spec!r}: expected the settings of the base network, as in 'base(width=64)'")
    if "depth" in changes or "name" in changes:
        raise ValueError(f"optim mup {spec!r}: the base network has the same name and depth; give widths and heads")
    return {**model, **changes}


def with_base(
    model: Model, spec: str, settings: Mapping[str, Any], build: Callable[[dict], Model]
) -> tuple[Model, Any]:
    """`(model, None)` without a spec, else the model with muP's initial parameters, and its base's parameter shapes.

    Args:
      model: what `build(settings)` returned.
      spec: `optim.mup`, `""` or as `base_settings`.
      settings: of the network, with its name.
      build: from settings to a network; nothing is allocated here.

    Raises:
      ValueError: as `base_settings`, or if the changes make no network.
    """
    if not spec:
        return model, None
    base = build(base_settings(spec, settings))
    return rescaled(model, base.init), jax.eval_shape(base.init, jax.eval_shape(lambda: jax.random.key(0)))


def growth(params: Any, base: Any) -> dict[str, Growth]:
    """The `Growth` of every array by its name.

    Args:
      params: arrays or shapes of the network.
      base: those of the base network; only the last two axes may differ. More leaves do no harm.

    Raises:
      ValueError: if an array is missing from the base, or differs in an axis that is no width.
    """
    shapes = {name: leaf.shape for name, leaf in paths.named_leaves(base).items()}
    found = {}
    for name, leaf in paths.named_leaves(params).items():
        wide, narrow = tuple(leaf.shape), tuple(shapes.get(name, ()))
        if name not in shapes or len(wide) != len(narrow) or wide[:-2] != narrow[:-2]:
            raise ValueError(
                f"optim mup: {name!r} is {list(wide)} and in the base network {list(narrow) or 'absent'}; the two may "
                "differ in their last two axes, [..., in, out]; give a base that is narrower and nothing else"
            )
        ratios = (1.0, *(w / n for w, n in zip(wide[-2:], narrow[-2:], strict=True)))
        found[name] = Growth(ratios[-2], ratios[-1]) if wide else Growth(1.0, 1.0)
    return found


def lr_factor(grown: Growth, family: str) -> float:
    """What the learning rate of an array is multiplied by, for methods of the family `"adam"` or `"sgd"`.

    Adam 1 / fan_in; SGD fan_out / fan_in: each row of Table 3 is a case of these (arXiv:2310.17813, section 3).
    """
    return 1 / grown.fan_in if family == "adam" else grown.fan_out / grown.fan_in


def init_factor(grown: Growth) -> float:
    """The initial standard deviation of an array over that in the base network.

    `1 / sqrt(fan_in)` for hidden arrays, `1 / fan_in` for the output, 1 for the input and vectors.
    """
    return grown.fan_in**-0.5 * min(1.0, (grown.fan_out / grown.fan_in) ** 0.5)


def scaled_by_width(base: Any, family: str) -> optax.GradientTransformation:
    """Multiplies each update by its `lr_factor`; before weight decay, whose strength then does not depend on the width.

    Args:
      base: shapes of the base network's parameters.
      family: of the method, `"adam"` or `"sgd"`.

    Raises:
      ValueError: for another method, or from `init` as `growth`.
    """
    if family not in ("adam", "sgd"):
        raise ValueError("optim mup is known for adam, adamw, lion, sgd and schedule_free of them; set mup='' or name")

    def update(updates, state, params=None):
        found = growth(updates, base)
        factor = lambda path, u: u * lr_factor(found[paths.name(path)], family)
        return jax.tree_util.tree_map_with_path(factor, updates), state

    def init(params):
        growth(params, base)
        return optax.EmptyState()

    return optax.GradientTransformation(init, update)


def rescaled(model: Model, base_init: Callable[[jax.Array], Any]) -> Model:
    """`model` with the initial parameters of muP: the RMS of an array is `init_factor` times that in the base network.

    Both are measured, the base's over `DRAWS` draws with a key of their own, as an initialiser's dependence on the
    width cannot be read off its result. Arrays without a width, those that start at zero and those of `model.fixed`
    stay to the bit.

    Args:
      model: the network.
      base_init: `key -> params` of the base network.
    """
    base = jax.eval_shape(base_init, jax.eval_shape(lambda: jax.random.key(0)))

    def init(key):
        params = model.init(key)
        found = growth(params, base)
        draws = paths.named_leaves(jax.vmap(base_init)(jax.random.split(jax.random.key(0), DRAWS)))

        def leaf(path, p):
            name = paths.name(path)
            if found[name].role == "fixed" or name in model.fixed:
                return p
            wanted, has = _rms(draws[name]) * init_factor(found[name]), _rms(p)
            return p * jnp.where(has > 0, wanted / jnp.where(has > 0, has, 1.0), 1.0).astype(p.dtype)

        return jax.tree_util.tree_map_with_path(leaf, params)

    return model._replace(init=init)


def _rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
