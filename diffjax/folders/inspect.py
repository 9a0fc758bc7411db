"""`diffjax inspect FOLDER`: what a folder of weights, a pipeline or a file holds, and whether it fits."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffjax.convert.weights.adapters.lora import lora_file, lora_ranks
from diffjax.convert.weights.errors import printable, some
from diffjax.convert.weights.folders.find import find
from diffjax.convert.weights.folders.survey import PIPELINE, Survey, components, missing, of_8_bits, survey, unusual
from diffjax.convert.weights.originals import Contents, original_components, survey_original
from diffjax.convert.weights.places.layout import type_of
from diffjax.convert.weights.tensors.dtypes import cast, check_dtype
from diffjax.folders.progress import progress_bar
from diffjax.train.describe import size_text

LARGEST = 8
HEAD = ("component", "class", "parameters", "bytes", "weights")  # of tables of several networks


class Entry(NamedTuple):
    """A tensor or a parameter as `describe_folder` counts it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


def describe_folder(
    folder: str | os.PathLike, *, variant: str | None = None, dtype: str | None = None, mesh: str | None = None,
    sharding: str | None = None, values: bool = False,
) -> tuple[str, bool]:  # fmt: skip
    """What a checkpoint, a config, a file of weights or a pipeline holds, as text, and whether all of it fits.

    Nothing is allocated, and of the weights nothing but headers is read, unless `values` is set.

    Args:
      variant: of the files, such as "fp16".
      dtype: count parameters of floating point as if they were of this type; None for that of the file, or float32.
      mesh: such as "fsdp=8", of any size: adds the bytes on each device.
      sharding: "data", "fsdp" or "rules"; default "rules".
      values: read all weights, and count what is NaN or infinite.

    Raises:
      WeightsError: for damaged files and pickles.
      ValueError: for a config that is not supported, or a mesh or sharding that there is not.
      OSError: if something cannot be read.
    """
    check_dtype("dtype", dtype)
    if sharding and not mesh:
        raise ValueError(f"sharding={sharding!r} needs a mesh, such as 'fsdp=8'")
    settings = dict(dtype=dtype, mesh=mesh, sharding=sharding, values=values)
    if Path(folder, PIPELINE).is_file():
        return _pipeline(Path(folder), variant, settings)
    if variant and Path(folder).is_file():
        raise ValueError(f"{folder} is a file; variant={variant!r} chooses among those of a folder")
    alone = Path(folder).is_file() or not Path(folder, "config.json").is_file()
    if alone and not variant and (file := lora_file(folder)):
        return _lora(file, settings)
    contents = original_components(folder) if Path(folder).is_file() else None
    return _original(contents, settings) if contents and contents.parts else _one(survey(folder, variant), **settings)


def _lora(file: Path, settings):
    """The ranks of an adapter by the parts of the pipeline that it changes."""
    if settings["mesh"]:
        raise ValueError(f"{file}: --mesh is of networks; this is a LoRA")
    ranks = lora_ranks(file)
    alone = Survey(file, "LoRA", find(file), None, {}, {}, None)
    text, sound = _one(alone, **settings, verdict="not compared: load_lora does it, with their network")
    told = [f"{part or 'a part that it does not tell'}, rank {' '.join(map(str, of))}" for part, of in ranks.items()]
    return f"LoRA for {'; '.join(told)}\n{text}", sound


def _pipeline(folder, variant, settings):
    if settings["mesh"]:
        raise ValueError(f"{folder}: --mesh needs one network: name its folder, such as {folder / 'unet'}")
    rows, sound, held = [HEAD], True, {}
    for name, kind in components(folder).items():
        if gone := missing(folder / name, kind):
            rows.append((name, kind, "", "", f"missing: {gone}"))
            sound = False
            continue
        if not (folder / name / "config.json").is_file():
            rows.append((name, kind, "", "", "no network"))
            continue
        try:
            found = survey(folder / name, variant)
            entries = _entries(found, settings["dtype"])
            told = _verdict(found)
        except (ValueError, OSError) as error:
            rows.append((name, kind, "?", "?", " ".join(str(error).split())))
            sound = False
            continue
        sound &= not (found.report and any(found.report))
        rows.append((name, kind, f"{sum(e.count for e in entries):,}", size_text(_total(entries)), told))
        held |= {f"{name}/{key}": tensor for key, tensor in found.tensors.items()}
    text = f"pipeline {folder}\n{_table(rows)}\n"
    if settings["values"]:
        told, fine = _values(held)
        text, sound = text + told, sound and fine
    return text, sound


def _original(contents: Contents, settings):
    """The networks of a file under the names of its authors, and the names of all that belongs to none of them."""
    if settings["mesh"]:
        raise ValueError(f"{contents.path}: --mesh needs one network: write it with diffjax convert --component=")
    rows, sound, beside = [HEAD], True, list(contents.rest)
    for name, part in contents.parts.items():
        beside += [part.prefix + key for key in part.ignored]
        entries = [Entry(key, t.shape, cast(t.dtype, settings["dtype"])) for key, t in part.tensors.items()]
        try:
            found = survey_original(contents.path, name)
            told, fits = _verdict(found), not any(found.report)
        except ValueError as error:
            told, fits = " ".join(str(error).split()), False
        rows.append((name, part.kind, f"{sum(e.count for e in entries):,}", size_text(_total(entries)), told))
        sound &= fits
    text = f"original checkpoint {contents.path}\n{_table(rows)}\n"
    text += f"{len(beside)} of no network: {some(beside)}\n" if beside else ""
    if settings["values"]:
        held = {part.prefix + key: t for part in contents.parts.values() for key, t in part.tensors.items()}
        told, fine = _values(held)
        text, sound = text + told, sound and fine
    return text, sound


def _values(tensors) -> tuple[str, bool]:
    bad = {name: count for name, tensor in _watch(tensors) if (count := unusual(tensor))}
    told = some([f"{name} ({count:,})" for name, count in bad.items()])
    return f"\nNaN or infinite: {told or 'nothing'}\n", not bad


def _one(found: Survey, *, dtype, mesh, sharding, values, verdict=None):
    entries = _entries(found, dtype)
    by_type = Counter()
    for entry in entries:
        by_type[str(entry.dtype)] += entry.nbytes
    types = ", ".join(f"{name} {size_text(count)}" for name, count in by_type.most_common())
    files = sorted({tensor.path.name for tensor in found.tensors.values()})
    rows = [
        ("class", found.kind or "no config beside the file"),
        ("files", some(files, 3) or "no weights"),
        ("parameters", f"{sum(entry.count for entry in entries):,}"),
        ("bytes", f"{size_text(_total(entries))}: {types}" if types else "none"),
        ("weights", verdict or _verdict(found)),
    ]
    text = _table([(str(found.path), ""), *rows]) + "\n\n"
    largest = sorted(entries, key=lambda entry: -entry.nbytes)[:LARGEST]
    shown = [(e.name[:100], str(list(e.shape)), str(e.dtype), size_text(e.nbytes)) for e in largest]
    text += _table([("largest", "shape", "dtype", "bytes"), *shown]) + "\n"
    sound = not (found.report and any(found.report))
    if values:
        told, fine = _values(found.tensors)
        text, sound = text + told, sound and fine
    return text + (_spread(found, entries, mesh, sharding) if mesh else ""), sound


def _entries(found: Survey, dtype) -> list[Entry]:
    """The parameters of a network that is known and whose weights fit, else the tensors."""
    if not found.shapes or (found.report and any(found.report)):
        return [Entry(name, t.shape, cast(t.dtype, dtype)) for name, t in found.tensors.items()]
    types = {
        name: type_of(place, found.tensors, dtype) if found.tensors else cast(found.shapes[name].dtype, dtype)
        for name, place in found.places.items()
    }
    return [Entry(name, tuple(shape.shape), types[name]) for name, shape in found.shapes.items()]


def _verdict(found: Survey) -> str:
    if found.report is None and found.model is not None:
        return "none: a config alone"
    if found.report is None:
        return f"not compared: {'the class is not known here' if found.kind else 'no config tells of what network'}"
    if any(found.report):
        return f"do not fit: {found.report}"
    return "fit, each parameter once" + (f"; {told}" if (told := of_8_bits(found)) else "")


def _spread(found: Survey, entries, mesh, mode):
    """The bytes on each device of a mesh that need not be here."""
    from jax.sharding import AbstractMesh

    from diffjax.train.checks import check_axis_names
    from diffjax.train.parallel.sharding import param_sharding, parse_mesh

    axes = parse_mesh(mesh)
    if not axes or min(axes.values()) < 1:
        raise ValueError(f"--mesh={mesh}: the size of every axis is needed, as in --mesh='data=4,fsdp=8'")
    check_axis_names(axes, f"--mesh={mesh}: ")
    if found.model is None or len(entries) != len(found.shapes):
        raise ValueError(f"{found.path}: --mesh needs a network that is known here, and weights that fit it")
    mode = mode or "rules"
    devices = AbstractMesh(tuple(axes.values()), tuple(axes))
    places = param_sharding(devices, dict(found.shapes), found.model.rules, mode)
    parts = {e.name: e._replace(shape=places[e.name].shard_shape(e.shape)) for e in entries}
    whole = sum(e.nbytes for e in entries if parts[e.name].count == e.count)
    return (
        f"\nmesh {mesh}, sharding {mode!r}: {size_text(_total(parts.values()))} of parameters on each of "
        f"{math.prod(axes.values())} devices, {size_text(whole)} of them not split\n"
    )


def _total(entries) -> int:
    return sum(entry.nbytes for entry in entries)


def _table(rows) -> str:
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _watch(tensors) -> Iterator:
    total = sum(tensor.nbytes for tensor in tensors.values())
    with progress_bar("reading", total) as progress:
        done = 0
        for name, tensor in tensors.items():
            yield name, tensor
            done += tensor.nbytes
            progress(done, total)
