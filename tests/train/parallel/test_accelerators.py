"""The table of accelerators, by the names that JAX gives to devices."""

import pytest

from diffjax.train.parallel.accelerators import ACCELERATORS, accelerator, accelerator_of


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100_40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("TPU v4", "tpu_v4"),
        ("TPU v5 lite", "tpu_v5e"),
        ("TPU v5", "tpu_v5p"),
        ("TPU v6 lite", "tpu_v6e"),
    ],
)
def test_a_device_finds_its_row(kind, name):
    assert accelerator_of(kind) is ACCELERATORS[name] is accelerator(name.upper())


@pytest.mark.parametrize(
    "kind", ["cpu", "NVIDIA H100 PCIe", "NVIDIA A100-PCIE-40GB", "NVIDIA GB200", "NVIDIA H200 NVL"]
)
def test_another_device_has_none(kind):
    assert accelerator_of(kind) is None


def test_the_card_of_the_published_rate():
    # 555 images/s of DiT-XL/2 at 40 % of the peak, with 3 * 2 * 118.64 G operations an image.
    assert 0.4 * ACCELERATORS["h200"].peak_flops / (6 * 118.64e9) == pytest.approx(555, rel=2e-3)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="unknown accelerator 'h20'; known: a100, .*; did you mean 'h200'"):
        accelerator("h20")
