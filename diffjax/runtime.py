"""Settings of the whole process that a command makes before it computes: the compile cache and the host's memory."""

from __future__ import annotations

import ctypes
import importlib.util
import os

# Parameters of glibc's mallopt(3).
_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1


def set_up() -> None:
    """Makes both settings, for `diffjax train` and the other commands that compute."""
    keep_freed_memory()
    use_compile_cache()


def use_compile_cache() -> str | None:
    """Turns on JAX's compile cache on disk and returns its folder, or None where it is turned off.

    `JAX_COMPILATION_CACHE_DIR` chooses the folder, else it is `diffjax/jax` in the user's cache folder;
    `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    """
    import jax

    if not jax.config.jax_enable_compilation_cache:
        return None
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        folder = os.path.join(home, "diffjax", "jax")
        jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # The default of a second leaves out the dozens of small programs that a start compiles besides the step.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def keep_freed_memory() -> bool:
    """Where the CPU computes, lets the C library keep freed memory for the next step; whether it does.

    XLA's CPU back end allocates what a step needs anew in every step. By default glibc maps areas of over 32 MiB for
    that and unmaps them at the end, and the system hands them out again page by page. It must come before JAX starts
    its back end, whose threads would have arenas of their own.

    Blocks of less than 1 GiB are kept, and up to 2 GiB at the end of the heap.

    Nothing is done on a machine with an accelerator's plugin, with another C library than glibc, or where the user has
    settings of the allocator in the environment (`MALLOC_...`, `GLIBC_TUNABLES`).
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    plugin = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or (platforms.split(",")[0] != "cpu" if platforms else plugin):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        # Other libraries may have a mallopt of another meaning.
        libc.gnu_get_libc_version  # noqa: B018
    except (OSError, AttributeError):
        return False
    # Versions that do not take this size would map every large block anew, and more of them than without the others.
    if libc.mallopt(_MMAP_THRESHOLD, 1 << 30) != 1:
        return False
    return libc.mallopt(_ARENA_MAX, 1) == 1 and libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1) == 1
