"""The recipes at full length against the bars that they were set for, and the wheel away from the checkout."""

import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffjax.pipelines.evaluate import evaluate
from diffjax.train import config as configs
from diffjax.train import train

ROOT = Path(__file__).parents[2]
# A training set of the same size scores 0.5 in C2ST and in closer, and copies of it 1 in closer.
BARS = {"fd_relu": 0.30, "fd_tanh": 0.22, "c2st": 0.70, "closer": 0.75}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("network", ["mlp", "dit", "unet"])
def test_the_full_recipe_meets_the_bars(network, tmp_path):
    config = configs.load(f"{ROOT}/configs/digits_{network}.py")
    assert train(config, str(tmp_path), stream=io.StringIO()).step == config.num_steps
    scores = evaluate(tmp_path, quick=True)["each_seed"][0]
    missed = {key: scores[key] for key, bar in BARS.items() if not scores[key] <= bar}
    assert not missed and scores["accuracy"] >= 0.97, scores


def test_the_wheel_works_away_from_the_checkout(tmp_path):
    if importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip and a package index")
    call = lambda *args: subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    wheels, home = tmp_path / "wheels", tmp_path / "venv"
    built = call(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(wheels), str(ROOT))
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("diffjax-*.whl")
    assert call(sys.executable, "-m", "venv", str(home)).returncode == 0
    installed = call(str(home / "bin/python"), "-m", "pip", "install", "--quiet", str(wheel))
    assert installed.returncode == 0, installed.stderr
    shown = call(str(home / "bin/diffjax"), "--help")
    assert shown.returncode == 0 and "train" in shown.stdout, shown.stderr
    # The first block of Python in the README, and where the package it found lies.
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    code = example + "\nimport diffjax; print(x0.shape, diffjax.__file__)"
    done = call(str(home / "bin/python"), "-c", code)
    assert done.returncode == 0 and done.stdout.startswith("(4, 8, 8, 1)") and str(home) in done.stdout, done.stderr
