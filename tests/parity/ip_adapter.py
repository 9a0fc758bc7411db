"""IP-Adapters of diffusers and what they do to small U-Nets, written as files that the tests read.

    .venv-oracle/bin/python tests/parity/ip_adapter.py --out tests/parity/golden/adapters
    .venv-oracle/bin/python tests/parity/ip_adapter.py --out FOLDER --seed 7 --count 5     random ones

A file holds the config of the U-Net, the names and shapes of the adapters' tensors, inputs, the output, and gradients
for the adapters; all weights are drawn from their names (`networks.weight`). Needs torch and diffusers, not jax.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import networks
import numpy as np
import torch
from networks import unet_cond
from record import build, cast, config_of, tensors_in

SCALES = (0.6, -0.3)
ONE = dict(
    block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    norm_num_groups=4, layers_per_block=1, attention_head_dim=2, cross_attention_dim=12,
)  # fmt: skip
XL = unet_cond.XL | dict(transformer_layers_per_block=(2, 3), block_out_channels=(8, 8))
CASES = {
    "sd": (unet_cond._case(**ONE, size=(4, 4), masked=True), ["plain", "full"]),
    "sdxl": (unet_cond._case(**unet_cond.SD | XL, size=(4, 4)), ["plain", "plus"]),
}


def projection(kind: str, cross: int, width: int) -> dict[str, tuple[int, ...]]:
    """The tensors of `image_proj`."""
    if kind == "plain":
        proj = {"proj.weight": (4 * cross, width), "proj.bias": (4 * cross,)}
        return proj | {"norm.weight": (cross,), "norm.bias": (cross,)}
    if kind == "full":
        pair = {"proj.0.weight": (width, width), "proj.0.bias": (width,), "proj.2.weight": (cross, width)}
        return pair | {f"proj.{name}": (cross,) for name in ("2.bias", "3.weight", "3.bias")}
    hidden, inner, up = 8, 64, 32
    shapes = {"latents": (1, 3, hidden), "proj_in.weight": (hidden, width), "proj_in.bias": (hidden,)}
    shapes |= {name: (cross,) for name in ("proj_out.bias", "norm_out.weight", "norm_out.bias")}
    shapes["proj_out.weight"] = (cross, hidden)
    for i in range(4):
        layer = {f"0.{norm}.{end}": (hidden,) for norm in ("norm1", "norm2") for end in ("weight", "bias")}
        layer |= {"0.to_q.weight": (inner, hidden), "0.to_kv.weight": (2 * inner, hidden)}
        layer |= {"0.to_out.weight": (hidden, inner), "1.0.weight": (hidden,), "1.0.bias": (hidden,)}
        layer |= {"1.1.weight": (up, hidden), "1.3.weight": (hidden, up)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def adapter(module, kind: str, name: str, width: int):
    """The tensors of an adapter as diffusers takes them, drawn from their names."""
    tensors = projection(kind, module.config.cross_attention_dim, width)
    shapes = {f"image_proj.{key}": shape for key, shape in tensors.items()}
    # In the order of the modules, as the trainer of the paper numbers what it saves.
    for i, key in enumerate(module.attn_processors):
        if key.endswith("attn2.processor"):
            kernel = tuple(module.get_submodule(key.removesuffix(".processor")).to_k.weight.shape)
            shapes |= {f"ip_adapter.{i}.to_k_ip.weight": kernel, f"ip_adapter.{i}.to_v_ip.weight": kernel}
    drawn = {key: torch.from_numpy(networks.weight(f"{name}/{key}", shape)) for key, shape in shapes.items()}
    parts = {"image_proj": {}, "ip_adapter": {}}
    for key, value in drawn.items():
        part, _, rest = key.partition(".")
        parts[part][rest] = value
    return shapes, parts


def gradients(module, i: int, kind: str) -> dict[str, torch.Tensor]:
    """Those of adapter i by the names in its file; of the projection only where it has the same tensors."""
    out = {}
    for number, processor in enumerate(module.attn_processors.values()):
        if hasattr(processor, "to_k_ip"):
            for name in ("to_k_ip", "to_v_ip"):
                out[f"ip_adapter.{number}.{name}.weight"] = getattr(processor, name)[i].weight.grad
    if kind == "plain":
        layer = module.encoder_hid_proj.image_projection_layers[i]
        out |= {f"image_proj.{k.replace('image_embeds', 'proj')}": p.grad for k, p in layer.named_parameters()}
    return out


def record(name: str, case: networks.Case, kinds: list[str], path: Path, width: int = 6) -> None:
    module = build(case)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    module.load_state_dict({key: torch.from_numpy(networks.weight(key, shape)) for key, shape in shapes.items()})
    inputs = networks.inputs_of(name, case)
    facts = {"config": config_of(module), "adapters": []}
    states, embeds = [], []
    for i, kind in enumerate(kinds):
        made, state = adapter(module, kind, f"{name}/{i}", width)
        facts["adapters"].append({key: list(shape) for key, shape in made.items()})
        states.append(state)
        # Two pictures for the first adapter.
        shape = (len(inputs["x"]), 2 - (i > 0), *(() if kind == "plain" else (5,)), width)
        embeds.append(networks.draw(name, f"embeds{i}", ("normal", shape)))
    arrays = {f"in/{k}": v for k, v in inputs.items()} | {f"embeds/{i}": v for i, v in enumerate(embeds)}
    base = unet_cond.theirs(module, tensors_in(inputs))["out"]
    module._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    module.requires_grad_(True)
    for processor in module.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = list(SCALES[: len(kinds)])
    forward = module.forward

    def pictured(*given, added_cond_kwargs=None, **rest):
        pictures = [torch.from_numpy(a).to(module.dtype) for a in embeds]
        return forward(*given, added_cond_kwargs={**(added_cond_kwargs or {}), "image_embeds": pictures}, **rest)

    module.forward = pictured
    out = unet_cond.theirs(module, tensors_in(inputs))["out"]
    probe = torch.from_numpy(networks.draw(name, "probe", ("normal", tuple(out.shape))))
    (out * probe).sum().backward()
    arrays |= {"out/base": base.detach().numpy(), "out/out": out.detach().numpy(), "probe": probe.numpy()}
    of = lambda: {f"{i}/{k}": v.clone() for i, kind in enumerate(kinds) for k, v in gradients(module, i, kind).items()}
    found = of()
    module.zero_grad()
    (unet_cond.theirs(module.double(), cast(tensors_in(inputs), torch.float64))["out"] * probe).sum().backward()
    # What float32 loses of each.
    arrays |= {f"rounding/{key}": (found[key].double() - wide).abs().max().numpy() for key, wide in of().items()}
    arrays |= {f"gradient/{key}": value.numpy() for key, value in found.items()}
    np.savez_compressed(path, facts=json.dumps(facts, sort_keys=True), **arrays)


def random_case(rng):
    pick = lambda *values: values[rng.integers(len(values))]
    count = int(rng.integers(1, 4))
    down = [pick("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D") for _ in range(count)]
    up = [pick("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D") for _ in range(count)]
    config = dict(
        block_out_channels=tuple(int(rng.choice([8, 16])) for _ in range(count)), norm_num_groups=4,
        attention_head_dim=pick(2, 4, tuple(int(rng.choice([2, 4])) for _ in range(count))),
        layers_per_block=pick(1, 2),
        down_block_types=tuple(down), up_block_types=tuple(up), cross_attention_dim=pick(8, 12),
        transformer_layers_per_block=pick(1, 2, tuple(int(rng.integers(1, 4)) for _ in range(count))),
        use_linear_projection=pick(True, False), mid_block_type="UNetMidBlock2DCrossAttn",
    )  # fmt: skip
    config |= pick({}, unet_cond.XL)
    size = 4 * int(rng.integers(1, 3))
    kinds = [pick("plain", "plus", "full") for _ in range(rng.integers(1, 3))]
    return unet_cond._case(size=(size, size), masked=bool(rng.integers(2)), **config), kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--count", type=int, default=0, help="random adapters; 0 for the committed ones")
    parser.add_argument("--seed", type=int, default=0, help="of the random adapters")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cases = CASES
    if arguments.count:
        rng = networks.generator(f"ip_adapter/{arguments.seed}")
        cases = {f"{arguments.seed}-{i}": random_case(rng) for i in range(arguments.count)}
    for name, (case, kinds) in cases.items():
        record(name, case, kinds, arguments.out / f"ip_adapter_{name}.npz")


if __name__ == "__main__":
    main()
