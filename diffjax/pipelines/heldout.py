"""The denoising error on held-out data: one number that runs of any schedule, parameterisation and weight share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import core
from diffjax.core.types import Level
from diffjax.pipelines.judge import read_items

# Log-SNR of the levels.
LOGSNR = tuple(np.linspace(-6.0, 6.0, 13))
SIGMA_DATA = 0.5


def heldout_loss(run, *, batch_size: int = 128) -> dict:
    """`{"loss": mean over levels, "levels": [one a log-SNR], "logsnr": [...], "images": how many}` on held-out images.

    At each level it is EDM's loss (Karras et al. 2022, arXiv:2206.00364, Eq. 8 with the weight of Table 1): the mean
    squared error of x0 times `(s^2 + d^2) / (s d)^2`, s = sigma / alpha and d = 0.5, which for centred data of standard
    deviation d is the error of a target of unit variance. Levels are equally spaced in log-SNR, the noise is the same
    for every run, labels are given. It is no bound on the likelihood and depends on no setting of the training.

    Args:
      run: what `load_run` returned.
      batch_size: images in a call.

    Raises:
      UnreadableError: as `diffjax.pipelines.judge.read_items`, which chooses the images.
    """
    items = read_items(run.dataset.heldout)
    images = np.stack([item["image"] for item in items])
    labels = np.array([int(item["label"]) for item in items], np.int32)
    levels = run.schedule.at_logsnr(jnp.asarray(LOGSNR, jnp.float32))
    errors = jax.jit(lambda params, x0, y, keys: level_errors(run, params, x0, y, keys, levels))
    key, total = jax.random.key(0), np.zeros(len(LOGSNR))
    for start in range(0, len(images), batch_size):
        # The last call is filled with copies of the last image, whose errors are left out.
        rows = np.minimum(np.arange(start, start + batch_size), len(images) - 1)
        kept = min(batch_size, len(images) - start)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(rows))
        total += np.asarray(errors(run.params, images[rows], labels[rows], keys), np.float64)[:, :kept].sum(1)
    mean = total / len(images)
    return {
        "loss": float(mean.mean()), "levels": mean.tolist(), "logsnr": list(LOGSNR), "images": len(images)
    }  # fmt: skip


def level_errors(run, params, x0, labels, keys, levels: Level):
    """`[levels, B]` EDM losses of `x0 [B, H, W, C]`, with noise of its own for each key and level."""
    labels = labels if run.dataset.num_classes else None
    denoise = core.denoiser(lambda x, t: run.model.apply(params, x, t, labels), run.head)

    def at(carry, item):
        number, level = item
        eps = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), x0.shape[1:]))(keys)
        batch = Level(*(jnp.broadcast_to(field, x0.shape[:1]) for field in level))
        prediction = denoise(core.add_noise(x0, eps, batch), batch)
        s = level.sigma / level.alpha
        weight = (s**2 + SIGMA_DATA**2) / (s * SIGMA_DATA) ** 2
        return carry, weight * jnp.mean((prediction.x0 - x0) ** 2, axis=tuple(range(1, x0.ndim)))

    return jax.lax.scan(at, None, (jnp.arange(len(LOGSNR)), levels))[1]
