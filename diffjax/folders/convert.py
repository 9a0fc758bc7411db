"""`diffjax convert`: folders of weights, pipelines, files of others and runs, written again."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from diffjax.convert.weights import WeightsError, rewrite, save, save_original
from diffjax.convert.weights.adapters.lora import lora_file
from diffjax.convert.weights.errors import some
from diffjax.convert.weights.folders.find import find, read_config
from diffjax.convert.weights.folders.save import SHARD_BYTES, write_folder
from diffjax.convert.weights.folders.survey import PIPELINE, components, holds_weights, missing
from diffjax.convert.weights.originals import original_components
from diffjax.convert.weights.rewrite import check_keys, check_target, watched
from diffjax.convert.weights.tensors import Source
from diffjax.convert.weights.tensors.dtypes import cast, check_dtype
from diffjax.convert.weights.tensors.strict import read_json
from diffjax.folders.progress import progress_bar
from diffjax.models import NETWORKS, from_config
from diffjax.train.checkpoint.params import CHECKPOINTS
from diffjax.train.describe import size_text
from diffjax.train.survival.workdir import CONFIG_FILE

TEXTS = (".json", ".md", ".txt")  # of a pipeline's own folder, which may hold it in one file as well


def is_run(folder: str | os.PathLike) -> bool:
    """Whether a folder is the workdir of a training run."""
    return Path(folder, CONFIG_FILE).is_file() and Path(folder, CHECKPOINTS).is_dir()


def convert(
    source: str, target: str, *, dtype: str | None = None, variant: str | None = None, shard_gb: float | None = None,
    keys: str | None = None, component: str | None = None, family: str | None = None, network: str | None = None,
    ema: str | None = None, step: int | str | None = None, overwrite: bool = False,
) -> None:  # fmt: skip
    """Writes the network of a checkpoint folder, an original checkpoint or a training run into another folder.

    Args:
      source: as for `diffjax.convert.weights.rewrite`, or the workdir of a run, or a pipeline: its networks are written
        one by one, and the other files are copied.
      target, dtype, variant, keys, component, family, overwrite: as for `diffjax.convert.weights.rewrite`.
      network: the file of the config that `rewrite` takes, or its folder.
      shard_gb: most GB of tensors in one file.
      ema, step: of a run, which average and which checkpoint; see `diffjax.train.state.load_run`.

    Raises:
      WeightsError: as `rewrite`.
      ValueError: for an unknown name, a LoRA, or a run whose network has no class in `NETWORKS`, unless `keys` is
        "params".
      OSError: disk full, folder read-only; what was in `target` is whole.
    """
    check_dtype("dtype", dtype)
    if shard_gb is not None and not 1e-9 <= shard_gb < math.inf:
        raise ValueError(f"--shard-gb={shard_gb:g}: expected a number above 0")
    if shard_gb is not None and keys == "original":
        raise ValueError(f"--shard-gb={shard_gb:g}: the authors' names are written to one file")
    shard_bytes = SHARD_BYTES if shard_gb is None else round(shard_gb * 1e9)
    if is_run(target):
        raise ValueError(f"{target} is a run, whose config would be replaced; name another folder")
    with progress_bar("converting") as progress:
        if is_run(source):
            if component or family or variant or network:
                other = "--variant" if variant else "--component, --family and --network"
                raise ValueError(f"{other}: {source} is a run, which has no such parts")
            which, how = dict(ema=ema, step=step), dict(dtype=dtype, shard_bytes=shard_bytes, keys=keys)
            _convert_run(source, target, **which, **how, overwrite=overwrite, progress=progress)
            return
        if ema or step is not None:
            raise ValueError(f"{source} is no run and has no averages or steps to choose from")
        if not Path(source, "config.json").is_file() and lora_file(source):
            raise ValueError(f"{source} is a LoRA, and networks are converted; load_lora and save_lora write it again")
        if not component and Path(source).is_file() and (parts := original_components(source).parts):
            if len(parts) > 1:
                raise ValueError(f"{source} has several networks: name one, --component={'|'.join(parts)}")
            component = next(iter(parts))
        given = dict(dtype=dtype, variant=variant, shard_bytes=shard_bytes, keys=keys, component=component)
        given |= dict(family=family, network=None if network is None else _settings(Path(network)))
        given |= dict(overwrite=overwrite, progress=progress)
        pipeline = Path(source, PIPELINE).is_file()
        _convert_pipeline(Path(source), Path(target), given) if pipeline else rewrite(source, target, **given)


def size_of(target: str | os.PathLike) -> str:
    """How many parameters, and bytes, `convert` has written; nothing but headers is read."""
    path = Path(target)
    folders = [path]
    if (path / PIPELINE).is_file():
        folders = [path / name for name in components(path) if (path / name / "config.json").is_file()]
    held = [find(folder) for folder in folders if folder.is_file() or holds_weights(folder)]
    tensors = [tensor for found in held for tensor in found.values()]
    count = sum(math.prod(tensor.shape) for tensor in tensors)
    return f"{count:,} parameters, {size_text(sum(tensor.nbytes for tensor in tensors))}"


def _settings(network: Path) -> dict[str, Any]:
    return read_config(network) if network.is_dir() else read_json(network)


def _convert_pipeline(source: Path, target: Path, given) -> None:
    """Networks by `rewrite`; schedulers, tokenizers and texts are copied, and last the list of all."""
    if given["keys"] not in (None, "diffusers") or given["component"]:
        raise ValueError(f"{source} is a pipeline: --keys and --component need one network, such as {source / 'unet'}")
    check_target(target, given["overwrite"])
    if target.is_dir() and os.path.samefile(source, target):
        raise ValueError(f"{target}: the pipeline itself; name another folder")
    parts = components(source)
    if gone := [f"{name} ({told})" for name, kind in parts.items() if (told := missing(source / name, kind))]:
        raise WeightsError(f"{source}: its {PIPELINE} names parts that are missing: {some(gone)}; fetch them first")
    networks = [n for n in parts if (source / n / "config.json").is_file() and holds_weights(source / n)]
    for name in networks:
        find(source / name, given["variant"])  # nothing is written before all are known to have these files
    for name in parts:
        if name in networks:
            rewrite(source / name, target / name, **given)
        else:
            _copy([path for path in (source / name).iterdir() if path.is_file()], target / name)
    texts = [path for path in source.iterdir() if path.is_file() and path.suffix in TEXTS]
    _copy(sorted(texts, key=lambda path: path.name == PIPELINE), target)


def _copy(paths: Iterable[Path], target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copyfile(path, target / path.name)


def _convert_run(source, target, *, ema, step, dtype, shard_bytes, keys, overwrite, progress) -> None:
    """Writes the parameters of a run: under their own names, or as its network's class has them."""
    from diffjax.train import paths
    from diffjax.train.state import load_run

    check_target(target, overwrite, keys)
    check_keys(keys)
    run = load_run(source, ema=ema, step=step, items=False)
    network = run.model.config.get("network", {})
    if keys == "params":
        leaves = paths.named_leaves(run.params)
        sources = {name: Source.of(leaf, cast(leaf.dtype, dtype)) for name, leaf in leaves.items()}
        write_folder(target, run.model.config, watched(sources, progress), shard_bytes=shard_bytes, params=True)
    elif network.get("_class_name") in NETWORKS:
        model = from_config(network)
        # What a loss has learnt besides is none of the network's.
        own = {name: run.params[name] for name in jax.eval_shape(model.init, jax.random.key(0))}
        if keys == "original":
            save_original(model, own, target, dtype=dtype)
        else:
            save(model, own, target, dtype=dtype, shard_bytes=shard_bytes)
    else:
        raise WeightsError(
            f"{source}: its network {run.config.model.name!r} is of no class that checkpoints have "
            f"({', '.join(NETWORKS)}); --keys=params writes it for config.init_from"
        )
