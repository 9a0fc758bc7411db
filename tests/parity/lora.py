"""Adapters of peft and diffusers and what they do to a small DiT, written as files that the tests read.

    .venv-oracle/bin/python tests/parity/lora.py --out tests/parity/golden/adapters
    .venv-oracle/bin/python tests/parity/lora.py --out FOLDER --seed 7 --count 5     random adapters, one folder each
    .venv-oracle/bin/python tests/parity/lora.py --read FILE       what `load_lora_adapter` makes of a file of ours

The network's weights are drawn from their names (`networks.weight`). Needs torch, diffusers and peft, not jax.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import networks
import numpy as np
import torch
from diffusers.loaders import FluxLoraLoaderMixin, PeftAdapterMixin
from networks.dit import CASES, theirs
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from record import build, tensors_in
from safetensors.torch import load_file, save_file

NAME = "dit"
KOHYA = {  # module, rank, alpha, window
    "transformer_blocks_0_attn1_to_k": (2, 1.0, ()),
    "transformer_blocks_2_attn1_to_out_0": (3, 6.0, ()),
    "transformer_blocks_1_norm1_linear": (2, None, ()),
    "pos_embed_proj": (2, 4.0, (2, 2)),
    "proj_out_1": (1, 0.5, ()),
}


def network():
    module = build(CASES[NAME])
    # The class itself has no methods for adapters, though nothing of it is in their way.
    module.__class__ = type(NAME, (type(module), PeftAdapterMixin), {})
    state = module.state_dict()
    drawn = {k: torch.from_numpy(networks.weight(k, tuple(v.shape))) for k, v in state.items() if v.is_floating_point()}
    module.load_state_dict({**state, **drawn})
    return module


def fill(module):
    """Every factor drawn from its name: B would be zero."""
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = 0.5 * torch.from_numpy(networks.weight(name, tuple(parameter.shape)))
    return module


def run(module, inputs):
    with torch.no_grad():
        return theirs(module, inputs)["out"].numpy()


def with_diffusers(module, name="default", **settings):
    module.add_adapter(LoraConfig(**settings), adapter_name=name)
    return fill(module)


# Modules of FLUX.1 by the names of its authors, at the sizes that diffusers expects: rows and columns.
FLUX = {
    "double_blocks_0_img_attn_qkv": (9216, 3072), "double_blocks_0_txt_attn_qkv": (9216, 3072),
    "double_blocks_0_img_attn_proj": (3072, 3072), "double_blocks_0_txt_mlp_0": (12288, 3072),
    "double_blocks_0_img_mod_lin": (18432, 3072), "single_blocks_0_linear1": (21504, 3072),
    "single_blocks_0_linear2": (3072, 15360), "single_blocks_0_modulation_lin": (9216, 3072), "img_in": (3072, 64),
    "vector_in_in_layer": (3072, 768), "final_layer_adaLN_modulation_1": (6144, 3072),
    "final_layer_linear": (64, 3072),
}  # fmt: skip
ONE = dict(
    r=2, lora_alpha=3, target_modules=["to_q", "to_v", "proj", "linear_1"],
    rank_pattern={"transformer_blocks.1.attn1.to_q": 4}, alpha_pattern={"pos_embed.proj": 1, "2.attn1.to_v": 5},
)  # fmt: skip
TWO = dict(r=3, lora_alpha=6, target_modules=["to_k", "to_out.0"], use_rslora=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, default=0, help="random adapters; 0 for the committed ones")
    parser.add_argument("--seed", type=int, default=0, help="of the random adapters")
    parser.add_argument("--read", type=Path, help="a file with an adapter, whose output is written to FILE.npy")
    arguments = parser.parse_args()
    inputs = tensors_in(networks.inputs_of(NAME, CASES[NAME]))
    if arguments.read:
        module = network()
        module.load_lora_adapter(str(arguments.read), prefix=None, weight_name=arguments.read.name)
        np.save(f"{arguments.read}.npy", run(module, inputs))
        return
    if arguments.count:
        rng = networks.generator(f"lora/{arguments.seed}")
        for i in range(arguments.count):
            random_adapter(rng, arguments.out / str(i), inputs)
        return
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    arrays = {"in/x": inputs["x"], "in/t": inputs["t"], "in/y": inputs["y"], "out/base": run(network(), inputs)}

    one = with_diffusers(network(), **ONE)
    one.save_lora_adapter(out, weight_name="diffusers.safetensors")
    result = theirs(one, inputs)["out"]
    probe = torch.from_numpy(networks.draw(NAME, "probe", ("normal", tuple(result.shape))))
    (result * probe).sum().backward()
    arrays |= {"out/diffusers": result.detach().numpy(), "probe": probe}
    gradients = {k.replace(".default", ""): p.grad for k, p in one.named_parameters() if "lora_" in k}
    save_file({k: v.contiguous() for k, v in gradients.items()}, out / "gradients.safetensors")

    two = fill(get_peft_model(network(), LoraConfig(**TWO)))
    two.save_pretrained(out / "peft")
    (out / "peft" / "README.md").unlink()
    arrays["out/peft"] = run(two.base_model.model, inputs)

    both = network()
    both.load_lora_adapter(str(out), adapter_name="one", prefix=None, weight_name="diffusers.safetensors")
    both.add_adapter(LoraConfig(**TWO), adapter_name="two")
    set_peft_model_state_dict(both, load_file(out / "peft" / "adapter_model.safetensors"), adapter_name="two")
    both.set_adapters(["one", "two"], [0.7, -0.4])
    arrays["out/both"] = run(both, inputs)
    both.fuse_lora(lora_scale=0.5, adapter_names=["one", "two"])
    both.unload_lora()
    arrays["out/fused"] = run(both, inputs)

    kohya(out / "kohya.safetensors", arrays, inputs)
    (out / "lora_flux.json").write_text(json.dumps(flux()) + "\n")
    np.savez_compressed(out / "lora.npz", **{k: np.asarray(v) for k, v in arrays.items()})


def random_adapter(rng, out, inputs):
    """A folder with an adapter of random settings, in one of both forms, and its output."""
    module = network()
    names = [name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear | torch.nn.Conv2d)]
    chosen = [names[i] for i in rng.permutation(len(names))[: rng.integers(1, 12)]]
    some = [name for name in chosen if rng.integers(2)]
    settings = dict(
        r=int(rng.integers(1, 6)), lora_alpha=int(rng.integers(1, 9)), use_rslora=bool(rng.integers(2)),
        target_modules=[["to_q", "to_k", "linear"], chosen][rng.integers(2)], lora_dropout=float(rng.choice([0, 0.1])),
        rank_pattern={f"^{name}": int(rng.integers(1, 6)) for name in some if rng.integers(2)},
        alpha_pattern={name: int(rng.integers(1, 9)) for name in some if rng.integers(2)},
    )  # fmt: skip
    if rng.integers(2):
        module = with_diffusers(module, **settings).eval()
        module.save_lora_adapter(out)
        result = run(module, inputs)
    else:
        wrapped = fill(get_peft_model(module, LoraConfig(**settings))).eval()
        wrapped.save_pretrained(out)
        result = run(wrapped.base_model.model, inputs)
    np.save(out / "out.npy", result)


def kohya(path, arrays, inputs):
    """A file as kohya's scripts write it, and what its factors add to the output of each module."""
    module, tensors = network(), {}
    modules = {name.replace(".", "_"): part for name, part in module.named_modules()}
    for name, (rank, alpha, window) in KOHYA.items():
        part, key = modules[name], f"lora_unet_{name}"
        outs, ins = part.weight.shape[:2]
        down = torch.from_numpy(networks.weight(f"{key}.lora_down.weight", (rank, ins, *window)))
        up = torch.from_numpy(networks.weight(f"{key}.lora_up.weight", (outs, rank, *(1 for _ in window))))
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        scale = (rank if alpha is None else alpha) / rank

        def add(part, given, result, down=down, up=up, scale=scale, window=window):
            if window:
                low = torch.nn.functional.conv2d(given[0], down, stride=part.stride)
                return result + scale * torch.nn.functional.conv2d(low, up)
            return result + scale * given[0] @ down.T @ up.T

        part.register_forward_hook(add)
    arrays["out/kohya"] = run(module, inputs)
    save_file(tensors, path)


def flux():
    """The tensors of a file of kohya's scripts for FLUX.1, and `u B A v` of each pair that diffusers makes of it."""
    tensors, shapes = {}, {}
    for name, (rows, columns) in FLUX.items():
        key = f"lora_unet_{name}"
        shapes |= {f"{key}.lora_down.weight": (2, columns), f"{key}.lora_up.weight": (rows, 2)}
        # diffusers leaves out the alpha of these two.
        shapes |= {} if name.startswith("final_layer") else {f"{key}.alpha": ()}
    for key, shape in shapes.items():
        tensors[key] = torch.from_numpy(networks.weight(key, shape)) if shape else torch.tensor(3.0)
    made = FluxLoraLoaderMixin.lora_state_dict(dict(tensors))
    changes = {}
    for key in [key for key in made if key.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        a, b = made[key].double(), made[f"{name}.lora_B.weight"].double()
        module = name.removeprefix("transformer.")
        u, v = (networks.draw(module, side, ("normal", (n,))) for side, n in (("u", len(b)), ("v", a.shape[1])))
        changes[module] = float(np.float64(u) @ b.numpy() @ (a.numpy() @ np.float64(v)))
    return {"shapes": shapes, "changes": changes}


if __name__ == "__main__":
    main()
