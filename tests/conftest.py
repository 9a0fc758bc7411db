"""Shared by all tests: a cache of compiled programs that outlives the run, cheap compilation, float64 on demand."""

import os
import signal
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

# Before jax is imported. Tests compare numbers, not speed: most of their time would be spent in LLVM.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Without these emitters a program is one module of LLVM, not one for each loop in it: it compiles in 0.6 of the time.
# jaxlib 0.10 is known to take the flag, 0.12 refuses it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10."),
)

import jax
import pytest


def pytest_configure():
    # A shell that starts the tests in the background has them ignore Ctrl-C, and so would each program that they start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of a test marked `often(PATTERN, ...)` the cases whose id no pattern fits are slow."""
    unmatched = {}
    for item in items:
        if often := item.get_closest_marker("often"):
            fits = {pattern for pattern in often.args if fnmatch(item.callspec.id, pattern)}
            left = unmatched.setdefault(item.nodeid.partition("[")[0], set(often.args))
            left -= fits
            if not fits:
                item.add_marker(pytest.mark.slow)
    wrong = {name: left for name, left in unmatched.items() if left}
    if wrong and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"patterns of `often` that fit no case: {wrong}")


@pytest.fixture
def x64():
    """Runs the test in float64."""
    with jax.enable_x64(True):
        yield
