"""Networks against PyTorch: recorded runs, and live ones when asked for."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from drawn import GOLDEN, params_of, parts

from diffjax.convert import load, save
from diffjax.convert.weights.folders.find import find
from diffjax.convert.weights.places.layout import layout
from diffjax.convert.weights.tensors import read_header
from diffjax.models import from_config
from diffjax.nn.functional import names_of

LIVE = os.environ.get("DIFFJAX_PARITY")
# PyTorch in float32 lies 3e-8 to 8e-6 from itself in float64.
TOLERANCE = dict(atol=2e-5, rtol=1e-4)
FAMILIES = networks.families()
CASES = [(family, name) for family, module in FAMILIES.items() for name in module.CASES]
# One of each class, and what the classes of U-Nets differ in most; each costs seconds of compilation.
OFTEN = (
    "bert", "bert-masked", "clip-*", "controlnet-flux-union", "controlnet_sd", "dit", "edm2", "flux-dev", "gpt2",
    "gpt2-lm", "movq", "pixart_alpha", "prior-kandinsky", "safety*", "sd3", "sd35", "sd3_controlnet", "t2i_adapter",
    "t5", "taesd-deep", "umt5", "unet_2d_*", "unet_cond_if", "unet_cond_sd", "unet_cond_sdxl", "unet_chain_sd",
    "uvit-*", "vae", "vq",
)  # fmt: skip
RUNS = sorted(Path(LIVE, "networks").iterdir()) if LIVE else []


@pytest.mark.often(*OFTEN)
@pytest.mark.parametrize("family, name", CASES, ids=[name for _, name in CASES])
def test_forward_is_that_of_pytorch(family, name):
    run = np.load(GOLDEN / f"{name}.npz")
    facts = json.loads(str(run["facts"]))
    model = from_config(facts["config"])
    params, held = params_of(model)
    assert held == facts["shapes"]
    module = FAMILIES[family]
    found = jax.jit(lambda params, given: module.ours(model, params, given))(params, parts(run, "in"))
    wanted = parts(run, "out")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        # A test on nothing would pass as well.
        assert np.std(value) > 1e-3
        np.testing.assert_allclose(found[key], value, **TOLERANCE, err_msg=key)


def committed(folder):
    return FAMILIES[folder.name.rpartition("-")[0]]


@pytest.mark.skipif(not LIVE, reason="`make parity` records random configurations and sets DIFFJAX_PARITY")
@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_live_run_is_that_of_pytorch(folder):
    run, family = np.load(folder / "run.npz"), committed(folder)
    model, params = load(folder)
    given, probes = parts(run, "in"), parts(run, "probe")

    def outputs(params, given):
        out = family.ours(model, params, given)
        total = sum(jnp.sum(out[k] * probe) for k, probe in probes.items())
        return total, out

    if probes:
        (_, found), gradients = jax.jit(jax.value_and_grad(outputs, has_aux=True))(params, given)
        compare_gradients(gradients, folder / "gradients.safetensors")
    else:
        found = jax.jit(outputs)(params, given)[1]
    for key, value in parts(run, "out").items():
        np.testing.assert_allclose(found[key], value, **TOLERANCE, err_msg=f"{folder.name} {key}")
    check_round_trip(model, params, folder)
    check_half(family, folder, given, run)


def compare_gradients(gradients, path):
    theirs = {name: tensor.part() for name, tensor in read_header(path)[0].items()}
    for name, place in layout(names_of(gradients)).items():
        ours = np.asarray(names_of(gradients)[name])
        for i, key in enumerate(place.keys):
            mine = ours[i] if place.stacked else ours
            truth = theirs[key].transpose(place.axes) if key in theirs else np.zeros_like(mine)
            # Sums over many terms: their rounding is relative to the largest of the tensor. A frequency of the time
            # that PyTorch's exponential rounds the other way makes 6e-5 of that at t = 1000.
            np.testing.assert_allclose(mine, truth, rtol=1e-4, atol=2e-5 + 1e-4 * np.abs(truth).max(), err_msg=key)


def check_round_trip(model, params, folder):
    """What is written has the bytes of what was read; `parity/read_back.py` shows it to PyTorch."""
    written = folder / "written"
    save(model, params, written)
    ours, theirs = ({name: tensor.part() for name, tensor in find(where).items()} for where in (written, folder))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].tobytes() == value.tobytes()


def check_half(family, folder, given, run):
    """In bfloat16 ours is about as far from float32 as PyTorch's, whose roundings lie elsewhere: norms and sums are
    wider here."""
    if not parts(run, "half"):
        return
    model, params = load(folder, dtype="bfloat16")
    found = jax.jit(lambda params, given: family.ours(model, params, given))(params, given)
    for key, value in parts(run, "out").items():
        theirs = np.sqrt(np.mean((run[f"half/{key}"] - value) ** 2))
        mine = np.sqrt(np.mean((np.float32(found[key]) - value) ** 2))
        assert mine <= 2 * theirs + 1e-3 * np.sqrt(np.mean(value**2)), (key, mine, theirs)
