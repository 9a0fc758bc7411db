"""LoRA of a pipeline's U-Net and text encoder in one file: what diffusers and peft make of it."""

import json
from pathlib import Path

import jax
import networks
import numpy as np
import pytest
from drawn import params_of
from networks import clip, unet_cond

from diffjax.adapters import lora
from diffjax.convert import load_lora, lora_components
from diffjax.convert.weights.tensors import Source, write
from diffjax.models import from_config

RUN = dict(np.load(Path(__file__).parent.parent / "parity" / "golden" / "adapters" / "lora_pipeline.npz"))
FACTS = json.loads(str(RUN["facts"]))
FAMILIES = {"unet": unet_cond, "text_encoder": clip}


def written(path, form):
    one = np.float32(3)
    tensors = {k: one if k.endswith(".alpha") else networks.weight(k, tuple(s)) for k, s in FACTS[form].items()}
    write(path, {k: Source(v.dtype, v.shape, lambda v=v: np.asarray(v)) for k, v in tensors.items()}, {})
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_files_of_a_pipeline_are_those_of_diffusers(name, tmp_path):
    model = from_config(FACTS["configs"][name])
    params = params_of(model)
    given = {k.rpartition("/")[2]: v for k, v in RUN.items() if k.startswith(f"{name}/in/")}

    @jax.jit
    def output(params):
        return next(iter(FAMILIES[name].ours(model, params, dict(given)).values()))

    for form in ("kohya", "peft"):
        path = written(tmp_path / f"{form}.safetensors", form)
        assert lora_components(path) == ("text_encoder", "unet")
        adapter = load_lora(path, model, component=name)
        wanted = RUN[f"{name}/{form}"]
        assert np.std(wanted - RUN[f"{name}/base"]) > 0.1 * np.std(wanted)
        np.testing.assert_allclose(output(lora.apply(params, [(adapter, 1.0)])), wanted, atol=2e-5, rtol=1e-4)
