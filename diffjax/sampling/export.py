"""Samplers as files: a sampling loop lowered with a symbolic batch, its parameters, and none of its Python code."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from diffjax import files
from diffjax.core.types import Array

FORMAT, VERSION = "diffjax-sampler", 1
KEYS = ("one", "each", None)


def _needs_flatbuffers() -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError("writing and reading samplers needs the package flatbuffers: pip install flatbuffers")


def export(
    fn: Callable,
    shape: Sequence[int],
    dtype: Any = jnp.float32,
    *,
    params: Any = None,
    keys: str | None = "one",
    platforms: Sequence[str] | None = None,
) -> jax.export.Exported:
    """The sampling function lowered for any batch size b: `(leaves of params, x [b, *shape], key data) -> samples`.

    Keys travel as their raw data, uint32: an exported program does not depend on how jax represents typed keys.

    Args:
      fn: `(x, key) -> pytree`, or `(params, x, key)` if `params` are given; without `key` if `keys` is None. `x` is
        [b, *shape] with an unknown b, so Python must not compute with it; `key` is a typed key, or [b] of them.
      shape: of one sample, without the batch.
      dtype: of x.
      params: pytree of arrays, arguments of the program and not constants in it.
      keys: "one" key for the batch, one for "each" sample, or None for a deterministic sampler.
      platforms: such as ("cpu", "cuda", "tpu"); default that of this process.

    Raises:
      ValueError: for an unknown `keys` or a shape that is not made of whole numbers >= 1.
    """
    if keys not in KEYS:
        raise ValueError(f"keys: expected one of {', '.join(map(repr, KEYS))}, got {keys!r}")
    if any(not isinstance(n, (int, np.integer)) or n < 1 for n in shape):
        raise ValueError(f"shape: expected whole numbers >= 1, without the batch, got {tuple(shape)}")
    leaves, tree = jax.tree.flatten(params)

    def flat(leaves, x, data):
        first = () if params is None else (jax.tree.unflatten(tree, leaves),)
        last = () if keys is None else (jax.random.wrap_key_data(data),)
        return fn(*first, x, *last)

    (b,) = jax.export.symbolic_shape("b")
    data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    data = None if keys is None else jax.ShapeDtypeStruct(((b,) if keys == "each" else ()) + data.shape, data.dtype)
    specs = [jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    return jax.export.export(jax.jit(flat), platforms=platforms)(specs, jax.ShapeDtypeStruct((b, *shape), dtype), data)


def save_sampler(
    path: str | os.PathLike,
    fn: Callable,
    *,
    shape: Sequence[int],
    dtype: Any = jnp.float32,
    params: Any = None,
    keys: str | None = "one",
    platforms: Sequence[str] | None = None,
) -> None:
    """Writes a sampling function, lowered and with its parameters, to one file that `load_sampler` reads.

    The reader needs jax, and neither the model's code nor a new trace. The file appears whole or not at all. jax
    guarantees that a program can be read by releases of the following six months.

    Args:
      path: of the file; an existing one is replaced.
      fn: as in `export`, and so are the others.
      shape: likewise.
      dtype: likewise.
      params: likewise.
      keys: likewise.
      platforms: likewise.

    Raises:
      ValueError: as `export` does.
      ImportError: without the package flatbuffers.
    """
    _needs_flatbuffers()
    exported = export(fn, shape, dtype, params=params, keys=keys, platforms=platforms)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "jax": jax.__version__,
        "shape": [int(n) for n in shape],
        "dtype": jnp.dtype(dtype).name,
        "keys": keys,
        "impl": str(jax.random.key_impl(jax.random.key(0))),
        "platforms": list(exported.platforms),
        "params": [{"shape": leaf.shape, "dtype": leaf.dtype.name} for leaf in leaves],
    }
    with files.replacing(path, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as file:
        file.writestr("meta.json", json.dumps(meta))
        file.writestr("program", bytes(exported.serialize()))
        for i, leaf in enumerate(leaves):
            file.writestr(f"params/{i}", leaf.tobytes())


def _read(path: Path) -> tuple[dict, bytes, list[np.ndarray]]:
    """The file's settings, program and parameters; each part is checked against its checksum by zipfile."""
    data = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            parts = {name: file.read(name) for name in file.namelist()}
        meta = json.loads(parts.get("meta.json", b"null"))
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not a sampler written by save_sampler ({error}); write it again"
        ) from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{path} is a zip file, but not a sampler written by save_sampler")
    if meta["version"] > VERSION:
        raise ValueError(f"{path} has format version {meta['version']}; this library reads up to {VERSION}")
    names = [f"params/{i}" for i in range(len(meta["params"]))]
    if missing := {"program", *names} - set(parts):
        raise ValueError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}; write it again")
    leaves = [
        np.frombuffer(parts[name], jnp.dtype(leaf["dtype"])).reshape(leaf["shape"])
        for name, leaf in zip(names, meta["params"], strict=True)
    ]
    return meta, parts["program"], leaves


def _check_call(meta: dict, x: Array, key: jax.Array | None) -> None:
    if jnp.shape(x)[1:] != tuple(meta["shape"]) or jnp.ndim(x) != len(meta["shape"]) + 1:
        raise ValueError(f"sampler: expected x of shape [b, {', '.join(map(str, meta['shape']))}], got {jnp.shape(x)}")
    if jnp.result_type(x) != jnp.dtype(meta["dtype"]):
        raise ValueError(f"sampler: expected x of dtype {meta['dtype']}, got {jnp.result_type(x)}")
    if meta["keys"] is None:
        if key is not None:
            raise ValueError("sampler: it was exported with keys=None and draws no noise; call it without a key")
        return
    expected = jnp.shape(x)[:1] if meta["keys"] == "each" else ()
    if key is None or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape != expected:
        given = "none" if key is None else f"{key.dtype}{list(key.shape)}"
        raise ValueError(f"sampler: expected typed keys of shape {expected} (jax.random.key or split), got {given}")
    if str(jax.random.key_impl(key)) != meta["impl"]:
        raise ValueError(f"sampler: expected keys of {meta['impl']}, got {jax.random.key_impl(key)}")


def load_sampler(path: str | os.PathLike) -> Callable[..., Any]:
    """The sampler of a file of `save_sampler`: `(x [b, ...], key=None) -> samples`, for any b, jitted.

    Each batch size is compiled once; the Python code of the sampler is neither needed nor run.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is truncated, damaged, of another kind or of a later format; when called, for an `x` or
        a key that does not fit.
      ImportError: without the package flatbuffers.
    """
    _needs_flatbuffers()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no sampler at {path}; save_sampler writes one")
    meta, program, leaves = _read(path)
    try:
        exported = jax.export.deserialize(bytearray(program))
    except Exception as error:
        raise ValueError(
            f"{path} was written with jax {meta['jax']} and cannot be read by jax {jax.__version__}: {error}"
        ) from error
    call, leaves = jax.jit(exported.call), [jnp.asarray(leaf) for leaf in leaves]

    def sampler(x, key=None):
        _check_call(meta, x, key)
        return call(leaves, x, None if key is None else jax.random.key_data(key))

    return sampler
