"""What accelerators can do according to their makers: the figures behind MFU and behind plans of runs.

Dense bfloat16 peaks, without the factor 2 that sparsity adds on some sheets. Sources:

- A100 SXM 80GB and 40GB: NVIDIA A100 Tensor Core GPU data sheets (2022 and 2020).
- H100 SXM: NVIDIA H100 Tensor Core GPU data sheet (2024).
- H200 SXM: NVIDIA H200 Tensor Core GPU data sheet (2024).
- B200: NVIDIA HGX B200 data sheet, per GPU (2025).
- TPU v4, v5e, v5p, v6e: the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of the Cloud TPU documentation, per
  chip; JAX shows a chip of these generations as one device, except for v4 and v5p without megacore.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from diffjax.registry import nearest

_GB, _GiB, _T = 1e9, 2.0**30, 1e12


class Accelerator(NamedTuple):
    """One accelerator, as one JAX device.

    Attributes:
      name: the key in `ACCELERATORS`.
      peak_flops: bfloat16 matrix products, floating-point operations per second, dense.
      hbm: bytes of its memory.
      hbm_bandwidth: bytes per second between memory and chip.
      link_bandwidth: bytes per second that it can send to its peers over all its NVLink or ICI links together; the
        sheets give twice that where they add both directions. Between machines GPUs have less: see `domain`.
      domain: devices that these links join; more are joined by a network that the figures here do not describe.
      kind: regular expression that the `device_kind` of JAX matches as a whole.
    """

    name: str
    peak_flops: float
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    domain: int
    kind: str


ACCELERATORS: dict[str, Accelerator] = {
    row.name: row
    for row in (
        Accelerator("a100", 312 * _T, 80 * _GB, 2039 * _GB, 300 * _GB, 8, r"NVIDIA A100[ -]SXM4?-80GB"),
        Accelerator("a100_40gb", 312 * _T, 40 * _GB, 1555 * _GB, 300 * _GB, 8, r"NVIDIA A100[ -]SXM4?-40GB"),
        Accelerator("h100", 989.4 * _T, 80 * _GB, 3350 * _GB, 450 * _GB, 8, r"NVIDIA H100( SXM5?)?( 80GB HBM3)?"),
        Accelerator("h200", 989.4 * _T, 141 * _GB, 4800 * _GB, 450 * _GB, 8, r"NVIDIA H200( SXM5?)?( 141GB HBM3e)?"),
        Accelerator("b200", 2250 * _T, 180 * _GB, 7700 * _GB, 900 * _GB, 8, r"NVIDIA B200.*"),
        Accelerator("tpu_v4", 275 * _T, 32 * _GiB, 1200 * _GB, 300 * _GB, 4096, r"TPU v4"),
        Accelerator("tpu_v5e", 197 * _T, 16 * _GiB, 819 * _GB, 200 * _GB, 256, r"TPU v5( lite|e)"),
        Accelerator("tpu_v5p", 459 * _T, 95 * _GiB, 2765 * _GB, 600 * _GB, 8960, r"TPU v5p?"),
        Accelerator("tpu_v6e", 918 * _T, 32 * _GiB, 1638 * _GB, 400 * _GB, 256, r"TPU v6( lite|e)"),
    )
}


def accelerator(name: str) -> Accelerator:
    """The row of `ACCELERATORS` with that name, in any case.

    Raises:
      ValueError: for an unknown name; the message lists the known ones and the nearest.
    """
    if name.lower() not in ACCELERATORS:
        known = ", ".join(ACCELERATORS)
        raise ValueError(f"unknown accelerator {name!r}; known: {known}{nearest(name.lower(), ACCELERATORS)}")
    return ACCELERATORS[name.lower()]


def accelerator_of(device_kind: str) -> Accelerator | None:
    """The row for what JAX calls `device.device_kind`, such as "NVIDIA H200" or "TPU v5 lite".

    None for every other device, among them other forms of a listed one ("NVIDIA H100 PCIe", "NVIDIA GB200"), whose
    peaks differ.
    """
    rows = (row for row in ACCELERATORS.values() if re.fullmatch(row.kind, device_kind, re.IGNORECASE))
    return next(rows, None)
