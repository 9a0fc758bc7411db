"""The compile cache's place, and memory that is kept between two runs of a program."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from diffjax.runtime import use_compile_cache

# Page faults of a run of a program, as a share of the 9216 pages of its result: 36 MiB, more than glibc itself keeps.
FAULTS = """
import resource, sys
from diffjax import runtime
kept = runtime.keep_freed_memory() if sys.argv[1] == "keep" else None
import jax.numpy as jnp, jax
x = jnp.ones((3072, 3072))
add, runs = jax.jit(lambda x: x + 1), int(sys.argv[2])
for _ in range(runs):
    add(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(runs):
    add(x).block_until_ready()
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / runs / (x.nbytes / 4096))
"""


def faults(mode, runs, **environ):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", FAULTS, mode, str(runs)]
    done = subprocess.run(
        command, env=clean | {"JAX_PLATFORMS": "cpu"} | environ, capture_output=True, text=True, check=True
    )
    kept, share = done.stdout.split()
    return kept, float(share)


def test_the_compile_cache_is_where_it_is_asked_for(monkeypatch):
    # The suite's own cache, from JAX_COMPILATION_CACHE_DIR, is left as it is.
    assert use_compile_cache() == jax.config.jax_compilation_cache_dir
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert use_compile_cache() == str(Path("/somewhere/diffjax/jax"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_kept_memory_is_not_mapped_again():
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if platform.libc_ver()[0] != "glibc" or (huge.exists() and "[always]" in huge.read_text()):
        pytest.skip("another C library than glibc, or pages of another size")
    # It takes some tens of runs until all blocks are there that they need.
    kept, share = faults("keep", 40)
    if kept == "False":
        pytest.skip("a glibc that takes no such threshold")
    assert share < 0.25
    # What it is there for: without it every page of every result is new.
    assert faults("leave", 4)[1] > 0.9


@pytest.mark.often("malloc")
@pytest.mark.parametrize(
    "environ",
    [dict(MALLOC_ARENA_MAX="4"), dict(JAX_PLATFORMS="", GLIBC_TUNABLES="glibc.malloc.arena_max=4")],
    ids=["malloc", "tunables"],
)
def test_the_users_own_allocator_settings_stay(environ):
    assert faults("keep", 1, **environ)[0] == "False"
