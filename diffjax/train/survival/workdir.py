"""The folder of a run: one writer at a time, the config that the run was started with, and what its data are."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from diffjax import data, files
from diffjax.train import config as configs
from diffjax.train.errors import ConfigError, WorkdirError

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
LOCK_FILE = "lock"
HISTORY_FILE = "config_history.jsonl"


def read_config(workdir: str) -> ConfigDict:
    """The filled config that a run was started with.

    Raises:
      ConfigError: if `workdir` holds no run, or its config is not JSON.
    """
    path = os.path.join(workdir, CONFIG_FILE)
    if not os.path.isfile(path):
        raise ConfigError(f"{workdir!r} holds no run: no {CONFIG_FILE}; make one with `diffjax train --workdir=...`")
    try:
        with open(path, encoding="utf-8") as stream:
            stored = ConfigDict(json.load(stream))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); restore it, every checkpoint holds a copy of it") from error
    return configs.fill(stored)


def refuse_changes(workdir: str, config: ConfigDict, *, allow: bool = False) -> ConfigDict | None:
    """The config that the run in `workdir` was started with, None without one, after a comparison with the given one.

    Args:
      workdir: folder of a run, or one that is not there yet.
      config: filled.
      allow: lets any difference pass; `note_changes` then writes it down.

    Raises:
      ConfigError: if they differ in anything that the next update depends on; lists every difference.
    """
    stored = None
    if os.path.exists(os.path.join(workdir, CONFIG_FILE)):
        stored = read_config(workdir)
        changed = configs.differences(stored, config)
        if changed and not allow:
            raise ConfigError(
                f"{workdir!r} holds a run with another config (stored -> given): {'; '.join(changed)}; "
                "give the stored values to go on with it, another --workdir to start afresh, or, where the network's "
                "parameters keep their shapes, --allow_changes to go on with the given ones"
            )
    return stored


def note_changes(
    workdir: str, step: int, stored: ConfigDict | None, config: ConfigDict, others: Sequence[str] = ()
) -> list[str]:
    """What a run changes, written to `config_history.jsonl`: `{"step": 20, "changes": [...]}` a line.

    Args:
      workdir: folder of the run.
      step: that it goes on from.
      stored: what `refuse_changes` returned.
      config: what it goes on with.
      others: changes of something else than the config.
    """
    changes = [*(configs.differences(stored, config, without=()) if stored is not None else []), *others]
    if changes:
        with open(os.path.join(workdir, HISTORY_FILE), "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "changes": changes}) + "\n")
    return changes


def write_config(workdir: str, config: ConfigDict) -> None:
    """Writes `config.json` in one move, so that a reader never sees half of it."""
    files.write_text(os.path.join(workdir, CONFIG_FILE), configs.to_json(config) + "\n", tag="run")


def write_data_facts(workdir: str, config: ConfigDict, dataset: Any) -> None:
    """Writes `data.json`: what drawing samples takes of the data set that `config.data` names, null where that cannot
    be described."""
    text = json.dumps({"data": config.data, "facts": data.facts_of(dataset)}, indent=2) + "\n"
    files.write_text(os.path.join(workdir, DATA_FILE), text, tag="run")


def read_data_facts(workdir: str, config: ConfigDict) -> Any | None:
    """The data set of a run without its items; None where the run has no note of what its `config.data` names.

    Raises:
      ConfigError: if the note is damaged, or its decoder of latents cannot be imported.
    """
    path = os.path.join(workdir, DATA_FILE)
    if not os.path.isfile(path):
        return None
    with configs.naming("config.data"):
        try:
            with open(path, encoding="utf-8") as stream:
                note = json.load(stream)
            if note["data"] != config.data or note["facts"] is None:
                return None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is damaged ({error}); delete it, and the data themselves are opened") from error
        return data.without_items(note["facts"])


def locked(workdir: str) -> contextlib.AbstractContextManager[None]:
    """Holds the lock of a folder while the block lasts.

    Raises:
      WorkdirError: if another process holds it.
    """

    def refusal(owner):
        given = f"{workdir!r} is in use: process {owner} is training there"
        return WorkdirError(f"{given}; wait for it, stop it, or give another --workdir")

    return files.locked(os.path.join(workdir, LOCK_FILE), refusal)
