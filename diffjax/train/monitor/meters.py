"""How much of the machine a run uses: FLOP/s, MFU and memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence

import jax

from diffjax.train.parallel.accelerators import accelerator_of


def usage(rates: Mapping[str, float], flops: float, devices: Sequence[jax.Device]) -> dict[str, float]:
    """What to log beside the rates of a window.

    `tflops_per_s` per device, of the step's model FLOPs (matrix products and convolutions, without what is computed
    again to save memory); `mfu`, the same over the peak of the device in bfloat16 (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B), where the peak is known; `memory_gib`, the most that a device of this process (on a
    CPU the process itself) has held so far.

    Args:
      rates: with `steps_per_s`.
      flops: model FLOPs of one step on all devices together.
      devices: all that the step runs on.
    """
    per_device = rates["steps_per_s"] * flops / len(devices)
    found = {"tflops_per_s": per_device / 1e12, "memory_gib": peak_memory() / 2**30}
    kind = accelerator_of(devices[0].device_kind)
    return found | ({"mfu": per_device / kind.peak_flops} if kind else {})


def peak_memory() -> int:
    """Bytes: the most that a local device has held at once, or of the process where the devices do not tell."""
    told = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if any(told):
        return max(peak for peak in told if peak)
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
