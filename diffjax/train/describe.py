"""What a run would be, and what it would run on, as text; nothing is trained."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from diffjax.runtime import use_compile_cache
from diffjax.train import config as configs
from diffjax.train import paths
from diffjax.train.parallel import sharding
from diffjax.train.parallel.flops import step_flops
from diffjax.train.parts import prepare
from diffjax.train.setup import trace_step
from diffjax.train.state import abstract_state

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml-collections", "numpy", "scikit-learn")
# Of pyproject.toml, without what is for development: what each is for, and the packages that it needs.
EXTRAS = {
    "export": ("samplers as files", ("flatbuffers",)),
    "kernels": ("fused attention", ("tokamax",)),
    "slurm": ("sweeps as SLURM jobs", ("submitit",)),
    "tensorboard": ("TensorBoard files", ("tensorboardX",)),
    "text": ("tokenizers of text encoders", ("sentencepiece", "tokenizers")),
    "tfds": ("data of TensorFlow Datasets", ("importlib_resources", "tensorflow-datasets")),
}


def describe(config: ConfigDict, *, compile: bool = True) -> str:
    """The resolved config, every parameter with its size and sharding, the state's bytes, one step's FLOPs and memory.

    Args:
      config: as for `diffjax.train.loop.train`.
      compile: whether to compile the step, which is what XLA's count of its temporary memory takes.

    Raises:
      ConfigError: for a config that cannot run.
    """
    config, parts = prepare(config)
    state = abstract_state(parts)
    mesh = sharding.make_mesh(sharding.parse_mesh(config.mesh))
    places = sharding.state_sharding(mesh, state, parts.model.rules, config.sharding)
    text = "config\n" + configs.to_json(config) + "\n\n" + parameter_table(state.params, places.params)
    average = _bytes(state.ema)
    text += (
        f"\nstate: {size_text(_bytes(state))}"
        f" = parameters {size_text(_bytes(state.params))} + averages {size_text(average)}"
        f" + optimiser {size_text(_bytes(state.opt_state))}\n"
        f"mesh: {dict(mesh.shape)} over {mesh.size} {mesh.devices.flat[0].device_kind} device(s), "
        f"sharding {config.sharding!r}\n"
    )
    traced = [trace_step(config, parts, mesh, places, shape) for shape in parts.dataset.shapes] if compile else []
    count = step_flops(config, parts, traced[0].jaxpr if traced else None)
    text += f"one step of batch {config.batch_size}: {count.model:.4g} FLOPs in matrix products and convolutions"
    if count.hardware > count.model:
        text += f" ({count.hardware:.4g} with what rematerialisation repeats)"
    if compile:
        programs = (step.lower().compile() for step in traced)
        sizes = [memory.temp_size_in_bytes for p in programs if (memory := p.memory_analysis())]
        text += f", {size_text(max(sizes))} of temporary memory per device" if sizes else ""
    return text + "\n"


def describe_plan(config: ConfigDict, mesh: str, *, sharding: str | None = None, accelerator: str | None = None) -> str:
    """What a step would take on a mesh that need not be here: bytes, FLOPs, collectives and times.

    Args:
      config: as for `diffjax.train.loop.train`.
      mesh, sharding: as for `diffjax.train.parallel.plan.plan`.
      accelerator: a name of `ACCELERATORS`; None for all of them.

    Raises:
      ConfigError: for a config, a mesh or a sharding that cannot run.
      ValueError: for an unknown accelerator.
    """
    from diffjax.train.parallel import accelerators
    from diffjax.train.parallel.plan import plan, plan_text

    rows = [accelerators.accelerator(accelerator)] if accelerator else list(accelerators.ACCELERATORS.values())
    return plan_text(plan(config, mesh, sharding=sharding), rows)


def parameter_table(params: Mapping, places: Mapping) -> str:
    """One row per parameter: name, shape, dtype, count, and the mesh axes that split it; then the total."""
    rows = [("name", "shape", "dtype", "size", "sharding")]
    names = paths.named_leaves(params)
    for (name, leaf), place in zip(names.items(), jax.tree.leaves(places), strict=True):
        spec = ", ".join("-" if axis is None else str(axis) for axis in place.spec) or "replicated"
        rows.append((name, str(leaf.shape), str(leaf.dtype), f"{leaf.size:,}", spec))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = sum(leaf.size for leaf in names.values())
    return "\n".join(["parameters", *lines, f"total: {total:,} parameters, {size_text(_bytes(params))}"]) + "\n"


def machine() -> str:
    """Versions, devices with their memory, the compile cache and the optional packages."""
    from diffjax import __version__

    lines = [f"diffjax {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += ["", "packages", *(f"  {name} {_version(name)}" for name in PACKAGES)]
    lines += ["", f"devices ({jax.default_backend()}, {jax.process_count()} process(es), {os.cpu_count()} CPU cores)"]
    for device in jax.devices():
        stats = device.memory_stats() or {}
        limit = f", {size_text(stats['bytes_limit'])} of memory" if "bytes_limit" in stats else ""
        used = f", {size_text(stats['bytes_in_use'])} in use" if "bytes_in_use" in stats else ""
        lines.append(f"  {device.id}: {device.device_kind}{limit}{used}")
    lines.append(f"  host memory: {size_text(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))}")
    cache = use_compile_cache()
    lines += ["", f"compile cache: {cache or 'off (JAX_ENABLE_COMPILATION_CACHE)'}", "", "extras"]
    lines += [_extra(extra, what, packages) for extra, (what, packages) in EXTRAS.items()]
    return "\n".join(lines) + "\n"


def _extra(extra: str, what: str, packages: tuple[str, ...]) -> str:
    versions = {name: _version(name) for name in packages}
    needs = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"  {extra}: {what}; {needs}" + f": pip install 'diffjax[{extra}]'" * ("missing" in versions.values())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _bytes(tree) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def size_text(count: float) -> str:
    power = min(int(math.log2(max(count, 1)) // 10), 3)
    return f"{count / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
