"""Pictures of samples and runs, as matplotlib figures on the Agg canvas: no display and no global state."""

from diffjax.viz.curves import loss_curves, quality_curves, read_metrics
from diffjax.viz.figure import first_channels, save
from diffjax.viz.grids import image_grid, mosaic, nearest, neighbour_grid
from diffjax.viz.strips import denoising_strip
from diffjax.viz.sweeps import sweep_dots

__all__ = [
    "denoising_strip", "first_channels", "image_grid", "loss_curves", "mosaic", "nearest", "neighbour_grid",
    "quality_curves", "read_metrics", "save", "sweep_dots",
]
