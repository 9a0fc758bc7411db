"""The settings of a network that a checkpoint describes: its own `config.json`, read strictly."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp

from diffjax.core.types import Model
from diffjax.models.checks import DTYPES, check_attention, check_name, check_remat
from diffjax.nn import Compute, functional
from diffjax.registry import nearest

T = TypeVar("T")
# What training scripts leave in a config.json when they save the average of a run: diffusers' `EMAModel`.
AVERAGED = frozenset("decay min_decay optimization_step update_after_step use_ema_warmup inv_gamma power".split())


def read(kind: str, settings: type[T], config: Mapping[str, Any], ignored: frozenset[str] = frozenset()) -> T:
    """An instance of the frozen dataclass `settings` from the mapping of a `config.json`.

    Lists become tuples. Keys that start with an underscore say where a file came from, those of `AVERAGED` how its
    weights were averaged, those of `ignored` what does not change the network; they are passed over.

    Raises:
      ValueError: for a key that the class lacks, or a value that is not of the type which the class tells.
    """
    fields, hints = {field.name: field for field in dataclasses.fields(settings)}, _hints(settings)
    ignored = ignored | (AVERAGED - fields.keys())
    given = {k: _tuples(v) for k, v in config.items() if not k.startswith("_") and k not in ignored}
    for name, value in given.items():
        if name not in fields:
            raise ValueError(
                f"{kind}: unknown setting {name!r} (here {value!r}){nearest(name, fields)}; known: {', '.join(fields)}"
            )
        if not _fits(value, hints[name]):
            wanted, default = fields[name].type, fields[name].default
            raise ValueError(f"{kind}: {name}={value!r}: expected {wanted}, such as {default!r}")
    return settings(**given)


def only(kind: str, settings: Any, **supported: tuple) -> None:
    """Raises `ValueError` for a setting whose value is not one of those given: this network has no others."""
    for name, values in supported.items():
        value = getattr(settings, name)
        if not any(type(value) is type(v) and value == v for v in values):
            raise ValueError(f"{kind}: {name}={value!r} is not supported; supported: {', '.join(map(repr, values))}")


class How(NamedTuple):
    """How a network is computed (`Compute`), and the type in which `init` makes its parameters."""

    compute: Compute
    param_dtype: Any


def how(
    kind: str, *, dtype: str = "float32", param_dtype: str = "float32", attention: str = "xla", scan: bool = True,
    remat: str | bool = "none", **unknown,
) -> How:  # fmt: skip
    """The settings that every network takes besides those of its checkpoint.

    Args:
      dtype: of the computation: "float32", "bfloat16", "float16" or (in x64 mode) "float64".
      param_dtype: of the parameters that `init` makes; loaded ones are of the type of their file.
      attention: one of `diffjax.nn.IMPLEMENTATIONS`; see `diffjax.nn.attend`.
      scan: run layers of one shape in a `lax.scan`; False unrolls them.
      remat: what is kept of a layer for the backward pass, one of `diffjax.nn.POLICIES`; True is "full".

    Raises:
      ValueError: for an unknown name.
      ImportError: for `attention="tokamax"` without the package.
    """
    for name, value in unknown.items():
        known = ("dtype", "param_dtype", "attention", "scan", "remat")
        raise ValueError(
            f"{kind}: unknown keyword {name}={value!r}; known: {', '.join(known)}{nearest(name, known)}; what the "
            "checkpoint sets goes into its config"
        )
    for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        check_name(kind, name, str(value), DTYPES)
        if str(value) == "float64" and jax.dtypes.canonicalize_dtype(value) != value:
            raise ValueError(f"{kind}: {name}='float64' needs jax.config.update('jax_enable_x64', True)")
    check_attention(kind, "attention", attention, str(dtype))
    return How(Compute(jnp.dtype(dtype), attention, scan, check_remat(kind, remat)), jnp.dtype(param_dtype))


def model(kind: str, config: Mapping[str, Any], make: Callable, how: How, rules: tuple) -> Model:
    """The `Model` of the module that `make(compute=, rngs=)` builds; its config names the class, as the file does."""
    module = functional(lambda rngs: make(compute=how.compute, rngs=rngs), how.param_dtype)
    config = dict(config) if "architectures" in config else {"_class_name": kind, **config}
    return Model(module.init, module.apply, config, rules, fixed=module.fixed)


def channels_out(c: Any) -> int:
    """The channels of what a network returns: as many as it is given, where its settings tell no `out_channels`."""
    return c.in_channels if c.out_channels is None else c.out_channels


def expect(kind: str, name: str, array: jax.Array, *shape: int | None) -> None:
    """Raises `ValueError` unless the array has this shape; None stands for any length."""
    given = tuple(jnp.shape(array))
    if len(given) != len(shape) or any(n not in (None, m) for n, m in zip(shape, given, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{kind}: {name} has shape {given}; expected [{wanted}]")


def times_of(kind: str, t: jax.Array, x: jax.Array, name: str = "t") -> jax.Array:
    """`t`, one time or one for each sample of `x`, as `[B]`; raises `ValueError` for another shape, under its name."""
    t = jnp.asarray(t)
    if t.shape not in ((), (1,), (len(x),)):
        raise ValueError(f"{kind}: {name} has shape {t.shape}; expected one number, or one per sample, [{len(x)}]")
    return jnp.broadcast_to(t, (len(x),))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


_hints = functools.cache(get_type_hints)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type: of a scalar, a tuple or a dict, or one of several; an int is a float."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        items = get_args(hint)
        items = items[:1] * len(value) if isinstance(value, tuple) and items[-1] is Ellipsis else items
        return isinstance(value, tuple) and len(value) == len(items) and all(map(_fits, value, items))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint
