"""Networks of published checkpoints in a training run: `dict(name="checkpoint", network=CONFIG)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.models.checks import check_data, check_least, check_name

# Of those that need no more than labels: the setting that counts them, and how many rows it counts besides the classes.
LABELS = {"DiTTransformer2DModel": ("num_embeds_ada_norm", 0), "UNet2DModel": ("num_class_embeds", 1)}


def checkpoint(
    *, shape: tuple[int, int, int], network: Mapping[str, Any], num_classes: int = 0, time_scale: float = 1000.0,
    dtype: str = "float32", attention: str = "xla", scan: bool = True, remat: str | bool = "none", extra_in: int = 0,
    extra_out: int = 0,
) -> Model:  # fmt: skip
    """A network by the `config.json` of a checkpoint, with the call that training has; diffusers reads what it learns.

    Args:
      shape: `(H, W, C)` of the images or latents.
      network: its config, with `_class_name`, one of `LABELS`; `in_channels`, `out_channels`, `sample_size` and the
        number of labels follow from the data where they are left out. With labels one row more than there are classes
        is the null class.
      num_classes: 0 for an unconditional network, whose `y` is ignored.
      time_scale: what a time is multiplied by: 1000 for times in [0, 1] and a checkpoint of 1000 steps.
      dtype, attention, scan, remat: how it is computed; see `diffjax.models.settings.how`.
      extra_in, extra_out: channels of `x` and of the output beyond C.

    Returns:
      A `Model` with the checkpoint's parameters: `apply(params, x [B, H, W, C], t [B], y [B] or None, *, key=None)`.

    Raises:
      ValueError: for a class that needs more than times and labels, or settings that make no network.
    """
    from diffjax.models import from_config

    kind = network.get("_class_name")
    check_name("checkpoint", "network._class_name", kind, LABELS)
    check_data("checkpoint", shape, num_classes)
    check_least("checkpoint", 0, extra_in=extra_in, extra_out=extra_out)
    channels = shape[-1]
    given = {"in_channels": channels + extra_in, "out_channels": channels + extra_out, "sample_size": shape[0]}
    count, more = LABELS[kind]
    given |= {count: num_classes + more} if num_classes or kind == "DiTTransformer2DModel" else {}
    given |= dict(network)
    net = from_config(given, dtype=dtype, attention=attention, scan=scan, remat=remat)
    wanted = {"in_channels": channels + extra_in, "out_channels": channels + extra_out}
    for name, value in wanted.items():
        if given[name] != value:
            raise ValueError(f"checkpoint: network.{name}={given[name]}: the data and the loss need {value}")
    labelled = bool(given.get(count)) or kind == "DiTTransformer2DModel"
    null = (given.get(count) or 0) - more  # the last row
    if labelled and num_classes > null:
        told = f"the data have {num_classes} classes, and no label has a row of its own: at least {num_classes + more}"
        raise ValueError(f"checkpoint: network.{count}={given[count]}: {told}")

    def apply(params, x, t, y=None, *, key=None, method=None):
        settings.expect("checkpoint", "x", x, None, *shape[:2], channels + extra_in)
        t = settings.times_of("checkpoint", t, x)
        if labelled:
            y = jnp.full(t.shape, null, jnp.int32) if y is None or not num_classes else y
        return net.apply(params, x, time_scale * t, y if labelled else None, key=key, method=method)

    config = dict(name="checkpoint", shape=tuple(shape), network=given, num_classes=num_classes, time_scale=time_scale)
    return Model(net.init, apply, config=config, rules=net.rules, activations=net.activations)
