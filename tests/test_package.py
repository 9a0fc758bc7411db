"""The wheel, away from the checkout: its contents, the command line and the three-line example."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    copy = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "diffjax", "pyproject.toml", "README.md", "LICENSE"], cwd=ROOT, capture_output=True
    )
    names = files.stdout.decode().split() or [str(p.relative_to(ROOT)) for p in (ROOT / "diffjax").rglob("*.py")]
    for name in [*names, "pyproject.toml", "README.md", "LICENSE", "diffjax/py.typed"]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    # No isolation and no download: setuptools comes with the test extra.
    done = subprocess.run([sys.executable, "-c", build, str(folder)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "diffjax/py.typed" in names and "diffjax/core/types.py" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"diffjax"}
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "Apache-2.0" in metadata and "Requires-Dist: jax" in metadata


def test_runs_from_the_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    example = """
import jax, jax.numpy as jnp, diffjax
from diffjax import FLOW, Flow, denoiser, heun, sample, uniform
f, noise, key = (lambda x, t: -x), jnp.ones((2, 3)), jax.random.key(0)
levels = uniform(Flow(), 40)
x0 = sample(heun(), denoiser(f, FLOW), noise, levels, key)
print(diffjax.__file__, float(x0[0, 0]))
"""
    env = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    run = lambda *args: subprocess.run([sys.executable, *args], cwd=tmp_path, env=env, capture_output=True, text=True)
    done = run("-c", example)
    path, value = done.stdout.split()
    assert Path(path).is_relative_to(tmp_path), done.stderr
    assert abs(float(value) - 2.718) < 0.01  # e, by dx/dt = -x over unit time
    done = run("-m", "diffjax", "--help")
    assert done.returncode == 0 and "diffjax train" in done.stdout, done.stderr
