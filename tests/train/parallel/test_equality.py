"""Every way of dividing the work gives what one device gives, for every family; see equality.py beside this file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("equality.py")
# SGD adds up what differs and amplifies nothing: sums in another order, 80 units in the last place at 1, in 10 steps.
# Adam divides by the root of the second moment, so a gradient that is zero but for rounding moves its parameter by a
# whole lr = 1e-3: in float32 the modes end 1e-4 apart. In float64 that rounding, some 1e-16, is divided by eps = 1e-8:
# 1e-11 a step.
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-10}

MIXED = "fsdp x tensor x sequence, microbatches, remat"
COMMON = ["data", "fsdp", "tensor", "data x fsdp x tensor", "pmap", "pmap, microbatches"]
COMMON += ["microbatches, unrolled", "microbatches, scanned", "remat", "data x fsdp x tensor, microbatches, remat"]
TOKENS = ["sequence", "fsdp x sequence", MIXED, "layers unrolled"]
# Which modes of equality.py a family is trained in: a few of them in every run of the tests, then all.
FAST = {"dit": [MIXED], "unet": ["data x fsdp x tensor", "pmap"]}
FULL = {"dit": COMMON + TOKENS, "unet": COMMON, "mlp": COMMON}


def trained(family, precision, *modes):
    command = [sys.executable, str(SCRIPT), family, precision, *modes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def check(runs, mode, precision):
    tolerance, alone = TOLERANCE[precision], runs["one device"]
    assert runs[mode]["apart"] < tolerance < 5e-3 < alone["moved"], mode
    assert runs[mode]["losses"] == pytest.approx(alone["losses"], rel=max(tolerance, 1e-6)), mode
    assert runs[mode]["dtypes"] == ["float64" if precision == "fp64" else "float32"]


@pytest.fixture(scope="module", params=["dit", pytest.param("unet", marks=pytest.mark.slow)])
def fast(request):
    return request.param, trained(request.param, "fp32", *FAST[request.param])


def test_the_mixed_modes_equal_one_device(fast):
    family, runs = fast
    for mode in FAST[family]:
        check(runs, mode, "fp32")


@pytest.mark.slow
def test_a_forgotten_mean_would_be_noticed():
    wrong = trained("mlp", "fp32", "pmap without its mean")["pmap without its mean"]
    assert wrong["apart"] > 100 * TOLERANCE["fp32"]


def test_devices_hold_parts_and_talk(fast):
    family, runs = fast
    run = runs[FAST[family][0]]
    # The mesh splits kernels 4 ways, what little else there is 2 ways or not at all.
    assert run["bytes_per_device"] < run["bytes"] / 2.5
    assert run["collectives"]["all-reduce"] and run["collectives"]["all-gather"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("family", FULL)
def test_all_modes_equal_one_device(family, precision):
    runs = trained(family, precision, *FULL[family])
    for mode in FULL[family]:
        check(runs, mode, precision)
    whole_bytes = runs["one device"]["bytes"]
    share = {mode: runs[mode]["bytes_per_device"] / whole_bytes for mode in FULL[family]}
    kinds = {mode: set(runs[mode]["collectives"]) for mode in FULL[family]}
    # Copies need the sum of the gradients, and neither a gather nor an exchange.
    assert share["data"] == share["pmap"] == 1 and kinds["data"] == {"all-reduce"}
    assert share["fsdp"] < 0.2 and kinds["fsdp"] >= {"all-gather", "all-reduce"}
    assert share["tensor"] < 0.75 and "all-reduce" in kinds["tensor"]
    assert share["data x fsdp x tensor"] < 0.4
    if "sequence" in runs:
        # The keys and values of the other tokens.
        assert share["sequence"] == 1 and kinds["sequence"] >= {"all-gather", "all-reduce"}
