"""From a config and a grid to runs, all of them checked before the first one starts."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from diffjax.train import config as configs
from diffjax.train.errors import ConfigError
from diffjax.train.parts import assemble, resolve

SWEEP_FILE = "sweep.json"


class Run(NamedTuple):
    """One training of a sweep.

    Attributes:
      name: of its folder, made of its settings, so that a longer grid finds it again.
      values: `{config key: value}` of the keys that the grid changes.
      seed: its `config.seed`.
      config: resolved.
      workdir: where it runs.
    """

    name: str
    values: dict
    seed: int
    config: ConfigDict
    workdir: str


def plan_runs(
    config: ConfigDict, grid: Sequence[Mapping[str, str]], seeds: Sequence[int], out: str, *, here: bool = True
) -> list[Run]:
    """The runs of a sweep, seeds of one combination next to each other; nothing is started or written.

    Args:
      config: what they share.
      grid: combinations, as from `parse_grid`.
      seeds: for each combination; none means the config's own.
      out: folder of the sweep.
      here: whether the runs must fit the devices of this machine.

    Raises:
      ConfigError: if a combination cannot run; lists every reason with every combination that it stops.
    """
    if seeds and any("seed" in values for values in grid):
        raise ConfigError("seed is in the grid and in --seeds; give it in one of them")
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"--seeds={','.join(map(str, seeds))} names a seed twice; give each once")
    short, wrong, runs = short_names(grid), {}, {}
    for number, values in enumerate(grid):
        try:
            resolved = checked(changed(config, values), here=here)
            for seed in seeds or (resolved.seed,):
                run = of_settings(resolved, list(values), seed, short=short, out=out)
                if run.name in runs:
                    raise ConfigError("the same settings come twice; leave one of them out")
                runs[run.name] = run
        except ConfigError as error:
            text = ", ".join(f"{key}={value}" for key, value in values.items()) or "the config itself"
            wrong.setdefault(str(error), []).append(f"[{number + 1}] {text}")
    if wrong:
        count = sum(map(len, wrong.values()))
        listed = "; ".join(f"{' and '.join(names)}: {reason}" for reason, names in wrong.items())
        raise ConfigError(f"{count} of {len(grid)} combinations cannot run, and none was started: {listed}")
    return list(runs.values())


def checked(config: ConfigDict, *, here: bool) -> ConfigDict:
    """The resolved config; not `here`, its mesh is left to the machine that runs it, which has other devices."""
    if here:
        return resolve(config)
    filled = configs.fill(config)
    assemble(filled)
    return filled


def changed(config: ConfigDict, values: Mapping[str, str]) -> ConfigDict:
    """A copy of `config` with the texts of `values` set as by `--config.KEY=VALUE`."""
    copy = ConfigDict(config.copy_and_resolve_references())
    for key, text in values.items():
        configs.override(copy, key, text)
    return copy


def of_settings(resolved: ConfigDict, keys: Sequence[str], seed: int, *, short: Mapping, out: str) -> Run:
    """The `Run` of one combination and one seed; its name ends in a digest of the exact settings."""
    config = resolved.copy_and_resolve_references()
    config.seed = seed
    config = configs.fill(config)
    leaves = configs.flat(config)
    values = {key: leaves[key] if key in leaves else str(config[key]) for key in keys}
    shown = [f"{short[key]}={value}" for key, value in values.items() if key != "seed"] + [f"seed={seed}"]
    text = re.sub(r"[^A-Za-z0-9.=+,-]+", "_", ",".join(shown)).replace("_,", ",").strip("_")
    exact = json.dumps([sorted((key, repr(value)) for key, value in values.items()), seed])
    name = f"{text[:80]}-{hashlib.sha256(exact.encode()).hexdigest()[:6]}"
    return Run(name, values, seed, config, os.path.join(out, name))


def short_names(grid: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Each key's last part, or the whole key where two keys share it."""
    keys = list(grid[0]) if grid else []
    last = [key.split(".")[-1] for key in keys]
    return {key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)}


def refuse_other_config(out: str, config: ConfigDict) -> None:
    """Compares what the runs share with what the sweep in `out`, if there is one, was started with; the grid may grow.

    Raises:
      ConfigError: if it differs; lists every difference.
    """
    path = os.path.join(out, SWEEP_FILE)
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        old = configs.flat(configs.fill(ConfigDict(json.load(file)["config"])))
    new = configs.flat(configs.fill(config))
    differ = [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in sorted({**old, **new}) if old.get(k) != new.get(k)]
    if differ:
        raise ConfigError(
            f"{out!r} holds a sweep of another config (stored -> given): {'; '.join(differ)}; "
            "give the stored values to go on with it, or another --out"
        )
