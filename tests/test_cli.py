"""The command line as a user meets it: help, one-line errors with exit codes, and a run from start to end."""

import inspect
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from diffjax import cli

ROOT = Path(__file__).parents[1]
TINY = [
    f"--config={ROOT}/configs/digits_mlp.py:smoke",
    "--config.model.width=8",
    "--config.model.depth=1",
    "--config.num_steps=4",
    "--config.batch_size=8",
    "--config.ema=decay(0.5)",
]


def run(capsys, *argv):
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_help_lists_every_command_and_flag_with_examples(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name, command in cli.COMMANDS.items():
        assert f"  {name}" in out and command.summary in out
        code, text, _ = run(capsys, name, "--help")
        assert code == 0 and "examples:" in text and f"diffjax {name}" in text
        assert all(flag in text for flag, _ in command.flags)
        # Flags that a command refuses are not among its own.
        assert ("--config.KEY" in text) == (name not in ("latents", "convert", "doctor"))


@pytest.mark.parametrize(
    "argv, words",
    [
        (["tran"], ["unknown command 'tran'", "train, eval, sample, sweep, latents, inspect", "did you mean 'train'"]),
        (["train", "--wrkdir=x"], ["unknown argument '--wrkdir'", "did you mean '--workdir'"]),
        (["train", "--out=x"], ["unknown argument '--out'", "did you mean '--workdir'"]),
        (["sweep", "--workdir=x"], ["unknown argument '--workdir'", "did you mean '--out'"]),
        (["train", "--mesh=data=2"], ["unknown argument '--mesh'", "set by --config.mesh=VALUE"]),
        (["train", "--lr=1e-3"], ["set by --config.optim.lr=VALUE"]),
        (["train", "--steps=100"], ["set by --config.num_steps=VALUE"]),
        (["train", "--batch-size=4"], ["set by --config.batch_size=VALUE"]),
        (["train", *TINY], ["--workdir is missing", "--workdir=runs/digits"]),
        (["train", "--workdir=x"], ["--config is missing", "--config=configs/digits.py"]),
        (["train", "--config=gone.py", "--workdir=x"], ["no file 'gone.py'"]),
        (["train", *TINY, "--workdir=x", "--config.optim.lrr=1"], ["config.optim.lrr", "did you mean 'lr'"]),
        (["train", *TINY, "--workdir=x", "--config.num_steps"], ["--config.KEY=VALUE"]),
        (["train", *TINY, "--workdir=x", "--config.num_steps=-1"], ["config.num_steps is -1", "at least 1"]),
        (["train", *TINY, "--workdir=x", "--config.optim.lr=fast"], ["config.optim.lr is 'fast'", "a float"]),
        (["latents", "--config.data=a"], ["--config.data: latents takes no config; flags: --data, --encode"]),
        (["convert", "a", "b", "--config.seed=1"], ["--config.seed: convert takes no config; flags: SOURCE, TARGET"]),
        (["doctor", "--config.seed=1"], ["--config.seed: doctor takes no config"]),
        (["sample", "--workdir=x", "--steps=many"], ["--steps", "invalid int value: 'many'"]),
        (["sample", "--workdir=x", "--step=last"], ["--step", "invalid integer or 'best' value: 'last'"]),
        (["eval", "--workdir=x", "--join_timeout=9"], ["unknown argument '--join_timeout'"]),
        (["sample", "--workdir=x", "--stall_timeout=9"], ["unknown argument '--stall_timeout'"]),
        (["sample", "--workdir=x", "--seeds=0", "--num=2"], ["exclude each other"]),
        (["sample", "--workdir=x"], ["holds no run"]),
        (["eval", "--workdir=x"], ["holds no run"]),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == ""
    assert err.startswith("diffjax: ") and err.count("\n") == 1
    for word in words:
        assert word in err
    assert not (tmp_path / "x").exists()


VALUES = {
    "solver": "heun()", "steps": "7", "spacing": "uniform()", "guidance": "1.5", "interval": "(0.1, 2.0)",
    "num_samples": "64", "seeds": "2", "batch_size": "64",
}


@pytest.mark.parametrize("command, groups", [("eval", ("sample", "eval")), ("sample", ("sample",))])
def test_every_setting_of_a_trained_run_reaches_its_function(capsys, tmp_path, monkeypatch, command, groups):
    from diffjax.pipelines import evaluate, generate
    from diffjax.train import config as configs

    module, name = {"eval": (evaluate, "evaluate"), "sample": (generate, "generate")}[command]
    signature, seen = inspect.signature(getattr(module, name)), []
    monkeypatch.setattr(module, name, lambda *a, **k: seen.append(signature.bind(*a, **k).arguments))
    (tmp_path / "config.json").write_text(configs.to_json(configs.defaults()))
    keys = [(group, key) for group in groups for key in configs.defaults()[group]]
    for group, key in keys:
        code, _, err = run(capsys, command, f"--workdir={tmp_path}", f"--config.{group}.{key}={VALUES[key]}")
        assert code == 0, err
        assert str(seen.pop()[key]) == VALUES[key]
    for text, value in (("best", "best"), ("40", 40)):
        assert run(capsys, command, f"--workdir={tmp_path}", f"--step={text}")[0] == 0
        assert seen.pop()["step"] == value


@pytest.mark.parametrize("where", ["file", "file/below", "/dev/null/x"])
def test_a_folder_that_cannot_be_made_is_one_line(capsys, tmp_path, where):
    (tmp_path / "file").write_text("")
    workdir = tmp_path / where
    code, out, err = run(capsys, "train", *TINY, f"--workdir={workdir}")
    assert code == 1 and out == "" and err.startswith("diffjax: ") and err.count("\n") == 1
    assert str(workdir) in err or "file" in err


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error():
    program = f"import sys; from diffjax.cli import main; sys.exit(main({['inspect', *TINY, '--fast']!r}))"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.close()
    assert child.stderr.read() == "" and child.wait(timeout=120) == 141


def test_debug_shows_the_traceback(monkeypatch):
    with pytest.raises(ValueError, match="holds no run"):
        cli.main(["eval", "--workdir=nowhere", "--debug"])
    monkeypatch.setenv("DIFFJAX_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown command"):
        cli.main(["tran"])


def test_train_resumes_refuses_and_reports(capsys, tmp_path):
    workdir = f"--workdir={tmp_path}/run"
    code, _, err = run(capsys, "train", *TINY, workdir, "--config.stop_at=2")
    assert code == 0 and "step 2/2" in err
    code, _, err = run(capsys, "train", *TINY, workdir)
    assert code == 0 and "step 4/4" in err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["width"] == 8
    code, _, err = run(capsys, "train", *TINY, workdir, "--config.optim.lr=0.5")
    assert code == 2 and "optim.lr: 0.002 -> 0.5" in err
    code, _, err = run(capsys, "sample", workdir, "--config.optim.lr=0.5")
    assert code == 2 and "only config.sample.* and config.data" in err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["train", *TINY, f"--workdir={workdir}"]) == 0
    return workdir


def test_all_processes_but_the_first_leave_what_one_does_alone(capsys, monkeypatch, trained, tmp_path):
    for name, value in {"COORDINATOR": "127.0.0.1:1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}.items():
        monkeypatch.setenv(f"DIFFJAX_{name}", value)
    for command in ("sample", "eval"):
        out = f"--out={tmp_path / command}"
        assert run(capsys, command, f"--workdir={trained}", out) == (
            0, "process 1 of 2 has nothing to do: process 0 does it alone\n", ""
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, made",
    [
        (["sample", "--classes=0", "--seeds=0,1", "--steps=2"], "samples"),
        (["eval", "--quick", "--num_samples=64", "--seeds=1", "--steps=2"], "eval"),
    ],
)
def test_of_two_processes_the_first_works_and_the_other_leaves(trained, tmp_path, command, made):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "diffjax", *command, f"--workdir={trained}", f"--out={tmp_path / made}"]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "DIFFJAX_COORDINATOR": f"127.0.0.1:{port}"}
    both = []
    for index in range(2):
        mine = environ | {"DIFFJAX_NUM_PROCESSES": "2", "DIFFJAX_PROCESS_ID": str(index)}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        both.append(subprocess.Popen(argv, cwd=ROOT, env=mine, **pipes))
    try:
        first, other = (process.communicate(timeout=100)[0] for process in both)
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], first + other
    assert other == "process 1 of 2 has nothing to do: process 0 does it alone\n"
    assert "process 0" not in first and list(tmp_path.glob("**/*.png"))


@pytest.mark.slow
def test_a_run_that_diverges_exits_with_1(capsys, tmp_path):
    huge = ["--config.optim.name=sgd", "--config.optim.lr=1e30", "--config.optim.clip=0"]
    code, _, err = run(capsys, "train", *TINY, *huge, f"--workdir={tmp_path}")
    assert code == 1 and "is not finite" in err.splitlines()[-1]


def test_inspect_counts_what_the_network_has(capsys):
    code, out, _ = run(capsys, "inspect", *TINY, "--fast")
    # Width 8, depth 1 on 8 x 8 x 1 pixels: the input layer alone is 64 x 8 weights and 8 biases.
    assert code == 0 and '"width": 8' in out
    row = next(line.split() for line in out.splitlines() if line.startswith("inp/kernel"))
    assert row[1:5] == ["(64,", "8)", "float32", "512"]
    sizes = [int(re.split(r"\s{2,}", line)[3].replace(",", "")) for line in parameter_rows(out)]
    total = next(line for line in out.splitlines() if line.startswith("total:"))
    assert total.startswith(f"total: {sum(sizes):,} parameters")


def parameter_rows(out):
    lines = out.splitlines()
    return lines[lines.index("parameters") + 2 : next(i for i, line in enumerate(lines) if line.startswith("total:"))]


@pytest.mark.often("data")
@pytest.mark.parametrize("mode", ["data", "pmap"])
def test_inspect_compiles_the_step_for_its_memory(capsys, mode):
    code, out, _ = run(capsys, "inspect", *TINY, f"--config.sharding={mode}")
    assert code == 0 and "of temporary memory per device" in out


def test_doctor_names_what_is_there(capsys):
    import jax

    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in (f"jax {jax.__version__}", "devices (cpu", "compile cache: "):
        assert word in out


def test_doctor_lists_every_extra_and_what_it_needs(capsys, monkeypatch):
    from diffjax.train import describe

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    del project["test"]
    monkeypatch.setattr(describe, "_version", lambda name: "missing" if name == "submitit" else "1.0")
    _, out, _ = run(capsys, "doctor")
    rows = {row.partition(":")[0].strip(): row for row in out.partition("\nextras\n")[2].splitlines()}
    assert list(rows) == sorted(project)
    for extra, requirements in project.items():
        needs = ", ".join(re.match(r"[\w.-]+", text)[0] + " 1.0" for text in requirements)
        if extra == "slurm":
            assert rows[extra].endswith("; submitit missing: pip install 'diffjax[slurm]'")
        else:
            assert rows[extra].endswith(f"; {needs}")


def test_python_m_diffjax_is_the_same_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "diffjax", "trian"], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 2 and done.stderr.startswith("diffjax: unknown command 'trian'")
    assert "Traceback" not in done.stderr


def test_an_interrupt_is_one_line_and_130(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffjax.pipelines.bulk.sample_many", interrupted)
    assert cli.main(["sample", "--workdir=runs/none", "--num=4"]) == 130
    assert capsys.readouterr().err == "diffjax: interrupted; finished shards are kept, and the same command goes on\n"
