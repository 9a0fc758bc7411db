"""Networks in folders: where the config and the tensors are."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from diffjax.convert.weights.errors import WeightsError, some
from diffjax.convert.weights.folders.names import STEMS, indices_of, weights_of
from diffjax.convert.weights.tensors.read import Tensor, read_header, stamp_of
from diffjax.convert.weights.tensors.strict import read_json, shown

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder.

    Raises:
      WeightsError: if it is no JSON object.
      OSError: if it cannot be read.
    """
    path = (folder.parent if folder.is_file() else folder) / "config.json"
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder or file")
    if not path.is_file():
        parts = sorted(p.parent.name for p in folder.glob("*/config.json"))
        hint = f"; it has those of {some(parts)}: name one of these folders" if parts else ""
        raise FileNotFoundError(f"{folder}: no config.json, which says what network this is{hint}")
    return read_json(path)


def find(path: Path, variant: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of the weights in a folder, by name.

    Raises:
      WeightsError: for damaged files, pickles, an index that leaves its folder or does not fit its files, or a folder
        without weights.
      ValueError: for a file and a variant.
      OSError: if something cannot be read.
    """
    if path.is_file():
        if variant:
            raise ValueError(f"{path} is a file; variant={variant!r} chooses among those of a folder")
        _refuse_pickle(path)
        if path.suffix == ".json":
            raise WeightsError(f"{path}: settings, and no weights; name its folder, {path.parent}")
        return read_header(path)[0]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder or file")
    for stem in STEMS:
        for index in indices_of(stem, variant):
            if (path / index).is_file():
                return _sharded(path, path / index)
        if (path / weights_of(stem, variant)).is_file():
            return read_header(path / weights_of(stem, variant))[0]
    here = sorted(p.name for p in path.iterdir() if p.is_file())
    pickles = [path / name for name in here if name.endswith(PICKLES)]
    weights = [name for name in here if name.endswith(".safetensors")]
    if pickles and not weights:
        _refuse_pickle(pickles[0])
    variants = f" with variant {variant!r}" if variant else " without a variant"
    found = f"it has {some(weights)}" if weights else "it has no .safetensors file"
    ends = (re.search(r"\.(\w+)(-\d+-of-\d+)?\.safetensors$", name) for name in weights)
    others = sorted({end[1] for end in ends if end})
    found += f"; name the variant, such as {others[0]!r} (variant=, --variant=)" if others and not variant else ""
    raise WeightsError(
        f"{path}: no weights{variants}; looked for {' and '.join(weights_of(s, variant) for s in STEMS)}, or an index "
        f"of these; {found}"
    )


def _refuse_pickle(path: Path) -> None:
    if path.name.endswith(PICKLES):
        raise WeightsError(
            f"{path}: a pickle, which runs code of its own when it is read; convert it where you trust it: "
            "d = torch.load(PATH, weights_only=True, map_location='cpu'); d = d.get('state_dict', d); "
            "safetensors.torch.save_file({k: v.clone().contiguous() for k, v in d.items()}, 'model.safetensors')"
        )


def _sharded(folder: Path, index: Path) -> dict[str, Tensor]:
    before = stamp_of(index.stat())
    where = read_json(index).get("weight_map")
    if not (isinstance(where, dict) and where and all(isinstance(name, str) for name in where.values())):
        raise WeightsError(f"{index}: expected a 'weight_map' from tensors to files")
    names = tuple(dict.fromkeys(where.values()))
    for name in names:
        # A name and no path: whatever is read lies in this folder.
        if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise WeightsError(f"{index}: {shown(name)} is no name of a file in its folder")
        _refuse_pickle(folder / name)
        if not (folder / name).is_file():
            raise WeightsError(f"{index}: it names {shown(name)}, which is not there; copy the folder again")
    tensors: dict[str, Tensor] = {}
    for name in names:
        held = read_header(folder / name)[0]
        for key in held:
            if where.get(key) != name:
                told = f"it says {shown(where[key])}" if key in where else "it does not have it"
                raise WeightsError(f"{index}: tensor {shown(key)} lies in {shown(name)}, but {told}")
        tensors |= held
    # Files of two checkpoints, one saved while the other was read.
    if not index.is_file() or stamp_of(index.stat()) != before:
        raise WeightsError(f"{index}: was replaced while it was read; load it again")
    gone = sorted(where.keys() - tensors.keys())
    if gone:
        raise WeightsError(f"{index}: tensors that its files lack: {some(gone)}")
    return tensors
