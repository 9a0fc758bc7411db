"""Names and shapes of published checkpoints' tensors as PyTorch's classes have them, counted without memory.

    HF_HUB_OFFLINE=1 .venv-oracle/bin/python tests/parity/published.py --out tests/parity/golden/published.json

Each network is built on PyTorch's device without memory from `diffjax/models/published.py`, which is read as a file.
Needs torch, diffusers and transformers, not jax.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
from pathlib import Path

import networks
import record
import torch

TABLE = Path(__file__).parents[2] / "diffjax" / "models" / "published.py"
# Those that neither diffusers nor transformers has.
RESTATED = {"UViT": "uvit", "EDM2UNet": "edm2"}


def facts(config: dict) -> dict:
    """The number of numbers in the tensors of floating point, and the digest of their names and shapes."""
    settings = {k: v for k, v in config.items() if k not in ("_class_name", "architectures")}
    kind = config.get("_class_name") or config["architectures"][0]
    family = networks.families()[RESTATED[kind]] if kind in RESTATED else None
    with torch.device("meta"):
        module = record.build(networks.Case(kind, settings, {}), family)
    state = {k: tuple(v.shape) for k, v in record.state_of(module).items() if v.is_floating_point()}
    return {"count": sum(map(math.prod, state.values())), "tensors": len(state), "digest": networks.digest(state)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    table = runpy.run_path(str(TABLE))["PUBLISHED"]
    found = {name: facts(config) for name, config in table.items()}
    parser.parse_args().out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
