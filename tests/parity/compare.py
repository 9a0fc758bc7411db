"""What parity asks: outputs and gradients here against those that PyTorch recorded, without torch or jax."""

from __future__ import annotations

import re

import networks
import numpy as np

# PyTorch in float32 lies 3e-8 to 8e-6 from itself in float64.
TOLERANCE = dict(atol=2e-5, rtol=1e-4)
# What multiplies sines and cosines of the time. A frequency that PyTorch's exponential rounds the other way turns the
# phase by 6e-5 at t = 1000, and with it every gradient of these weights by that much of the largest.
OF_TIME = re.compile(r"(time|emb_fourier|t_embedder|map_|temb)")
# Networks of which one case has gradients recorded in its committed file.
GRADIENTS = ("unet_2d_ddpm", "unet_cond_sd", "dit", "sd35", "flux-fill", "vae")


def close_gradient(mine, truth, name: str, rounding: float = 0.0) -> None:
    """Asserts that a gradient is PyTorch's.

    Args:
      mine, truth: arrays of one shape.
      name: of the parameter, as in the checkpoint.
      rounding: the largest error that PyTorch itself makes in this tensor in float32. Sums of many terms that cancel
        are as uncertain as that in another order too, so of a few times this no more can be said.
    """
    truth = np.asarray(truth)
    wide = TOLERANCE["rtol"] * np.abs(truth).max(initial=0.0) if OF_TIME.search(name) else 0.0
    atol = TOLERANCE["atol"] + wide + 4 * rounding
    np.testing.assert_allclose(mine, truth, rtol=TOLERANCE["rtol"], atol=atol, err_msg=name)


def summary(name: str, gradient) -> np.ndarray:
    """Three numbers of a gradient: its root mean square, and two projections on directions drawn from its name.

    The projections are divided by the root of the size, so that an error in each entry shows in its own size.
    """
    flat = np.asarray(gradient, np.float64).ravel()
    rows = networks.generator(f"{name}/directions").standard_normal((2, flat.size))
    return np.array([np.sqrt(np.mean(flat**2)), *(rows @ flat / np.sqrt(flat.size))])


def close_summary(name: str, gradient, truth) -> None:
    """Asserts that a gradient has the summary that PyTorch's has."""
    atol = TOLERANCE["atol"] + TOLERANCE["rtol"] * truth[0]
    np.testing.assert_allclose(summary(name, gradient), truth, rtol=0, atol=atol, err_msg=name)
