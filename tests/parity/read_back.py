"""What this library wrote, loaded by diffusers and transformers: the same outputs, no tensor missing or left over.

    .venv-oracle/bin/python tests/parity/read_back.py --out FOLDER

FOLDER is that of `record.py`, after the live tests have put a folder `written` beside each run. Needs no jax.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import networks
import numpy as np
import record


def load(folder: Path):
    """The network of a folder, and the names that it misses or does not know; None for a class of neither library."""
    import diffusers
    import transformers

    config = json.loads((folder / "config.json").read_text())
    kind = config.get("_class_name") or config["architectures"][0]
    library = next((place for place in (diffusers, transformers) if hasattr(place, kind)), None)
    if library is None:
        return None
    module, told = getattr(library, kind).from_pretrained(folder, output_loading_info=True)
    return module.eval(), [*told["missing_keys"], *told["unexpected_keys"]]


def check(folder: Path) -> str:
    """What is wrong with one folder; an empty text if nothing is."""
    import torch

    loaded = load(folder / "written")
    if loaded is None:
        return ""
    module, names = loaded
    if names:
        return f"missing or unexpected: {names[:5]}"
    run = np.load(folder / "run.npz")
    given = {key.partition("/")[2]: run[key] for key in run.files if key.startswith("in/")}
    with torch.no_grad():
        found = networks.families()[folder.name.rpartition("-")[0]].theirs(module, record.tensors_in(given))
    worst = max(float(np.abs(value.numpy() - run[f"out/{key}"]).max()) for key, value in found.items())
    # The same operations on the same bytes; how sums are split over threads is not fixed.
    return "" if worst < 1e-5 else f"outputs differ by {worst:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    folders = sorted(path.parent for path in parser.parse_args().out.glob("*/written"))
    wrong = {folder.name: told for folder in folders if (told := check(folder))}
    for name, told in wrong.items():
        print(f"{name}: {told}")
    print(f"{len(folders) - len(wrong)} of {len(folders)} folders that were written here read back")
    return bool(wrong or not folders)


if __name__ == "__main__":
    sys.exit(main())
