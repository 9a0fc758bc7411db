"""What the files of a folder of weights are called."""

from __future__ import annotations

import re

# diffusers' name, that of transformers, and ours for parameters under their own names.
PARAMS = "params"
STEMS = ("diffusion_pytorch_model", "model", PARAMS)


def weights_of(stem: str, variant: str | None = None, i: int = 0, count: int = 1, tag: str = "") -> str:
    """The file with part `i` of `count`, such as `model.fp16-00001-of-00002.safetensors`; a tag such as "-2" tells it
    from one that has that name already."""
    part = f"{tag}-{i + 1:05d}-of-{count:05d}" if count > 1 else ""
    return f"{stem}{f'.{variant}' if variant else ''}{part}.safetensors"


def index_of(stem: str, variant: str | None = None) -> str:
    """The file that tells which tensor lies in which part."""
    return f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"


def indices_of(stem: str, variant: str | None = None) -> tuple[str, ...]:
    """What the index may be called: as it is written, and as diffusers once called that of a variant."""
    return index_of(stem, variant), *((f"{stem}.safetensors.{variant}.index.json",) if variant else ())


def is_index(name: str) -> bool:
    """Whether a file is the index of some weights in several files."""
    return bool(re.fullmatch(r".+\.safetensors(\.[^.]+)?\.index(\.[^.]+)?\.json", name))


def is_of(name: str, variant: str | None = None) -> bool:
    """Whether a file holds weights of this variant, whole or in parts, or is their index."""
    start = f"({'|'.join(STEMS)}){re.escape(f'.{variant}' if variant else '')}"
    parts = rf"{start}((-\d+)?-\d{{5}}-of-\d{{5}})?\.safetensors"
    indices = [name for stem in STEMS for name in indices_of(stem, variant)]
    return name in indices or bool(re.fullmatch(parts, name))
