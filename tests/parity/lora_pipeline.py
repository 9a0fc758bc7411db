"""LoRA of a small U-Net and a small text encoder, as kohya's scripts and diffusers' pipelines name it.

    .venv-oracle/bin/python tests/parity/lora_pipeline.py --out tests/parity/golden/adapters/lora_pipeline.npz

The file holds configs, the names and shapes of the factors in each form (drawn from their names by `networks.weight`)
and what both networks return. Needs torch, diffusers, transformers and peft, not jax.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ip_adapter
import networks
import numpy as np
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Pipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
from networks import clip, unet_cond
from peft import LoraConfig, get_peft_model
from record import build, config_of, tensors_in

CASES = {
    "unet": unet_cond._case(**ip_adapter.ONE, size=(4, 4)),
    "text_encoder": clip.CASES["clip-text"],
}
FAMILIES = {"unet": unet_cond, "text_encoder": clip}
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
# Module and rank; alpha is 3.
BLOCK = "attentions.0.transformer_blocks.0"
MODULES = {
    "unet": {
        f"down_blocks.0.{BLOCK}.attn1.to_q": 2, f"down_blocks.0.{BLOCK}.attn2.to_k": 1,
        "mid_block.attentions.0.proj_in": 2, f"mid_block.{BLOCK}.ff.net.0.proj": 2,
        f"up_blocks.0.{BLOCK}.attn2.to_out.0": 3, "down_blocks.0.resnets.0.conv1": 2,
        "up_blocks.0.resnets.0.time_emb_proj": 2,
    },
    # Without out_proj diffusers would not know the form of the names.
    "text_encoder": {
        "encoder.layers.0.self_attn.q_proj": 2, "encoder.layers.1.self_attn.out_proj": 1, "encoder.layers.1.mlp.fc1": 3,
    },
}  # fmt: skip


def network(name):
    module = build(CASES[name])
    state = module.state_dict()
    module.load_state_dict({k: torch.from_numpy(networks.weight(k, tuple(v.shape))) for k, v in state.items()})
    return module


def run(name, module):
    given = tensors_in(networks.inputs_of(name, CASES[name]))
    with torch.no_grad():
        return next(iter(FAMILIES[name].theirs(module, given).values())).numpy()


def factors(name, module):
    """The shapes of A and B by module."""
    for key, rank in MODULES[name].items():
        outs, ins, *window = module.get_submodule(key).weight.shape
        yield key, (rank, ins, *window), (outs, rank, *(1 for _ in window))


def tensors(shapes):
    drawn = lambda key, shape: torch.from_numpy(networks.weight(key, shape))
    return {k: torch.tensor(3.0) if k.endswith(".alpha") else drawn(k, shape) for k, shape in shapes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    path = parser.parse_args().out
    facts, arrays = {"configs": {}, "kohya": {}, "peft": {}}, {}
    for name in CASES:
        module = network(name)
        facts["configs"][name] = config_of(module)
        arrays |= {f"{name}/in/{k}": v for k, v in networks.inputs_of(name, CASES[name]).items()}
        arrays[f"{name}/base"] = run(name, module)
        for key, a, b in factors(name, module):
            flat = PREFIXES[name] + key.replace(".", "_")
            facts["kohya"] |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.alpha": ()}
            facts["peft"] |= {f"{name}.{key}.lora_A.weight": a, f"{name}.{key}.lora_B.weight": b}
    # One file for the pipeline, in kohya's form through diffusers' own conversion.
    state, alphas = Pipeline.lora_state_dict(tensors(facts["kohya"]))
    unet, encoder = network("unet"), network("text_encoder")
    Pipeline.load_lora_into_unet(state, alphas, unet)
    arrays["unet/kohya"] = run("unet", unet)
    converted = {k.removeprefix("text_encoder."): v for k, v in state.items() if k.startswith("text_encoder.")}
    converted = convert_state_dict_to_peft(convert_state_dict_to_diffusers(converted))
    arrays["text_encoder/kohya"] = run("text_encoder", with_peft(encoder, converted, 3))
    # The same in peft's form; without a config alpha is the rank.
    named = tensors(facts["peft"])
    unet, encoder = network("unet"), network("text_encoder")
    unet.load_lora_adapter(named, prefix="unet")
    arrays["unet/peft"] = run("unet", unet)
    mine = {k.removeprefix("text_encoder."): v for k, v in named.items() if k.startswith("text_encoder.")}
    arrays["text_encoder/peft"] = run("text_encoder", with_peft(encoder, mine, None))
    np.savez_compressed(path, facts=json.dumps(facts, sort_keys=True), **arrays)


def with_peft(module, state, alpha):
    """peft's own text encoder: diffusers' loader expects the modules of older transformers."""
    state = {k.removeprefix("text_model."): v for k, v in state.items()}
    ranks = {k.removesuffix(".lora_A.weight"): v.shape[0] for k, v in state.items() if k.endswith("lora_A.weight")}
    config = LoraConfig(
        target_modules=list(ranks), rank_pattern=ranks, alpha_pattern={k: alpha or rank for k, rank in ranks.items()}
    )
    wrapped = get_peft_model(module, config)
    given = {f"base_model.model.{k}".replace(".weight", ".default.weight"): v for k, v in state.items()}
    missing = wrapped.load_state_dict(given, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    return module


if __name__ == "__main__":
    main()
