"""A new run from the parameters of another one, or of a folder of weights: `config.init_from`."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diffjax.convert.weights.errors import some
from diffjax.convert.weights.folders.names import PARAMS, weights_of
from diffjax.convert.weights.tensors import Source, read_header, write
from diffjax.train import paths
from diffjax.train.checkpoint.params import CHECKPOINTS, RAW
from diffjax.train.errors import ConfigError
from diffjax.train.parallel import processes
from diffjax.train.parts import Parts
from diffjax.train.state import TrainState, abstract_state, choose_ema, init_params, start_state
from diffjax.train.survival.workdir import CONFIG_FILE, read_config


class Leaf(NamedTuple):
    """A stored array that is read when it is needed.

    Attributes:
      shape: of the whole array.
      read: `index -> array`, the part that a tuple of slices names.
    """

    shape: tuple[int, ...]
    read: Callable[[tuple], np.ndarray]


def save_params(folder: str | os.PathLike, params: Mapping) -> Path:
    """Writes `params` as `folder/params.safetensors` with names `a/b/c`, a weight folder for `init_from`; its path.

    The folder is made where missing, and the file appears in one move.
    """
    path = Path(folder) / weights_of(PARAMS)
    write(path, {name: Source.of(leaf) for name, leaf in paths.named_leaves(params).items()}, {})
    return path


def first_state_from(config: ConfigDict, parts: Parts, state_sharding: TrainState) -> TrainState:
    """The state at step 0 with the parameters that `config.init_from` names, averages and optimiser started from them.

    One array at a time is read and placed, each device's part of it where the source can be read in parts.

    Raises:
      ConfigError: if the source cannot be read or does not account for every parameter; lists every missing,
        unexpected and misshapen name.
    """
    wanted, source = abstract_state(parts).params, open_source(config)
    leaves = paths.named_leaves(wanted)
    found = matched(config, {name: leaf.shape for name, leaf in leaves.items()}, source)
    shardings = dict(zip(leaves, jax.tree.leaves(state_sharding.params), strict=True))
    absent = [name for name in leaves if name not in found]
    placed = fresh(parts, config.seed, absent, shardings) if absent else {}
    for name, leaf in found.items():
        like = leaves[name]
        read = lambda index, leaf=leaf, like=like: np.asarray(leaf.read(index)).astype(like.dtype)
        placed[name] = jax.make_array_from_callback(like.shape, shardings[name], read)
    params = jax.tree_util.tree_map_with_path(lambda path, _: placed[paths.name(path)], wanted)
    return jax.jit(lambda params: start_state(parts, params), out_shardings=state_sharding)(params)


def fresh(parts: Parts, seed: int, names: list[str], shardings: Mapping) -> dict[str, jax.Array]:
    """The named parameters as a run of that seed would start with them, and no others."""

    def init(key):
        every = paths.named_leaves(init_params(parts, key))
        return {name: every[name] for name in names}

    places = {name: shardings[name] for name in names}
    return jax.jit(init, out_shardings=places)(jax.random.key(seed))


def matched(config: ConfigDict, wanted: Mapping[str, tuple], source: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The arrays of `source` that the network takes, by name.

    What `config.init_ignore` matches is left out of the source, whatever it holds; then every parameter must be there
    in its shape, unless `config.init_missing` matches its name, and nothing may be left over. Rules are regexes, found
    anywhere in `a/b/c`.

    Raises:
      ConfigError: else; lists all names.
    """
    left_out, optional = rules(config, "init_ignore"), rules(config, "init_missing")
    kept = {name: leaf for name, leaf in source.items() if not left_out(name)}
    missing = [name for name in wanted if name not in kept and not optional(name)]
    unexpected = [name for name in kept if name not in wanted]
    shapes = [(name, kept[name].shape, wanted[name]) for name in wanted if name in kept]
    misshapen = [f"{name} {have} for {want}" for name, have, want in shapes if tuple(have) != tuple(want)]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(wrong.values()):
        listed = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise ConfigError(
            f"config.init_from: {config.init_from!r} does not fit the network; {listed}. Let config.init_missing match "
            "what may start afresh and config.init_ignore what may be left out (an array of another shape needs both)"
        )
    if not any(name in kept for name in wanted):
        raise ConfigError(
            f"config.init_from: nothing is left of {config.init_from!r} under these rules: no array is used"
        )
    return {name: leaf for name, leaf in kept.items() if name in wanted}


def rules(config: ConfigDict, key: str) -> Callable[[str], bool]:
    """Whether any regex of `config[key]` is found in a name.

    Raises:
      ConfigError: for a malformed regex.
    """
    try:
        compiled = [re.compile(rule) for rule in config[key]]
    except re.error as error:
        raise ConfigError(
            f"config.{key} is {config[key]!r}: {error}; give regular expressions over names a/b/c"
        ) from None
    return lambda name: any(rule.search(name) for rule in compiled)


def open_source(config: ConfigDict) -> dict[str, Leaf]:
    """The arrays of `config.init_from` by name `a/b/c`: a workdir's average, or the files of a weight folder.

    Raises:
      ConfigError: if it is neither, or its files cannot be told apart or read.
    """
    folder = Path(config.init_from)
    if not folder.is_dir():
        raise ConfigError(
            f"config.init_from is {config.init_from!r}; no such folder in {os.getcwd()!r}: give the workdir of a run, "
            "a folder of a checkpoint with its config.json, or one with .safetensors or .npz files"
        )
    if (folder / CONFIG_FILE).is_file() and (folder / CHECKPOINTS).is_dir():
        return of_workdir(folder, config.init_ema)
    if config.init_ema:
        raise ConfigError(
            f"config.init_ema is {config.init_ema!r}, but {config.init_from!r} is no workdir and has no averages: "
            "leave it empty"
        )
    if (folder / "config.json").is_file():
        return of_checkpoint(folder)
    by_kind = {kind: sorted(folder.glob(f"*.{kind}")) for kind in ("safetensors", "npz")}
    kinds = [kind for kind, found in by_kind.items() if found]
    if len(kinds) != 1:
        has = "both .safetensors and .npz files" if kinds else "no run, and no .safetensors or .npz file"
        raise ConfigError(f"config.init_from: {config.init_from!r} holds {has}; one kind is read, all files of it")
    sizes = {file.name: file.stat().st_size for file in by_kind[kinds[0]]}
    processes.agree("parameters of config.init_from", sizes, "it must be one folder that all of them see")
    reader = {"safetensors": of_safetensors, "npz": of_npz}[kinds[0]]
    leaves: dict[str, Leaf] = {}
    for file in by_kind[kinds[0]]:
        try:
            found = reader(file)
        except Exception as error:  # zipfile raises many types of its own
            raise ConfigError(f"config.init_from: {file} cannot be read ({error}); write it again") from error
        twice = sorted(set(found) & set(leaves))
        if twice:
            raise ConfigError(f"config.init_from: {file} names arrays that another file has too: {some(twice)}")
        leaves |= found
    return leaves


def of_checkpoint(folder: Path) -> dict[str, Leaf]:
    """The parameters of a folder with the `config.json` of a network of `diffjax.models.NETWORKS`, and its weights."""
    from diffjax.convert.weights.folders.survey import opened
    from diffjax.convert.weights.places.layout import read, type_of

    try:
        found = opened(folder)
    except ValueError as error:
        raise ConfigError(f"config.init_from: {error}") from error
    # What is missing may start afresh, by `config.init_missing`.
    wrong = found.report._replace(missing=())
    if any(wrong):
        raise ConfigError(f"config.init_from: {folder}: not the parameters of its {found.kind}: {wrong}")
    sizes = {name: tensor.nbytes for name, tensor in found.tensors.items()}
    processes.agree("parameters of config.init_from", sizes, "it must be one folder that all of them see")

    def leaf(name, place):
        kept = type_of(place, found.tensors, None)
        return Leaf(tuple(found.shapes[name].shape), lambda index: read(place, found.tensors, index, kept))

    held = {name: place for name, place in found.places.items() if all(key in found.tensors for key in place.keys)}
    return {name: leaf(name, place) for name, place in held.items()}


def of_workdir(workdir: Path, ema: str) -> dict[str, Leaf]:
    """The newest sound checkpoint's average of a run (`"raw"`: its parameters; empty: its first average)."""
    from diffjax.train.checkpoint import open_checkpoints

    config = read_config(os.fspath(workdir))
    chosen = choose_ema(config, ema or None)
    checkpoints = open_checkpoints(os.fspath(workdir / CHECKPOINTS), keep=config.keep, best_metric="loss")
    # In host memory: all of it may be more than one accelerator holds.
    restored = checkpoints.restore_part("params" if chosen == RAW else f"ema/{chosen}", host=True)
    if restored is None:
        raise ConfigError(f"config.init_from: {os.fspath(workdir)!r} holds no checkpoint yet; train it first")
    processes.agree("parameters of config.init_from", {"step": restored[0]}, "let that run end, or stop it, first")
    return {name: whole(leaf) for name, leaf in paths.named_leaves(restored[1]).items()}


def whole(array: np.ndarray) -> Leaf:
    """An array in memory as a `Leaf`."""
    return Leaf(array.shape, lambda index: array[index])


def of_safetensors(path: Path) -> dict[str, Leaf]:
    """The arrays of a safetensors file; parts are read from the disk when they are asked for."""
    return {name: Leaf(tensor.shape, tensor.part) for name, tensor in read_header(path)[0].items()}


def of_npz(path: Path) -> dict[str, Leaf]:
    """The arrays of an npz file, one in memory at a time."""
    archive = np.load(path, allow_pickle=False)
    # The parts of one array are asked for one after another.
    member: Any = lru_cache(maxsize=1)(lambda name: archive[name])

    def shape(name: str) -> tuple[int, ...]:
        with zipfile.ZipFile(path) as file, file.open(name + ".npy") as stream:
            version = np.lib.format.read_magic(stream)
            old = version == (1, 0)
            header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            return header(stream)[0]

    return {name: Leaf(shape(name), lambda index, name=name: member(name)[index]) for name in archive.files}
