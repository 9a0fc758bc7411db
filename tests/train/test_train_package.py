import subprocess
import sys

import pytest

import diffjax.train


def test_the_names_of_the_package_are_those_of_its_modules():
    from diffjax.train import load_run, train
    from diffjax.train.loop import train as home

    assert train is home and load_run.__module__ == "diffjax.train.state"
    assert all(getattr(diffjax.train, name).__doc__ for name in diffjax.train.__all__)
    assert set(diffjax.train.__all__) <= set(dir(diffjax.train))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        diffjax.train.trian  # noqa: B018


def test_errors_load_neither_orbax_nor_flax():
    code = "import sys, diffjax.train.errors; print([m for m in ('orbax', 'flax', 'optax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
