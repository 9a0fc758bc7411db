"""What every picture shares: figures measured in pixels, text widths, grey ranges, saving. No pyplot, no globals."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

DPI = 100
TITLE, TEXT = 11, 9
INK, FAINT = "#1a1a1a", "#666666"
COLOURS = ("#0b5fa5", "#d1495b", "#2e8b57", "#e09f3e", "#6a4c93", "#5c6670", "#11a1a1", "#a05a2c")


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of `width` by `height` pixels, with an Agg canvas of its own."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | os.PathLike) -> Path:
    """Writes `figure` as a PNG of its own size; the path comes back and its folder is made where missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI)
    return path


def pixels_of(points: float) -> float:
    """Font points as pixels of a figure from `new_figure`."""
    return points * DPI / 72


@lru_cache(maxsize=4096)
def text_width(text: str, size: float = TEXT, weight: str = "normal") -> float:
    """Width in pixels of the widest line of `text` at `size` points in the default font, as Agg draws it."""
    font = FontProperties(size=size, weight=weight)
    ruler = RendererAgg(1, 1, DPI)
    return max(ruler.get_text_width_height_descent(line, font, ismath=False)[0] for line in text.split("\n")) + 1


def line_height(size: float = TEXT) -> float:
    """Distance in pixels between the lines of a text at `size` points."""
    return pixels_of(size) * 1.35


def wrap(text: str, width: float, size: float = TEXT, weight: str = "normal") -> str:
    """`text` broken at spaces into lines of at most `width` pixels (a longer word keeps a line of its own)."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(joined, size, weight) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return "\n".join(lines)


def first_channels(images):
    """What can be shown of `[..., C]`: the first three channels, or the first if there are fewer."""
    return images[..., : 3 if images.shape[-1] >= 3 else 1]


def to_display(images, *, max_value: int | None = None) -> np.ndarray:
    """Images as RGB float32 `[N, H, W, 3]` in `[0, 1]`, clipped.

    Args:
      images: `[N, H, W, C]` with C = 1 or 3; floats are read as `[-1, 1]`, integers as `[0, max_value]`.
      max_value: the integer that shows as white, 255 by default.

    Raises:
      ValueError: for another rank or number of channels.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images of shape {images.shape}: expected [N, H, W, C] with C = 1 or 3")
    if np.issubdtype(images.dtype, np.integer):
        scaled = images.astype(np.float32) / (255 if max_value is None else max_value)
    else:
        scaled = (images.astype(np.float32) + 1) / 2
    scaled = np.clip(np.nan_to_num(scaled, nan=0.0), 0, 1)
    return np.repeat(scaled, 3, axis=-1) if images.shape[-1] == 1 else scaled
