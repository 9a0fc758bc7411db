"""What the files of a folder of weights are called."""

from __future__ import annotations

import re

# diffusers' name, and that of transformers.
STEMS = ("diffusion_pytorch_model", "model")


def weights_of(stem: str, variant: str | None = None, i: int = 0, count: int = 1) -> str:
    """The file with part `i` of `count`, such as `model.fp16-00001-of-00002.safetensors`."""
    part = f"-{i + 1:05d}-of-{count:05d}" if count > 1 else ""
    return f"{stem}{f'.{variant}' if variant else ''}{part}.safetensors"


def index_of(stem: str, variant: str | None = None) -> str:
    """The file that tells which tensor lies in which part."""
    return f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"


def is_of(name: str, stem: str, variant: str | None = None) -> bool:
    """Whether a file holds weights of this stem and variant, whole or in parts, or is their index."""
    start = re.escape(stem + (f".{variant}" if variant else ""))
    return name == index_of(stem, variant) or bool(re.fullmatch(rf"{start}(-\d{{5}}-of-\d{{5}})?\.safetensors", name))
