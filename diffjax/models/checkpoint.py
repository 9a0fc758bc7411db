"""Networks of published checkpoints in a training run: `dict(name="checkpoint", network=CONFIG)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.models.checks import check_attention, check_data, check_least, check_name

# Of those that need no more than labels: the setting that counts them, and how many rows it counts besides the classes.
LABELS = {"DiTTransformer2DModel": ("num_embeds_ada_norm", 0), "UNet2DModel": ("num_class_embeds", 1)}
# Settings that decide what a network is given, and the values for which that is a real time and a row of labels.
TRAINED = {"class_embed_type": (None,), "time_embedding_type": ("positional", "fourier")}


def checkpoint(
    *, shape: tuple[int, int, int], network: Mapping[str, Any], num_classes: int = 0, time_scale: float = 1000.0,
    dtype: str = "float32", attention_impl: str = "xla", scan: bool = True, remat: str | bool = "none",
    extra_in: int = 0, extra_out: int = 0,
) -> Model:  # fmt: skip
    """A network by the `config.json` of a checkpoint, with the call that training has; diffusers reads what it learns.

    Args:
      shape: `(H, W, C)` of the images or latents.
      network: its config, with `_class_name`, one of `LABELS`; `in_channels`, `out_channels`, `sample_size` and the
        number of labels follow from the data where they are left out. The last row of its table of labels is that of
        no class; the table of a network that was trained on more classes may be longer than the data need. A U-Net
        whose `num_class_embeds` is null takes no labels.
      num_classes: 0 for an unconditional network, whose `y` is ignored.
      time_scale: what a time is multiplied by: 1000 for times in [0, 1] and a checkpoint of 1000 steps.
      dtype, attention_impl, scan, remat: how it is computed; see `diffjax.models.settings.how`, where the second is
        `attention`.
      extra_in, extra_out: channels of `x` and of the output beyond C.

    Returns:
      A `Model` with the checkpoint's parameters: `apply(params, x [B, H, W, C], t [B], y [B] or None, *, key=None)`.
      Without labels, or with `y == num_classes`, the network is unconditional.

    Raises:
      ValueError: for a class that needs more than times and labels, or settings that make no network.
    """
    config = dict(locals(), name="checkpoint", shape=tuple(shape))
    from diffjax.models import NETWORKS, from_config

    if isinstance(network, str):
        raise ValueError(f"checkpoint: network={network!r}: expected what its config.json holds; see configs/tune.py")
    kind = network.get("_class_name")
    if kind in NETWORKS and kind not in LABELS:
        raise ValueError(
            f"checkpoint: network._class_name={kind!r}: it needs more than times and labels, which no config gives; "
            f"train it in a loop of your own, see docs/init_from.md. A config trains: {', '.join(LABELS)}"
        )
    check_name("checkpoint", "network._class_name", kind, LABELS)
    check_data("checkpoint", shape, num_classes)
    check_least("checkpoint", 0, extra_in=extra_in, extra_out=extra_out)
    check_attention("checkpoint", "attention_impl", attention_impl, dtype)
    channels = shape[-1]
    wanted = {"in_channels": channels + extra_in, "out_channels": channels + extra_out}
    given = _given(network, {**wanted, "sample_size": shape[0]}, num_classes)
    net = from_config(given, dtype=dtype, attention=attention_impl, scan=scan, remat=remat)
    for name, value in wanted.items():
        if given[name] != value:
            parts = f"{channels} of the data, {value - channels} of the loss"
            raise ValueError(
                f"checkpoint: network.{name}={given[name]}: the data and the loss need {value} ({parts}); a "
                "checkpoint's network stays as it is, so change --config.data (or --config.loss)"
            )
    null = _null(given, num_classes)

    def apply(params, x, t, y=None, *, key=None, method=None):
        settings.expect("checkpoint", "x", x, None, *shape[:2], channels + extra_in)
        t = settings.times_of("checkpoint", t, x)
        if null is not None:
            # What training and sampling call no class is the row behind those of the data, not that of the table.
            none = jnp.full(t.shape, null, jnp.int32)
            y = none if y is None or not num_classes else jnp.where(y == num_classes, none, y)
        return net.apply(params, x, time_scale * t, None if null is None else y, key=key, method=method)

    return net._replace(apply=apply, config=config | {"network": given})


def _given(network: Mapping[str, Any], facts: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """The config with what follows from the data; raises `ValueError` for what training has no inputs for."""
    kind = network["_class_name"]
    for name, supported in TRAINED.items():
        if network.get(name, supported[0]) not in supported:
            values = ", ".join(map(repr, supported))
            raise ValueError(f"checkpoint: network.{name}={network[name]!r} is not supported; supported: {values}")
    count, more = LABELS[kind]
    facts |= {count: num_classes + more} if num_classes or kind == "DiTTransformer2DModel" else {}
    return {**facts, **network}


def takes_labels(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config is told classes: all are, but a U-Net whose `num_class_embeds` is null."""
    return config.get("name") != "checkpoint" or _null(config["network"], 0) is not None


def _null(network: Mapping[str, Any], num_classes: int) -> int | None:
    """The row of no class, the last one; None for a network without labels.

    Raises:
      ValueError: if the table has too few rows.
    """
    kind = network["_class_name"]
    count, more = LABELS[kind]
    if not network.get(count) and kind != "DiTTransformer2DModel":
        return None
    null = (network.get(count) or 0) - more
    if num_classes > null:
        told = f"the data have {num_classes} classes, and no label has a row of its own: at least {num_classes + more}"
        raise ValueError(f"checkpoint: network.{count}={network.get(count)}: {told}")
    return null
