"""What the files of a folder of weights are called."""

from __future__ import annotations

import re

# diffusers' name, that of transformers, and ours for parameters under their own names.
PARAMS = "params"
STEMS = ("diffusion_pytorch_model", "model", PARAMS)


def weights_of(stem: str, variant: str | None = None, i: int = 0, count: int = 1) -> str:
    """The file with part `i` of `count`, such as `model.fp16-00001-of-00002.safetensors`."""
    part = f"-{i + 1:05d}-of-{count:05d}" if count > 1 else ""
    return f"{stem}{f'.{variant}' if variant else ''}{part}.safetensors"


def index_of(stem: str, variant: str | None = None) -> str:
    """The file that tells which tensor lies in which part."""
    return f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"


def is_of(name: str, variant: str | None = None) -> bool:
    """Whether a file holds weights of this variant, whole or in parts, or is their index."""
    start = f"({'|'.join(STEMS)}){re.escape(f'.{variant}' if variant else '')}"
    parts = rf"{start}(-\d{{5}}-of-\d{{5}})?\.safetensors"
    return name in [index_of(stem, variant) for stem in STEMS] or bool(re.fullmatch(parts, name))
