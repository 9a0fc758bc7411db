"""The JSON parts of a checkpoint: sealed with a checksum, so that a changed or half-written one is noticed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffjax.train.checkpoint.errors import CheckpointError, Damaged

FORMAT = 2
STATE, META = "state", "meta"
META_FILE = f"{META}/metadata"
_PACKAGES = ("diffjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def plain(what: str, value: Any) -> Any:
    """The value as it comes back from JSON.

    Raises:
      ValueError: if it cannot be written as JSON; `what` names it.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be stored as JSON: {error}; use dicts, lists, strings and numbers") from None


def seal(content: Any) -> dict:
    """`{"digest": CRC-32 of the sorted JSON text, "content": content}`."""
    return {"digest": digest(content), "content": content}


def digest(content: Any) -> str:
    """CRC-32 of the JSON text with sorted keys, as 8 hexadecimal digits."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def unseal(folder: Path, file: str) -> Any:
    """The content of a sealed JSON file of a checkpoint.

    Raises:
      Damaged: if it is missing, no JSON, or does not match its digest.
    """
    try:
        sealed = json.loads((folder / file).read_text(encoding="utf-8"))
        content = sealed["content"]
        matches = digest(content) == sealed["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    if not matches:
        raise Damaged(f"{file} does not match its checksum")
    return content


def read_meta(folder: Path) -> dict:
    """`step`, `config`, `metrics`, `iterator`, `versions`, `leaves` of the checkpoint in a folder.

    Raises:
      Damaged: as `unseal`.
      CheckpointError: if a later version of diffjax wrote it.
    """
    meta: Mapping = unseal(folder, META_FILE)
    if meta["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {meta['format']}, this version reads up to {FORMAT}; "
            f"use diffjax {meta['versions'].get('diffjax', 'of a later version')}"
        )
    return dict(meta)
