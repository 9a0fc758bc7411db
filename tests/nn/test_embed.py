"""Embeddings against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffjax.nn import Condition, fourier, sincos_2d, sinusoidal


def test_sinusoidal_against_float64():
    t = np.array([0.0, 0.013, 0.5, 1.0])
    out = sinusoidal(t, 64, time_scale=1000.0)
    for i in range(32):
        phase = 1000.0 * t / 10_000.0 ** (2 * i / 64)
        # A phase of 1000 rad is stored to 6e-8 relative.
        np.testing.assert_allclose(out[:, i], np.cos(phase), atol=2e-4)
        np.testing.assert_allclose(out[:, 32 + i], np.sin(phase), atol=2e-4)


def test_fourier_has_unit_waves_of_random_frequency():
    t = np.linspace(-1.0, 1.0, 41).astype(np.float32)
    out = np.asarray(fourier(t, 512, time_scale=2.0))
    cos, sin = out[:, :256], out[:, 256:]
    np.testing.assert_allclose(cos**2 + sin**2, 1.0, atol=1e-5)
    # E cos(2 pi f (t - s)) = exp(-2 pi^2 time_scale^2 (t - s)^2) for Gaussian f, the Fourier pair of the Gaussian;
    # the standard error over 256 frequencies is at most 1 / sqrt(2 * 256) = 0.044.
    lag = t[:, None] - t[None, :]
    kernel = (cos @ cos.T + sin @ sin.T) / 256
    np.testing.assert_allclose(kernel, np.exp(-2 * (np.pi * 2.0 * lag) ** 2), atol=5 * 0.044)
    np.testing.assert_array_equal(fourier(t, 512, time_scale=2.0), out)


def test_positions_depend_on_row_and_column_separately():
    table = sincos_2d(3, 5, 16).reshape(3, 5, 16)
    assert np.all(table[0, :, :8] == table[2, :, :8]) and np.all(table[:, 0, 8:] == table[:, 4, 8:])
    # The first frequency of each half is 1.
    np.testing.assert_allclose(table[0, :, 0], np.sin(np.arange(5.0)), atol=1e-6)
    np.testing.assert_allclose(table[:, 0, 12], np.cos(np.arange(3.0)), atol=1e-6)
    assert len(np.unique(table.reshape(15, 16).round(5), axis=0)) == 15


@pytest.fixture
def condition():
    settings = dict(waves=8, time_embed="sinusoidal", time_scale=1.0, dtype=jnp.float32)
    return nnx.jit(lambda: Condition(6, 3, **settings, rngs=nnx.Rngs(0)))()


def test_null_label_is_the_last_row(condition, run):
    t = np.linspace(0.0, 1.0, 4, dtype=np.float32)
    null = np.asarray(run(condition, t, None))
    np.testing.assert_array_equal(null, run(condition, t, np.full(4, 3, np.int32)))
    table = np.asarray(condition.label.embedding[...])
    difference = run(condition, t, np.arange(4, dtype=np.int32)) - null
    np.testing.assert_allclose(difference, table[[0, 1, 2, 3]] - table[3], atol=1e-6)


def test_labels_without_classes_are_ignored(run):
    settings = dict(waves=8, time_embed="fourier", time_scale=1.0, dtype=jnp.float32)
    layer = Condition(6, 0, **settings, rngs=nnx.Rngs(0))
    t = np.linspace(0.0, 1.0, 4, dtype=np.float32)
    np.testing.assert_array_equal(run(layer, t, None), run(layer, t, np.arange(4, dtype=np.int32)))
    assert not any("label" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(nnx.state(layer)))
