"""Exported samplers: the same numbers from the file, for any batch, without the code; damaged files say so."""

import os
import subprocess
import sys
import zipfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

pytest.importorskip("flatbuffers")
GRID = dj.uniform(dj.Flow(), 4)
PARAMS = {"w": jnp.array([[1.0, 0.2], [0.0, 0.5]], jnp.bfloat16), "b": jnp.array([0.1, -0.2])}


def denoiser(params):
    return dj.denoiser(lambda x, t: jnp.tanh(x @ params["w"].astype(x.dtype) + params["b"]) * t[:, None], dj.FLOW)


@pytest.fixture(scope="module")
def traces():
    return []


@pytest.fixture(scope="module")
def sampler(traces):
    def fn(params, x, key):
        traces.append(1)
        return dj.sample(dj.ddim(0.5), denoiser(params), x, GRID, key)

    return fn


@pytest.fixture(scope="module")
def file(sampler, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "sampler.zip"
    dj.save_sampler(path, partial(sampler), shape=(2,), params=PARAMS)
    return path


def test_the_file_samples_as_the_function_does_at_any_batch(file, sampler, traces):
    loaded, key = dj.load_sampler(file), jax.random.key(7)
    expected = {}
    for n in (1, 3, 7):
        x = jax.random.normal(jax.random.key(n), (n, 2))
        expected[n] = x, jax.jit(sampler)(PARAMS, x, key)
    before = len(traces)
    for x, out in expected.values():
        np.testing.assert_allclose(loaded(x, key), out, atol=1e-6)
    assert len(traces) == before  # not one call of the Python function
    assert float(jnp.abs(loaded(x, jax.random.key(8)) - out).max()) > 0.01


def test_a_process_without_the_code_reads_it(file, sampler, tmp_path):
    x = jax.random.normal(jax.random.key(3), (3, 2))
    np.save(tmp_path / "x.npy", x)
    program = (
        "import sys, numpy as np, jax, diffjax as dj; x = np.load(sys.argv[2]);"
        "np.save(sys.argv[3], dj.load_sampler(sys.argv[1])(x, jax.random.key(7)))"
    )
    args = [file, tmp_path / "x.npy", tmp_path / "out.npy"]
    subprocess.run([sys.executable, "-c", program, *map(str, args)], check=True, env=os.environ, timeout=120)
    expected = jax.jit(sampler)(PARAMS, x, jax.random.key(7))
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)


def test_a_key_per_sample_and_none(tmp_path):
    fn = lambda x, key: dj.sample(dj.ddim(1.0), denoiser(PARAMS), x, GRID, key)
    dj.save_sampler(tmp_path / "each", fn, shape=(2,), keys="each")
    x, keys = jnp.ones((3, 2)), jax.random.split(jax.random.key(0), 3)
    loaded = dj.load_sampler(tmp_path / "each")
    out = loaded(x, keys)
    np.testing.assert_allclose(out, jax.jit(fn)(x, keys), atol=1e-6)
    np.testing.assert_allclose(loaded(x[:1], keys[2:])[0], out[2], atol=1e-6)
    with pytest.raises(ValueError, match=r"expected typed keys of shape \(3,\)"):
        loaded(x, keys[0])

    dj.save_sampler(
        tmp_path / "none", lambda x: dj.sample(dj.euler(), denoiser(PARAMS), x, GRID), shape=(2,), keys=None
    )
    plain = dj.load_sampler(tmp_path / "none")
    assert plain(x).shape == (3, 2)
    with pytest.raises(ValueError, match="without a key"):
        plain(x, keys[0])


def test_calls_that_do_not_fit_say_so(file):
    loaded, key = dj.load_sampler(file), jax.random.key(0)
    with pytest.raises(ValueError, match=r"x of shape \[b, 2\], got \(4, 3\)"):
        loaded(jnp.ones((4, 3)), key)
    with pytest.raises(ValueError, match="dtype float32, got float16"):
        loaded(jnp.ones((4, 2), jnp.float16), key)
    with pytest.raises(ValueError, match="typed keys of shape .* got none"):
        loaded(jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="typed keys"):
        loaded(jnp.ones((4, 2)), jnp.zeros(2, jnp.uint32))
    with pytest.raises(ValueError, match="keys of .*fry.*, got .*rbg"):
        loaded(jnp.ones((4, 2)), jax.random.key(0, impl="rbg"))


def test_files_that_are_not_samplers_say_so(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="no sampler at"):
        dj.load_sampler(tmp_path / "missing")
    whole = file.read_bytes()
    bad = tmp_path / "bad"
    for damaged in (whole[: len(whole) // 2], whole[:-10], b"", b"not a sampler"):
        bad.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or not a sampler"):
            dj.load_sampler(bad)
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    bad.write_bytes(flipped)
    with pytest.raises(ValueError, match="damaged or not a sampler"):
        dj.load_sampler(bad)
    np.savez(tmp_path / "foreign.npz", a=np.ones(3))
    with pytest.raises(ValueError, match="not a sampler written by save_sampler"):
        dj.load_sampler(tmp_path / "foreign.npz")
    with zipfile.ZipFile(bad, "w") as later:
        later.writestr("meta.json", '{"format": "diffjax-sampler", "version": 99}')
    with pytest.raises(ValueError, match="format version 99"):
        dj.load_sampler(bad)


def test_a_failed_write_leaves_the_file_as_it_was(file, tmp_path):
    target = tmp_path / "sampler"
    target.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError):
        dj.save_sampler(target, lambda x, key: 1 / 0, shape=(2,))
    assert target.read_bytes() == b"before" and list(tmp_path.iterdir()) == [target]


def test_settings_that_do_not_fit_say_so(tmp_path):
    with pytest.raises(ValueError, match="keys: expected one of 'one', 'each', None"):
        dj.save_sampler(tmp_path / "a", lambda x, key: x, shape=(2,), keys="two")
    with pytest.raises(ValueError, match="without the batch"):
        dj.save_sampler(tmp_path / "a", lambda x, key: x, shape=(None, 2))
