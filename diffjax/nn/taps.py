"""Named activations: where a network says what it computes, and a caller may look at it or change it.

`tap(name, x)` is `x` unless the caller has installed a function with `tapped`. Who splits activations over devices,
keeps features of a layer or replaces them needs nothing else from the network. What is installed is part of the key of
JAX's compile caches, so a function that was traced without it is traced again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

Tap = Callable[[str, jax.Array], jax.Array | None]

# (functions, innermost first; prefix of the names)
_CONTEXT = jax.make_user_context(((), ""))


def tap(name: str, x: jax.Array) -> jax.Array:
    """`x`, passed through the installed functions under `scope/name`; `x` itself without any.

    In a network that scans over its layers (`scan=True`) a name stands for the activations of all of them, and a
    function may change them but not keep them: they are tracers of the loop and do not exist outside, nor do those of a
    layer that is computed again (`remat`). Without both the name comes once for each layer, in their order.
    """
    functions, prefix = _CONTEXT.value
    for function in functions:
        x = _through(function, prefix + name, x)
    return x


def _through(function: Tap, name: str, x: jax.Array) -> jax.Array:
    out = function(name, x)
    if out is None:
        return x
    given, wanted = (f"{jnp.result_type(a)} {jnp.shape(a)}" for a in (out, x))
    if given != wanted:
        raise ValueError(f"a function of tapped gave {given} for {name!r}, which is {wanted}")
    return out


@contextlib.contextmanager
def tapped(function: Tap) -> Iterator[None]:
    """Installs `function(name, x) -> x`, an `x` of the same shape and dtype, for what is traced inside.

    Functions nest; the innermost sees an activation first. One that returns None leaves the activation as it is. A name
    may come several times in one call: a layer that is used twice, layers of a loop.
    """
    functions, prefix = _CONTEXT.value
    with _CONTEXT(((function, *functions), prefix)):
        yield


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Puts `name/` before the names of the activations inside."""
    functions, prefix = _CONTEXT.value
    # Without a function nobody hears the names, and a changed context would only cost traces.
    with _CONTEXT((functions, f"{prefix}{name}/")) if functions else contextlib.nullcontext():
        yield
