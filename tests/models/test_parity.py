"""Networks against PyTorch: recorded runs, and live ones when asked for."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from compare import GRADIENTS, TOLERANCE, close_gradient, close_summary
from drawn import GOLDEN, params_of, parts, tensors_of
from record import NOT_DOUBLE, NOT_HALF

from diffjax.convert import load, save
from diffjax.convert.weights.folders.find import find
from diffjax.convert.weights.places.layout import layout
from diffjax.convert.weights.tensors import read_header
from diffjax.models import from_config, kind_of
from diffjax.nn.functional import names_of

LIVE = os.environ.get("DIFFJAX_PARITY")
FAMILIES = networks.families()
CASES = [(family, name) for family, module in FAMILIES.items() for name in module.CASES]
# One of each kind of class, and what those of U-Nets differ in most; each costs seconds of compilation. DiT
# is compared with its gradients.
OFTEN = (
    "bert", "bert-masked", "clip-*", "controlnet-flux-union", "controlnet_sd", "edm2", "flux-dev", "gpt2", "gpt2-lm",
    "movq", "pixart_alpha", "prior-kandinsky", "safety*", "sd3", "sd3_controlnet", "t2i_adapter", "t5", "taesd-deep",
    "umt5", "unet_2d_adm", "unet_2d_ncsnpp", "unet_cond_sdxl", "uvit-*", "vae", "vq",
)  # fmt: skip
RUNS = sorted(Path(LIVE, "networks").iterdir()) if LIVE else []


def recorded(family, name):
    """A committed run, its facts, and `(params, inputs) -> outputs` with the parameters."""
    run = np.load(GOLDEN / f"{name}.npz")
    facts = json.loads(str(run["facts"]))
    model = from_config(facts["config"])
    params = params_of(model)
    assert tensors_of(params) == facts["shapes"]
    return run, facts, lambda params, given: FAMILIES[family].ours(model, params, given), params


def check_outputs(found, run):
    wanted = parts(run, "out")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        # A test on nothing would pass as well.
        assert np.std(value) > 1e-3
        np.testing.assert_allclose(found[key], value, **TOLERANCE, err_msg=key)


@pytest.mark.often(*OFTEN)
@pytest.mark.parametrize("family, name", CASES, ids=[name for _, name in CASES])
def test_forward_is_that_of_pytorch(family, name):
    run, _, ours, params = recorded(family, name)
    check_outputs(jax.jit(ours)(params, parts(run, "in")), run)


@pytest.mark.often("dit")
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_pytorch(name):
    [family] = (family for family, other in CASES if other == name)
    run, facts, ours, params = recorded(family, name)
    gradients, found = with_gradients(ours)(params, parts(run, "in"), parts(run, "probe"))
    check_outputs(found, run)
    truth = dict(zip(facts["gradients"], run["gradients"], strict=True))
    for key, mine in by_key(gradients):
        if key in truth:
            close_summary(key, mine, truth.pop(key))
        else:
            assert not mine.any(), key  # a buffer there
    assert not truth


def with_gradients(ours):
    """`(params, inputs, probes) -> (the gradients of the sum of outputs times probes, the outputs)`."""

    def total(params, given, probes):
        out = ours(params, given)
        return sum(jnp.sum(out[k] * probe) for k, probe in probes.items()), out

    return jax.jit(jax.grad(total, has_aux=True))


def by_key(gradients):
    """`(name, array)` of each tensor, as the checkpoint has them."""
    leaves = names_of(gradients)
    for name, place in layout(leaves).items():
        back = np.argsort(place.axes)
        for i, key in enumerate(place.keys):
            leaf = np.asarray(leaves[name])
            yield key, (leaf[i] if place.stacked else leaf).transpose(back)


def committed(folder):
    return FAMILIES[folder.name.rpartition("-")[0]]


def class_of(folder):
    return kind_of(json.loads((folder / "config.json").read_text()))


@pytest.mark.skipif(not LIVE, reason="`make parity` records random configurations and sets DIFFJAX_PARITY")
def test_live_runs_are_of_every_family():
    assert {folder.name.rpartition("-")[0] for folder in RUNS} == FAMILIES.keys()


@pytest.mark.skipif(not LIVE, reason="`make parity` records random configurations and sets DIFFJAX_PARITY")
@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_live_run_is_that_of_pytorch(folder):
    run, family = np.load(folder / "run.npz"), committed(folder)
    model, params = load(folder)
    given, probes = parts(run, "in"), parts(run, "probe")

    ours = lambda params, given: family.ours(model, params, given)
    if probes:
        gradients, found = with_gradients(ours)(params, given, probes)
        compare_gradients(gradients, folder)
    else:
        found = jax.jit(ours)(params, given)
    for key, value in parts(run, "out").items():
        np.testing.assert_allclose(found[key], value, **TOLERANCE, err_msg=f"{folder.name} {key}")
    check_round_trip(model, params, folder)
    check_half(family, folder, given, run)


def compare_gradients(gradients, folder):
    theirs = {name: tensor.part() for name, tensor in read_header(folder / "gradients.safetensors")[0].items()}
    roundings = json.loads((folder / "roundings.json").read_text())
    assert roundings or class_of(folder) in NOT_DOUBLE
    for key, mine in by_key(gradients):
        close_gradient(mine, theirs.pop(key, np.zeros_like(mine)), key, roundings.get(key, 0.0))
    assert not theirs


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
    halves = parts(run, "half")
    if not halves:
        assert class_of(folder) in NOT_HALF
        return
    model, params = load(folder, dtype="bfloat16")
    found = jax.jit(lambda params, given: family.ours(model, params, given))(params, given)
    for key, value in parts(run, "out").items():
        theirs = np.sqrt(np.mean((run[f"half/{key}"] - value) ** 2))
        mine = np.sqrt(np.mean((np.float32(found[key]) - value) ** 2))
        assert mine <= 2 * theirs + 1e-3 * np.sqrt(np.mean(value**2)), (key, mine, theirs)
