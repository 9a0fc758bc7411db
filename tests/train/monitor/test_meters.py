"""MFU by hand arithmetic, and memory against the system's own account."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from diffjax.train.monitor.meters import peak_memory, usage


def test_mfu_is_the_share_of_the_peak_of_all_devices():
    # 2 steps a second of 98.94 TFLOP on 4 devices of 989.4 TFLOP/s each: a twentieth of the peak.
    found = usage({"steps_per_s": 2.0}, 98.94e12, [SimpleNamespace(device_kind="NVIDIA H200")] * 4)
    assert found["tflops_per_s"] == pytest.approx(49.47) and found["mfu"] == pytest.approx(0.05)
    assert "mfu" not in usage({"steps_per_s": 2.0}, 1e12, [SimpleNamespace(device_kind="cpu")])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's own account of a process")
def test_memory_is_the_peak_that_the_system_counts():
    held = np.ones(1 << 26, np.uint8)
    del held
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = int(lines["VmHWM"].split()[0])
    # The kernel adds up the pages of each thread with a delay of some dozens of them.
    assert peak_memory() == pytest.approx(1024 * kilobytes, rel=0.01)
