"""Runs of PyTorch's networks, written as small files that the tests read.

    .venv-oracle/bin/python tests/parity/record.py --out tests/parity/golden/networks     the committed cases
    .venv-oracle/bin/python tests/parity/record.py --out FOLDER --seed 7 --count 5        random ones, 5 of each family

A committed file holds the config, the names and shapes of the checkpoint's tensors, the inputs and the outputs, and for
those of `compare.GRADIENTS` a summary of each parameter's gradient; the weights are drawn from their names
(`networks.weight`). A random case is a folder: the checkpoint as PyTorch saves it,
with its own initial weights and N(0, 0.05) on top of each, `run.npz` with inputs and outputs, in bfloat16 as well, and
`gradients.safetensors`, of the sum of the outputs times `probe`, in float64 where the class can be computed in it, with
what float32 loses of each tensor in `roundings.json`. Needs torch, diffusers and transformers, not jax.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import compare
import networks
import numpy as np

# Classes of PyTorch that mix types, so that they cannot be called in bfloat16 or float64.
NOT_HALF: frozenset[str] = frozenset()
NOT_DOUBLE = frozenset({"EDM2UNet"})


def build(case: networks.Case, family=None):
    """PyTorch's module of a case, in evaluation mode."""
    if hasattr(family, "build"):
        return family.build(case).eval()
    import diffusers
    import transformers

    if hasattr(diffusers, case.kind):
        return getattr(diffusers, case.kind)(**case.config).eval()
    kind = getattr(transformers, case.kind)
    return kind(kind.config_class(**case.config)).eval()


def config_of(module) -> dict:
    if hasattr(module, "peft_config") or not hasattr(module.config, "to_dict"):
        kept = {k: v for k, v in dict(module.config).items()}
        return {"_class_name": type(module).__name__, **kept}
    return json.loads(module.config.to_json_string(use_diff=False)) | {"architectures": [type(module).__name__]}


def tensors_in(inputs):
    import torch

    return {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}


def state_of(module) -> dict:
    """The tensors of a module, each once: those that share one have it under the name that the file has."""
    state, tied = module.state_dict(), getattr(module, "_tied_weights_keys", None)
    tied = tied if isinstance(tied, dict) else {}
    return {k: v for k, v in state.items() if k not in tied or v.data_ptr() != state[tied[k]].data_ptr()}


def record(name: str, case: networks.Case, family, out: Path) -> None:
    """One committed case."""
    import torch

    module = build(case, family)
    state = state_of(module)
    drawn = {
        key: torch.from_numpy(networks.weight(key, tuple(value.shape)))
        for key, value in state.items()
        if value.is_floating_point()
    }
    module.load_state_dict({**state, **drawn}, strict=len(state) == len(module.state_dict()))
    inputs = networks.inputs_of(name, case)
    with torch.no_grad():
        outputs = family.theirs(module, tensors_in(inputs))
    facts = {"config": config_of(module), "shapes": {key: list(value.shape) for key, value in state.items()}}
    arrays = {f"in/{k}": v for k, v in inputs.items()} | {f"out/{k}": v.numpy() for k, v in outputs.items()}
    if name in compare.GRADIENTS:
        probes = {k: networks.draw(name, f"probe/{k}", ("normal", tuple(v.shape))) for k, v in outputs.items()}
        gradients = gradients_of(module, family, tensors_in(inputs), tensors_in(probes))
        facts["gradients"] = sorted(gradients)
        arrays |= {f"probe/{k}": v for k, v in probes.items()}
        arrays["gradients"] = np.stack([compare.summary(k, gradients[k].numpy()) for k in facts["gradients"]])
    np.savez_compressed(out / f"{name}.npz", facts=json.dumps(facts, sort_keys=True), **arrays)


def gradients_of(module, family, inputs, probes) -> dict:
    """Those of all parameters, of the sum of the outputs times `probes`."""
    outputs = family.theirs(module, inputs)
    sum((value * probes[k]).sum() for k, value in outputs.items()).backward()
    return {k: p.grad.contiguous() for k, p in module.named_parameters() if p.grad is not None}


def cast(tensors: dict, dtype) -> dict:
    """Times and labels, of one axis, stay as they are."""
    return {k: v.to(dtype) if v.is_floating_point() and v.ndim > 1 else v for k, v in tensors.items()}


def record_live(name: str, case: networks.Case, family, out: Path, seed: int) -> None:
    """One random case."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    module = build(case, family)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = out / name
    module.save_pretrained(folder)
    inputs = networks.inputs_of(name, case)
    arrays = {f"in/{k}": v for k, v in inputs.items()}
    whole = tensors_in(inputs)
    with torch.no_grad():
        outputs = family.theirs(module, whole)
    arrays |= {f"out/{k}": v.numpy() for k, v in outputs.items()}
    if case.gradients:
        probes = {k: torch.randn_like(v) for k, v in outputs.items()}
        arrays |= {f"probe/{k}": v.numpy() for k, v in probes.items()}
        gradients, roundings = gradients_of(module, family, whole, probes), {}
        if case.kind not in NOT_DOUBLE:
            module.zero_grad()
            wide = gradients_of(module.double(), family, cast(whole, torch.float64), cast(probes, torch.float64))
            roundings = {k: float((v.double() - wide[k]).abs().max()) for k, v in gradients.items()}
            gradients = {k: v.float() for k, v in wide.items()}
            module.float()
        save_file(gradients, folder / "gradients.safetensors")
        (folder / "roundings.json").write_text(json.dumps(roundings))
    if case.kind not in NOT_HALF:
        with torch.no_grad():
            outputs = family.theirs(module.bfloat16(), cast(whole, torch.bfloat16))
        arrays |= {f"half/{k}": v.float().numpy() for k, v in outputs.items()}
    np.savez(folder / "run.npz", **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--count", type=int, default=0, help="random cases of each family; 0 for the committed ones")
    parser.add_argument("--seed", type=int, default=0, help="of the random cases")
    parser.add_argument("--only", default="", help="families, separated by commas; all by default")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in arguments.only.split(",") if name]
    for family_name, family in networks.families().items():
        if chosen and family_name not in chosen:
            continue
        if not arguments.count:
            for name, case in family.CASES.items():
                record(name, case, family, arguments.out)
            continue
        rng = networks.generator(f"{family_name}/{arguments.seed}")
        for i in range(arguments.count):
            record_live(f"{family_name}-{i}", family.random_case(rng), family, arguments.out, arguments.seed + i)


if __name__ == "__main__":
    main()
