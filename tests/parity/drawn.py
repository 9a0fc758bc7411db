"""Networks of all classes as small as they are committed, with parameters drawn from their names in a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import networks
import numpy as np

from diffjax.convert.weights.places.layout import layout
from diffjax.convert.weights.tensors import Source, write
from diffjax.models import NETWORKS, from_config
from diffjax.nn.functional import names_of

GOLDEN = Path(__file__).parent / "golden" / "networks"
# Of several committed cases of a class the one to look at first, and for classes without one a case of another class
# that is the same but for its name.
FIRST = {
    "SD3Transformer2DModel": "sd35", "UNet2DConditionModel": "unet_cond_sdxl", "T2IAdapter": "t2i_adapter_xl",
    "AutoencoderKL": "vae", "AutoencoderTiny": "taesd", "SD3ControlNetModel": "sd3_controlnet",
}  # fmt: skip
SAME = {
    "CLIPTextModelWithProjection": "CLIPTextModel", "CLIPVisionModel": "CLIPVisionModelWithProjection",
    "Transformer2DModel": "DiTTransformer2DModel",
}  # fmt: skip


class Small(NamedTuple):
    """A small network of a class: its `config.json`, its inputs, and how its family calls it."""

    config: dict[str, Any]
    inputs: dict[str, np.ndarray]
    ours: Any


def parts(run, kind: str) -> dict[str, np.ndarray]:
    """The arrays of a recorded run under "in", "out", "probe" or "half", by their names there."""
    return {k.partition("/")[2]: v for k, v in run.items() if k.startswith(f"{kind}/")}


def small(kind: str) -> Small:
    """The committed case of a class of `NETWORKS`."""
    cases = {}
    for family in networks.families().values():
        for name, case in family.CASES.items():
            cases.setdefault(case.kind, {})[name] = family
    like = SAME.get(kind, kind)
    name = FIRST.get(like, next(iter(cases[like])))
    run = np.load(GOLDEN / f"{name}.npz")
    config = json.loads(str(run["facts"]))["config"]
    config |= {"architectures": [kind]} if "architectures" in config else {"_class_name": kind}
    return Small(config, parts(run, "in"), cases[like][name].ours)


def configs():
    """`{name: config}` of all committed cases, and of each class without one."""
    names = [name for family in networks.families().values() for name in family.CASES]
    found = {name: json.loads(str(np.load(GOLDEN / f"{name}.npz")["facts"]))["config"] for name in names}
    return found | {kind: small(kind).config for kind in NETWORKS if kind in SAME}


def shapes_of(model):
    """The parameters as `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(model.init, jax.random.key(0))


def params_of(model, prefix=""):
    """Parameters drawn from their names in the checkpoint, behind the prefix; numpy arrays."""
    shapes = shapes_of(model)
    leaves = [_leaf(place, prefix) for place in layout(names_of(shapes)).values()]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def tensors_of(params):
    """The shapes of a checkpoint's tensors by name, of parameters or their shapes."""
    return {key: list(place.shape) for place in layout(names_of(params)).values() for key in place.keys}


def _leaf(place, prefix):
    pieces = [networks.weight(prefix + key, place.shape).transpose(place.axes) for key in place.keys]
    return np.stack(pieces) if place.stacked else pieces[0]


def stable_diffusion(folder: Path) -> Path:
    """The recorded Stable Diffusion pipeline as a checkpoint in `folder`, with its weights and its tokenizer."""
    shutil.copytree(GOLDEN.parent / "pipelines" / "sd-0", folder)
    shutil.copytree(GOLDEN.parent / "tokenizers" / "clip", folder / "tokenizer", dirs_exist_ok=True)
    for path in folder.glob("*/config.json"):
        shapes = tensors_of(shapes_of(from_config(json.loads(path.read_text()))))
        sources = {key: Source.of(networks.weight(key, tuple(shape))) for key, shape in shapes.items()}
        write(path.parent / "model.safetensors", sources, {})
    return folder


def total_of(case: Small, **how):
    """`(params, inputs) -> (a sum over all outputs in which no two terms weigh the same, the outputs)`."""
    model = from_config(case.config, **how)

    def total(params, inputs):
        out = case.ours(model, params, inputs)
        waves = {k: jnp.sin(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) for k, a in out.items()}
        return sum(jnp.sum(out[k] * wave) for k, wave in waves.items()), out

    return total
