"""What networks are compared on with PyTorch: configs, inputs and weights, without torch or jax at import.

A family is a module with
  CASES: `{name: Case}`, whose runs are committed under `golden/networks`;
  theirs(module, inputs) -> {name: tensor}: the call of PyTorch's module, given torch tensors in our layout;
  ours(model, params, inputs) -> {name: array}: the same call here;
  random_case(rng) -> Case: another one, from a `numpy.random.Generator`;
  build(case) -> module, for classes that neither diffusers nor transformers has.
Images are `[B, H, W, C]` in `inputs` and in what both return; `nchw` and `nhwc` turn them for PyTorch.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """A network and its inputs.

    Attributes:
      kind: PyTorch's class, such as "DiTTransformer2DModel".
      config: its settings.
      inputs: `{name: spec}`, ("normal", shape), ("times", count), ("sigmas", count), ("integers", shape, end), ("mask",
        shape) or ("value", value).
      gradients: whether those of the parameters are compared as well (live runs only).
    """

    kind: str
    config: dict[str, Any]
    inputs: dict[str, tuple]
    gradients: bool = False


def generator(name: str) -> np.random.Generator:
    """Numbers that belong to a name: the same on every machine and in every version of numpy."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def draw(case: str, name: str, spec: tuple) -> np.ndarray:
    """An input of a case."""
    what, *rest = spec
    rng = generator(f"{case}/{name}")
    if what == "normal":
        return rng.standard_normal(rest[0]).astype(np.float32)
    if what == "times":
        return rng.integers(0, 1000, rest[0]).astype(np.int32)
    if what == "sigmas":
        return np.exp(rng.standard_normal(rest[0])).astype(np.float32)
    if what == "integers":
        return rng.integers(0, rest[1], rest[0]).astype(np.int32)
    if what == "mask":  # the first few are seen, at least one
        count = rng.integers(1, rest[0][-1] + 1, rest[0][:-1])
        return (np.arange(rest[0][-1]) < count[..., None]).astype(np.int32)
    if what == "value":
        return np.asarray(rest[0])
    raise ValueError(f"{case}: input {name} is drawn as {what!r}, which is not known")


def inputs_of(name: str, case: Case) -> dict[str, np.ndarray]:
    return {key: draw(name, key, spec) for key, spec in case.inputs.items()}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter by its name in the checkpoint: matrices keep the size of what passes through, norms are near 1."""
    noise = np.asarray(generator(name).standard_normal(shape))
    if len(shape) > 1:
        return (noise / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return np.asarray((1.0 if name.endswith("weight") else 0.0) + 0.05 * noise, np.float32)


def digest(shapes) -> str:
    """A digest of the names and shapes of tensors, `{name: shape}`, whatever their order."""
    rows = [f"{name} {list(shape)}" for name, shape in sorted(shapes.items())]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def families() -> dict[str, Any]:
    """All families by name."""
    return {m.name: importlib.import_module(f"networks.{m.name}") for m in pkgutil.iter_modules(__path__)}


def nchw(x):
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)
