"""Shared by the tests of layers."""

import pytest
from flax import nnx


@pytest.fixture(scope="session")
def run():
    """`run(layer, *given)` calls a layer under jit: one program, not one for each of its operations."""
    return nnx.jit(lambda layer, *given: layer(*given))
