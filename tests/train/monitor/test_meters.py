"""MFU by hand arithmetic, and memory against what the test itself allocates."""

from types import SimpleNamespace

import numpy as np
import pytest

from diffjax.train.monitor.meters import peak_memory, usage


def test_mfu_is_the_share_of_the_peak_of_all_devices():
    # 2 steps a second of 98.94 TFLOP on 4 devices of 989.4 TFLOP/s each: a twentieth of the peak.
    found = usage({"steps_per_s": 2.0}, 98.94e12, [SimpleNamespace(device_kind="NVIDIA H200")] * 4)
    assert found["tflops_per_s"] == pytest.approx(49.47) and found["mfu"] == pytest.approx(0.05)
    assert "mfu" not in usage({"steps_per_s": 2.0}, 1e12, [SimpleNamespace(device_kind="cpu")])


def test_memory_grows_by_what_is_allocated():
    before = peak_memory()
    held = np.ones(1 << 27, np.uint8)
    # The peak may have been higher than the present use by less than what is allocated here, never the other way round.
    assert before <= peak_memory() and peak_memory() >= held.nbytes
