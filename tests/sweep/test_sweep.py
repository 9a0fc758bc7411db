"""A sweep: the text of its grid, what is refused before anything starts, and runs that fail or are stopped."""

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

# Here and not in the test: on import it closes what absl logs to, which in a test is the file that pytest captures to.
import submitit  # noqa: F401
from ml_collections import ConfigDict

from diffjax import cli, viz
from diffjax.sweep import launch
from diffjax.sweep.grid import options_of, parse_grid
from diffjax.sweep.plan import plan_runs
from diffjax.sweep.run import sweep
from diffjax.train import config as configs
from diffjax.train.errors import RESUME, ConfigError, WorkdirError

ROOT = Path(__file__).parents[2]
# Stands in for the programs that a job calls: quick, and failing where the test wants it.
STUB = """
import json, os, sys, time
command, *flags = sys.argv[1:]
given = dict(flag.split("=", 1) for flag in flags if "=" in flag)
workdir = given["--workdir"]
os.makedirs(workdir, exist_ok=True)
open(os.path.join(workdir, command + ".calls"), "a").write("x")
if command == "train":
    config = json.load(open(given["--config"]))
    if config["seed"] == 13:
        print("diffjax: this seed is unlucky"); sys.exit(1)
    if config["seed"] == 14 and not os.path.exists(os.path.join(workdir, "part")):
        open(os.path.join(workdir, "part"), "w").close()
        import signal
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        time.sleep(60)
    if config["seed"] == 15 and not os.path.exists(os.path.join(workdir, "part")):
        open(os.path.join(workdir, "part"), "w").close()
        print("diffjax: another process was lost"); sys.exit(75)
    json.dump(config, open(os.path.join(workdir, "config.json"), "w"))
    open(os.path.join(workdir, "metrics.jsonl"), "w").write(json.dumps({"step": 7, "loss": config["optim"]["lr"]}))
else:
    assert "--quick" in flags
    config = json.load(open(os.path.join(workdir, "config.json")))
    os.makedirs(os.path.join(workdir, "eval"), exist_ok=True)
    row = {"fd_relu": 10 * config["seed"] + config["optim"]["lr"], "accuracy": 0.5}
    report = {"step": config["num_steps"], "heldout": {"loss": 2.0}, "rows": {"ours": row, "floor": {}}}
    json.dump(report, open(os.path.join(workdir, "eval", "report.json"), "w"))
"""


def tiny():
    return ConfigDict(
        dict(data="digits()", num_steps=7, batch_size=8, ema=(), model=dict(name="mlp", width=8, depth=1))
    )


@pytest.fixture
def stub(tmp_path, monkeypatch):
    package = tmp_path / "stub" / "diffjax"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(textwrap.dedent(STUB))
    monkeypatch.chdir(tmp_path)
    return (str(tmp_path / "stub"),)


def read(out):
    with open(Path(out) / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_grid_multiplies_groups_and_zips_inside_them():
    text = "optim.lr=[1e-4,3e-4]; model.depth=[6, 12] & model.width=[64,128]; head=[edm(sigma_data=0.5)]"
    found = parse_grid(text)
    assert [tuple(one.values()) for one in found] == [
        ("1e-4", "6", "64", "edm(sigma_data=0.5)"), ("1e-4", "12", "128", "edm(sigma_data=0.5)"),
        ("3e-4", "6", "64", "edm(sigma_data=0.5)"), ("3e-4", "12", "128", "edm(sigma_data=0.5)"),
    ]  # fmt: skip
    assert [one["model.mults"] for one in parse_grid("model.mults=[(1,2), (1,2,4)]")] == ["(1,2)", "(1,2,4)"]
    assert parse_grid('data=[\'npz(path="a;b,c.npz")\', "digits()"]')[0] == {"data": 'npz(path="a;b,c.npz")'}
    assert parse_grid("") == [{}]


@pytest.mark.parametrize(
    "text, words",
    [
        ("optim.lr", "expected KEY="), ("optim.lr=1e-3", "expected KEY="), ("=[1]", "expected KEY="),
        ("optim.lr=[]", "no value"), ("a=[1]; a=[2]", "a comes twice"), ("a=[1] & a=[2]", "a comes twice"),
        ("a=[1,2] & b=[1]", "a has 2, b has 1"), ("a=['x]", "quotes do not match"),
    ],
)  # fmt: skip
def test_a_wrong_grid_says_why(text, words):
    with pytest.raises(ValueError, match="grid") as error:
        parse_grid(text)
    assert words in str(error.value)


def test_options_are_literals_or_words():
    assert options_of("slurm_partition=gpu; timeout_min=60; x={'a': 1}") == {
        "slurm_partition": "gpu", "timeout_min": 60, "x": {"a": 1}
    }  # fmt: skip
    with pytest.raises(ValueError, match="NAME=VALUE"):
        options_of("gpu")


def test_every_bad_combination_is_listed_and_nothing_is_written(tmp_path):
    out = str(tmp_path / "sweep")
    with pytest.raises(ConfigError) as error:
        sweep(tiny(), "optim.lr=[1e-3, fast]; model.depth=[1, -2]", out)
    text = str(error.value)
    assert "3 of 4 combinations" in text and "none was started" in text and not os.path.exists(out)
    assert "[2] optim.lr=1e-3, model.depth=-2" in text and "depth=-2" in text
    assert text.count("config.optim.lr is 'fast'") == 1 and "[3]" in text and "[4]" in text
    with pytest.raises(ConfigError, match="did you mean 'lr'"):
        sweep(tiny(), "optim.lrr=[1e-3]", out)
    with pytest.raises(ConfigError, match="come twice"):
        sweep(tiny(), "optim.lr=[1e-3, 0.001]", out)
    with pytest.raises(ConfigError, match="in the grid and in --seeds"):
        sweep(tiny(), "seed=[1]", out, seeds=(1,))
    with pytest.raises(ConfigError, match="config.seed is -1"):
        sweep(tiny(), "", out, seeds=(-1,))


def test_names_follow_the_settings_and_not_their_place(tmp_path):
    names = lambda grid: {run.name for run in plan_runs(tiny(), parse_grid(grid), (0, 1), "out")}
    small, large = names("optim.lr=[1e-3]; head=[v()]"), names("optim.lr=[1e-4, 0.001]; head=[eps(), v()]")
    assert small < large and len(large) == 8 and all("/" not in name and len(name) < 100 for name in large)


def test_a_failure_is_reported_the_others_run_and_the_same_call_goes_on(tmp_path, stub, capsys):
    out = str(tmp_path / "sweep")
    again = lambda seeds, grid="optim.lr=[0.25, 0.5]": sweep(tiny(), grid, out, seeds=seeds, path=stub)
    assert again((0, 13, 1)) == 1
    printed = capsys.readouterr()
    assert "2 of 6 failed" in printed.err and "this seed is unlucky" in printed.out
    rows = read(out)
    assert [row["status"] for row in rows] == ["finished", "failed", "finished"] * 2
    assert [row["optim.lr"] for row in rows] == ["0.25"] * 3 + ["0.5"] * 3 and rows[2]["loss"] == "0.25"
    table = Path(out, "table.md").read_text().splitlines()
    # Seeds 0 and 1 have distances of 0.25 and 10.25.
    assert "| `0.25` | 2 of 3 | 0.25 (0.25 to 0.25) | 2 (2 to 2) | 5.25 (0.25 to 10.2) |" in table[2]
    assert Path(out, "sweep.png").stat().st_size > 5000
    # Finished runs are not started again, a longer grid joins them, and another config is refused.
    assert again((0, 1)) == 0 and again((0, 1), "optim.lr=[0.5, 0.75, 0.25]") == 0
    for run in plan_runs(tiny(), parse_grid("optim.lr=[0.25,0.5,0.75]"), (0, 1), out):
        assert Path(run.workdir, "train.calls").read_text() == Path(run.workdir, "eval.calls").read_text() == "x"
    other = tiny()
    other.num_steps = 8
    with pytest.raises(ConfigError, match="num_steps: 7 -> 8"):
        sweep(other, "optim.lr=[0.25]", out)


@pytest.mark.slow
def test_a_run_that_is_interrupted_by_itself_asks_for_the_same_call(tmp_path, stub, capsys):
    out = str(tmp_path / "sweep")
    again = lambda *seeds: sweep(tiny(), "optim.lr=[0.25]", out, seeds=seeds, path=stub)
    assert again(0, 15) == RESUME
    assert "1 of 2 interrupted; the same command goes on" in capsys.readouterr().err
    assert [row["status"] for row in read(out)] == ["finished", "interrupted"]
    assert again(0, 15) == 0
    # A failure counts for more.
    [run] = plan_runs(tiny(), parse_grid("optim.lr=[0.25]"), (15,), out)
    for name in ("part", "eval/report.json"):
        Path(run.workdir, name).unlink()
    assert again(13, 15) == 1


def test_a_dry_run_lists_and_a_second_sweep_is_refused(tmp_path, stub, capsys):
    from diffjax.sweep.run import locked

    out = str(tmp_path / "sweep")
    assert sweep(tiny(), "optim.lr=[0.25, 0.5]", out, dry_run=True) == 0
    assert capsys.readouterr().out.count("to do") == 2 and not os.path.exists(out)
    assert sweep(tiny(), "optim.lr=[0.25]", out, path=stub) == 0
    sweep(tiny(), "optim.lr=[0.25, 0.5]", out, dry_run=True)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].startswith("finished") and printed[-1].startswith("to do")
    with locked(out), pytest.raises(WorkdirError, match="sweeps there"):
        sweep(tiny(), "optim.lr=[0.25]", out, path=stub)


@pytest.mark.slow
def test_a_signal_reaches_the_run_and_the_next_call_finishes_it(tmp_path, stub):
    out, program = tmp_path / "sweep", "import sys; from diffjax import cli; sys.exit(cli.main(sys.argv[1:]))"
    (tmp_path / "base.json").write_text(configs.to_json(tiny()))
    argv = ["sweep", f"--config={tmp_path}/base.json", "--grid=seed=[0,14,2]", f"--out={out}"]
    # The stub is found by the children only: they start in this folder, the parent knows where the package is.
    env = os.environ | {"PYTHONPATH": stub[0]}
    parent = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}"
    process = subprocess.Popen([sys.executable, "-c", parent, *argv], env=env, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 90
    while not list(out.glob("*/part")) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == RESUME, printed
    assert [row["status"] for row in read(out)] == ["finished", "interrupted", "waiting"]
    assert sweep(tiny(), "seed=[0,14,2]", out, path=stub) == 0
    assert [row["status"] for row in read(out)] == ["finished"] * 3


def test_submitit_runs_them_as_jobs(tmp_path, stub, capsys):
    out = str(tmp_path / "sweep")
    code = sweep(tiny(), "seed=[0, 13]", out, cluster="local", options={"timeout_min": 2}, path=stub)
    assert code == 1 and [row["status"] for row in read(out)] == ["finished", "failed"]
    assert "this seed is unlucky" in capsys.readouterr().out
    with pytest.raises(ValueError, match="submitit on 'local'"):
        sweep(tiny(), "seed=[3]", out, cluster="local", options={"gpu_count": 2}, path=stub)


def test_a_run_whose_job_is_taken_away_saves_first():
    program = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit({})); print(1); time.sleep(60)"
    for code, wanted in (("75", RESUME), ("time.sleep(60)", -signal.SIGKILL)):
        process = subprocess.Popen([sys.executable, "-uc", program.format(code)], stdout=subprocess.PIPE)
        process.stdout.readline()
        launch.end(process, grace=2.0)
        assert process.wait(10) == wanted
        process.stdout.close()


def test_the_mesh_of_another_machine_is_left_to_it():
    config = tiny()
    config.mesh = "data=64"
    with pytest.raises(ConfigError, match="data=64"):
        plan_runs(config, [{}], (), "out")
    assert plan_runs(config, [{}], (), "out", here=False)[0].config.mesh == "data=64"
    with pytest.raises(ConfigError, match="depth"):
        plan_runs(config, [{"model.depth": "-1"}], (), "out", here=False)


def test_the_command_asks_for_what_is_missing(capsys, tmp_path):
    (tmp_path / "base.json").write_text(configs.to_json(tiny()))
    config = f"{tmp_path}/base.json"
    assert cli.main(["sweep"]) == 2 and "--config is missing" in capsys.readouterr().err
    assert cli.main(["sweep", config]) == 2 and "--grid is missing" in capsys.readouterr().err
    assert cli.main(["sweep", config, "--grid=seed=[0]"]) == 2 and "--out is missing" in capsys.readouterr().err
    assert cli.main(["sweep", config, "--grid=seed=[0]", f"--out={tmp_path}/s", "--dry_run"]) == 0
    assert "to do" in capsys.readouterr().out


def test_the_picture_has_a_dot_for_every_run():
    figure = viz.sweep_dots(["a", "b", "c"], {"m": [[1.0, 3.0], [2.0], []], "n": [[1.0], [1.0], [5.0]]})
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert np.concatenate([line.get_xdata() for line in dots]).tolist() == [1.0, 3.0, 2.0]
    bars = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_linewidth() == 2.2]
    assert bars == [2.0, 2.0]
    with pytest.raises(ValueError, match="1 settings for 2 names"):
        viz.sweep_dots(["a", "b"], {"m": [[1.0]]})


def test_results_of_another_step_do_not_count(tmp_path):
    from diffjax.sweep.table import finished_report

    run = plan_runs(tiny(), [{}], (), str(tmp_path))[0]
    folder = Path(run.workdir, "eval")
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"step": 6}))
    assert finished_report(run) is None
    (folder / "report.json").write_text(json.dumps({"step": 7}))
    assert finished_report(run) == {"step": 7}
