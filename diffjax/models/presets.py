"""Settings of published networks, by name: plain mappings for `diffjax.models.MODELS`.

`build(preset("dit_xl_2"), MODELS, "model", shape=(32, 32, 4), num_classes=1000)` makes the network.
"""

from __future__ import annotations

from typing import Any

from diffjax.registry import nearest

# Peebles & Xie 2023, arXiv:2212.09748, Table 1.
_DIT_SIZES = {
    "s": dict(width=384, depth=12, heads=6),
    "b": dict(width=768, depth=12, heads=12),
    "l": dict(width=1024, depth=24, heads=16),
    "xl": dict(width=1152, depth=28, heads=16),
}
# Dhariwal & Nichol 2021, arXiv:2105.05233, Table 13 (class-conditional ImageNet); the heads are 64 wide.
_ADM = {
    "adm_64": dict(width=192, mults=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8), dropout=0.1),
    "adm_128": dict(width=256, mults=(1, 1, 2, 3, 4), blocks=2, attention=(32, 16, 8)),
    "adm_256": dict(width=256, mults=(1, 1, 2, 2, 4, 4), blocks=2, attention=(32, 16, 8)),
}
# The sizes of the DDPM++ network that EDM trains on CIFAR-10 (arXiv:2206.00364, Table 7), with ADM's blocks.
_CIFAR = {"unet_cifar10": dict(width=128, mults=(2, 2, 2), blocks=4, attention=(16,), dropout=0.13)}

PRESETS: dict[str, dict[str, Any]] = {
    **{
        f"dit_{size}_{patch}": dict(name="dit", patch=patch, **settings)
        for size, settings in _DIT_SIZES.items()
        for patch in (2, 4, 8)
    },
    **{name: dict(name="unet", **settings) for name, settings in {**_ADM, **_CIFAR}.items()},
}


def preset(name: str, **changes) -> dict[str, Any]:
    """A copy of the settings of the network `name`, with `changes`.

    Raises:
      ValueError: for an unknown name; the message lists the known ones and the nearest.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(sorted(PRESETS))}{nearest(name, PRESETS)}")
    return {**PRESETS[name], **changes}
