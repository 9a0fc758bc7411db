"""The commands of the command line: their flags, and what they call; everything heavy is imported when it is used."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from diffjax.train.errors import RESUME, NonFiniteError, WorkdirError

USAGE_ERROR = 2
FAILURE = 1
_CONFIG = ("--config", dict(metavar="FILE.py[:ARG]", help="a config program, and what to give to its get_config"))
_WORKDIR = ("--workdir", dict(metavar="DIR", help="folder of the run: config, checkpoints, metrics, results"))
_EMA = ("--ema", dict(metavar="SPEC", help="which average of the parameters, or 'raw'; default the config's first"))


def _step(text: str) -> int | str:
    return text if text == "best" else int(text)


# What argparse calls the type in its message.
_step.__name__ = "integer or 'best'"
_STEP = ("--step", dict(type=_step, metavar="N", help="which checkpoint, or 'best' by its loss; default the newest"))


class Command(NamedTuple):
    """A subcommand: one line of help, examples, its flags, and `run(arguments, overrides) -> exit code`."""

    summary: str
    examples: tuple[str, ...]
    flags: tuple
    run: Callable[[argparse.Namespace, dict[str, str]], int]


def describe(error: BaseException) -> tuple[int, str]:
    """Exit code and text of an error: one line for an expected one, else its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, str(error) or "interrupted"
    if not isinstance(error, expected_errors()):
        return FAILURE, "".join(traceback.format_exception(error))
    return USAGE_ERROR if isinstance(error, ValueError) else FAILURE, " ".join(str(error).split())


class UsageError(ValueError):
    """A command line that cannot be read."""


def expected_errors() -> tuple[type[Exception], ...]:
    """What a user can cause and mend; library functions raise `ValueError` for their arguments."""
    expected = (ValueError, OSError, FloatingPointError, NonFiniteError, WorkdirError, ModuleNotFoundError)
    # Importing it would load Orbax for the sake of an error that nobody has raised.
    checkpoint = sys.modules.get("diffjax.train.checkpoint")
    return (*expected, checkpoint.CheckpointError) if checkpoint else expected


def required(arguments: argparse.Namespace, flag: str, example: str) -> str:
    """The value of a flag that the command cannot do without.

    Raises:
      UsageError: if it was not given.
    """
    value = getattr(arguments, flag)
    if not value:
        raise UsageError(f"--{flag} is missing; give one, such as --{flag}={example}")
    return value


def given_config(arguments, overrides):
    """The config of `--config` with the overrides; from `--workdir` if there is no `--config`."""
    from diffjax.train import config as configs
    from diffjax.train.survival.workdir import read_config

    if not arguments.config and arguments.workdir and os.path.isdir(arguments.workdir):
        config = read_config(arguments.workdir)
    else:
        config = configs.load(required(arguments, "config", "configs/digits.py"))
    for key, text in overrides.items():
        configs.override(config, key, text)
    return config


def run_settings(workdir: str, overrides: dict[str, str], groups: Sequence[str]) -> dict:
    """The values that `--config.GROUP.KEY=VALUE` and `--config.data=VALUE`, for data that were moved, give to settings
    of a trained run, by last part of the key.

    Raises:
      UsageError: for another key: the rest of a trained run's config is what its parameters mean.
    """
    if not overrides:
        return {}
    from diffjax.train import config as configs
    from diffjax.train.survival.workdir import read_config

    config, values = read_config(workdir), {}
    for key, text in overrides.items():
        if key.split(".")[0] not in (*groups, "data"):
            allowed = ", ".join(f"config.{group}.*" for group in groups)
            raise UsageError(
                f"--config.{key}: the run is trained already; only {allowed} and config.data, where the same data lie "
                "now, can be changed here"
            )
        configs.override(config, key, text)
    filled = configs.flat(configs.fill(config))
    for key in overrides:
        values[key.split(".")[-1]] = filled[key]
    return values


def _cluster_flags(arguments) -> dict:
    from diffjax.train.parallel.cluster import FLAGS

    return {name: getattr(arguments, name) for name in FLAGS}


@contextlib.contextmanager
def together(arguments):
    """The other processes of the command while the block lasts, None where it runs alone; see docs/processes.md."""
    from diffjax.train.parallel import cluster, processes

    found = cluster.find(os.environ, **_cluster_flags(arguments))
    settings = dict(timeout_s=arguments.join_timeout, stall_s=arguments.stall_timeout)
    with processes.joined(found, describe, **settings) as peers:
        yield peers


def is_chosen(arguments) -> bool:
    """Whether this is process 0, which does the work of a command that takes no other; elsewhere says that it does.

    They are not joined: JAX starts the devices of joined processes together, and the others need none.
    """
    from diffjax.train.parallel.processes import place

    index, count = place(os.environ, **_cluster_flags(arguments))
    if index:
        sys.stdout.write(f"process {index} of {count} has nothing to do: process 0 does it alone\n")
    return not index


def train(arguments, overrides) -> int:
    """`diffjax train`."""
    workdir = required(arguments, "workdir", "runs/digits")
    with together(arguments) as peers:
        config = given_config(arguments, overrides)
        from diffjax.pipelines.preview import preview
        from diffjax.runtime import set_up
        from diffjax.train.loop import train as run

        set_up()
        settings = dict(allow_changes=arguments.allow_changes, early=leave_at_once)
        result = run(config, workdir, preview=preview, peers=peers, **settings)
    return stopped_by(result.signal) if result.signal else 0


def leave_at_once(number: int) -> None:
    """Ends the process before the first step of a training: there is nothing to save, and the main thread may compile
    for minutes yet."""
    name = signal.Signals(number).name
    text = f"\ndiffjax: {name} before the first step; nothing is lost, and the same command starts again\n"
    try:
        os.write(2, text.encode())
    finally:  # A Ctrl-C may have ended the reader of the line as well.
        os._exit(stopped_by(number))


def stopped_by(number: int) -> int:
    """The exit code of a training that a signal stopped."""
    return RESUME if number == signal.SIGTERM else 128 + number


def evaluate(arguments, overrides) -> int:
    """`diffjax eval`."""
    workdir = required(arguments, "workdir", "runs/digits")
    names = ("ema", "step", "num_samples", "seeds", "seed", "solver", "steps", "spacing", "guidance", "interval", "out")
    options = run_settings(workdir, overrides, ("sample", "eval")) | _given(arguments, *names)
    if arguments.samples:
        others = [f"--{name}" for name in options if name not in ("out", "data")] + ["--quick"] * arguments.quick
        if others:
            raise UsageError(f"eval: --samples=DIR judges what is there, so {others[0]} has no meaning beside it")
    else:
        options["quick"] = arguments.quick
    if not is_chosen(arguments):
        return 0
    from diffjax.pipelines.evaluate import evaluate as run
    from diffjax.pipelines.evaluate import evaluate_samples
    from diffjax.runtime import set_up

    set_up()
    if arguments.samples:
        evaluate_samples(workdir, arguments.samples, **options)
    else:
        run(workdir, **options)
    return 0


def sample(arguments, overrides) -> int:
    """`diffjax sample`."""
    workdir = required(arguments, "workdir", "runs/digits")
    names = ("ema", "step", "classes", "seeds", "solver", "steps", "spacing", "guidance", "interval", "out")
    options = run_settings(workdir, overrides, ("sample",)) | _given(arguments, *names)
    bulk = _given(arguments, "seed", "labels", "shard_size", "batch_size", "part")
    if arguments.num is not None:
        return sample_many(arguments, options | bulk)
    if bulk:
        raise UsageError(f"sample: --{next(iter(bulk))} belongs to --num=N, which draws N samples into a folder")
    if not is_chosen(arguments):
        return 0
    from diffjax.pipelines.generate import generate
    from diffjax.runtime import set_up

    set_up()
    generate(workdir, **options)
    return 0


def sample_many(arguments, options: dict) -> int:
    """`diffjax sample --num`: every process draws a part of its own and waits for no other."""
    if "seeds" in options:
        raise UsageError("sample: --num and --seeds exclude each other; --num=100 has the seeds 0 to 99, see --seed")
    if options.get("out", "").endswith((".png", ".npz")):
        raise UsageError(f"sample: --num writes a folder, but --out={options['out']} is a file; --seeds writes one")
    from diffjax.pipelines.bulk import sample_many
    from diffjax.runtime import set_up
    from diffjax.train.parallel.processes import place

    if "part" not in options:
        options["part"] = place(os.environ, **_cluster_flags(arguments))
    set_up()
    try:
        sample_many(arguments.workdir, arguments.num, **options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; finished shards are kept, and the same command goes on") from None
    return 0


def sweep(arguments, overrides) -> int:
    """`diffjax sweep CONFIG`."""
    arguments.workdir = None
    arguments.config = arguments.CONFIG or arguments.config
    config = given_config(arguments, overrides)
    grid = required(arguments, "grid", "'optim.lr=[1e-4,3e-4]; model.depth=[6,12]'")
    out = required(arguments, "out", "runs/sweep")
    if arguments.slurm is not None and not arguments.launcher:
        arguments.launcher = "slurm"
    from diffjax.sweep.grid import options_of
    from diffjax.sweep.run import sweep as run

    file = os.path.abspath(arguments.config.partition(".py:")[0])
    return run(
        config,
        grid,
        out,
        seeds=arguments.seeds or (),
        cluster=arguments.launcher or "",
        options=options_of(arguments.slurm or ""),
        path=(os.path.dirname(os.path.dirname(file)), os.getcwd()),
        dry_run=arguments.dry_run,
    )


def latents(arguments, overrides) -> int:
    """`diffjax latents`."""
    if overrides:
        raise UsageError(f"--config.{next(iter(overrides))}: latents takes no config; give --data and --encode")
    data = required(arguments, "data", "\"folder(path='photos', size=256)\"")
    encode = required(arguments, "encode", "my_package.vae:encode")
    out = required(arguments, "out", "latents/photos")
    # The user's own modules are named relative to where the user stands.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    from diffjax.pipelines.latents import write_latents
    from diffjax.runtime import set_up

    set_up()
    names = ("shards", "batch_size", "threads", "max_bad", "process_index", "process_count")
    write_latents(data, encode, out, stream=sys.stderr, **_given(arguments, *names))
    return 0


def inspect(arguments, overrides) -> int:
    """`diffjax inspect`."""
    config = given_config(arguments, overrides)
    if arguments.mesh:
        from diffjax.train.describe import describe_plan

        text = describe_plan(config, arguments.mesh, sharding=arguments.sharding, accelerator=arguments.accelerator)
        sys.stdout.write(text)
        return 0
    if arguments.accelerator or arguments.sharding:
        raise UsageError("inspect: --accelerator and --sharding plan a run and need a mesh, such as --mesh=data=8")
    from diffjax.train.describe import describe

    sys.stdout.write(describe(config, compile=not arguments.fast))
    return 0


def doctor(arguments, overrides) -> int:
    """`diffjax doctor`."""
    from diffjax.train.describe import machine

    sys.stdout.write(machine())
    return 0


def _given(arguments, *names) -> dict:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _numbers(kind):
    def parse(text):
        return tuple(kind(item) for item in text.split(",") if item.strip())

    parse.__name__ = f"comma-separated {kind.__name__} list"
    return parse


_ALLOW = (
    "--allow_changes",
    dict(action="store_true", help="go on with another config than the run was started with; the changes are recorded"),
)
_PLACE = (
    ("--num_processes", dict(type=int, metavar="N", help="how many processes run this command together")),
    ("--process_id", dict(type=int, metavar="I", help="which of them this is, from 0")),
)
# Where no process joins another.
_APART = (("--coordinator", dict(metavar="HOST:PORT", help="taken as by train, and not needed")), *_PLACE)
_TOGETHER = (
    ("--coordinator", dict(metavar="HOST:PORT", help="of process 0 of several; default what the launcher says")),
    *_PLACE,
    ("--join_timeout", dict(type=int, default=300, metavar="S", help="seconds to wait for the others; default 300")),
    ("--stall_timeout", dict(type=float, default=1800, metavar="S", help="stop all after so long without a step")),
)


def _part(text):
    index, _, count = text.partition("/")
    return int(index), int(count)


# What argparse calls the type in its message.
_part.__name__ = "I/N"
_SAMPLING = (
    ("--solver", dict(metavar="SPEC", help="such as 'heun()' or 'ddim(eta=1.0)'; default the config's")),
    ("--steps", dict(type=int, metavar="N", help="steps of the solver")),
    ("--spacing", dict(metavar="SPEC", help="grid of noise levels, such as 'karras(s_max=40.0)'")),
    ("--guidance", dict(type=float, metavar="W", help="classifier-free guidance scale; 1 is none")),
    ("--interval", dict(type=_numbers(float), metavar="LO,HI", help="sigma / alpha between which guidance acts")),
)
COMMANDS = {
    "train": Command(
        "train a model, or go on with an interrupted training",
        (
            "diffjax train --config=configs/digits.py --workdir=runs/digits",
            "diffjax train --config=configs/digits.py:smoke --workdir=runs/smoke",
            "diffjax train --config=configs/digits.py --config.optim.lr=2e-3 --workdir=runs/lr",
        ),
        (_CONFIG, _WORKDIR, _ALLOW, *_TOGETHER),
        train,
    ),
    "eval": Command(
        "measure a trained model against held-out data",
        (
            "diffjax eval --workdir=runs/digits",
            "diffjax eval --workdir=runs/digits --steps=10 --solver='heun()'",
        ),
        (
            _WORKDIR,
            _EMA,
            ("--num_samples", dict(type=int, metavar="N", help="samples a seed; default as many as held out, to 5000")),
            ("--seeds", dict(type=int, metavar="N", help="repetitions with other noise")),
            ("--seed", dict(type=int, metavar="S", help="seed of the first repetition; default 0")),
            ("--samples", dict(metavar="DIR", help="judge samples of `diffjax sample --num`, draw none")),
            ("--quick", dict(action="store_true", help="leave out the sweeps over guidance and steps")),
            *_SAMPLING,
            _STEP,
            ("--out", dict(metavar="DIR", help="where to write; default WORKDIR/eval")),
            *_APART,
        ),
        evaluate,
    ),
    "sample": Command(
        "draw samples from a trained model",
        (
            "diffjax sample --workdir=runs/digits --classes=0,1,2 --seeds=0,1",
            "diffjax sample --workdir=runs/digits --seeds=0,1,2 --guidance=1.5 --out=eights.png --classes=8",
            "diffjax sample --workdir=runs/digits --num=50000 --out=runs/digits/samples-50000",
        ),
        (
            _WORKDIR,
            ("--classes", dict(type=_numbers(int), metavar="C,C", help="labels; default every class")),
            ("--seeds", dict(type=_numbers(int), metavar="S,S", help="a sample of each class a seed; default 0 to 9")),
            ("--num", dict(type=int, metavar="N", help="N samples in all, in a folder of shards; resumable")),
            ("--seed", dict(type=int, metavar="S", help="with --num: seed of the first sample; default 0")),
            ("--labels", dict(choices=("balanced", "random"), help="with --num: classes in turn, or drawn")),
            ("--shard_size", dict(type=int, metavar="N", help="with --num: samples in a file; default 1000")),
            ("--batch_size", dict(type=int, metavar="N", help="with --num: samples in a call, on each device")),
            ("--part", dict(type=_part, metavar="I/N", help="with --num: every N-th shard from I on")),
            *_SAMPLING,
            _EMA,
            _STEP,
            ("--out", dict(metavar="PATH", help="where to write; default WORKDIR/samples")),
            *_APART,
        ),
        sample,
    ),
    "sweep": Command(
        "train every combination of a grid of settings, and compare the runs",
        (
            "diffjax sweep configs/digits_dit.py --grid='optim.lr=[1e-3,4e-3]; model.depth=[2,4]' --out=runs/sweep",
            "diffjax sweep configs/digits.py --grid='seed=[0,1]' --out=runs/seeds --dry_run",
        ),
        (
            ("CONFIG", dict(nargs="?", help="the same as --config")),
            _CONFIG,
            ("--grid", dict(metavar="TEXT", help="KEY=[A,B] joined by ';' (all combinations) or '&' (in step)")),
            ("--seeds", dict(type=_numbers(int), metavar="S,S", help="config.seed of the runs of each combination")),
            ("--out", dict(metavar="DIR", help="folder of the sweep: a folder a run, runs.csv, table.md, sweep.png")),
            ("--launcher", dict(choices=("slurm",), help="a job for each run; default one after another, here")),
            ("--slurm", dict(metavar="TEXT", help="of each job, such as 'slurm_partition=gpu; timeout_min=60'")),
            ("--dry_run", dict(action="store_true", help="list the runs and start none")),
        ),
        sweep,
    ),
    "latents": Command(
        "encode a data set once and write the latents to train on",
        (
            "diffjax latents --data=\"folder(path='photos', size=256)\" --encode=my_vae:encode --out=latents/photos",
            "diffjax train --config=configs/my.py --config.data=\"latents(path='latents/photos')\" --workdir=runs/my",
        ),
        (
            ("--data", dict(metavar="SPEC", help="as config.data, such as \"folder(path='photos', size=256)\"")),
            ("--encode", dict(metavar="PKG.MODULE:FN", help="images [B, H, W, C] in [-1, 1] -> latents [B, h, w, c]")),
            ("--out", dict(metavar="DIR", help="folder of the latents; the same command goes on with it")),
            ("--shards", dict(type=int, metavar="N", help="files for the training half; default 16")),
            ("--batch_size", dict(type=int, metavar="N", help="images in one call of the encoder; default 64")),
            ("--threads", dict(type=int, metavar="N", help="that read images; default 4")),
            ("--max_bad", dict(type=int, metavar="N", help="unreadable images to leave out of a shard; default 0")),
            ("--process_index", dict(type=int, metavar="P", help="writes the shards P, P + COUNT, ...; default 0")),
            ("--process_count", dict(type=int, metavar="COUNT", help="processes that share the shards; default 1")),
        ),
        latents,
    ),
    "inspect": Command(
        "show a config's parameters, bytes, FLOPs and sharding without training",
        (
            "diffjax inspect --config=configs/digits.py",
            "diffjax inspect --config=configs/digits_dit.py --config.model.depth=8",
            "diffjax inspect --config=configs/dit_xl_2.py --mesh=data=1,fsdp=8 --sharding=fsdp --accelerator=h200",
        ),
        (
            _CONFIG,
            _WORKDIR,
            ("--fast", dict(action="store_true", help="do not compile: without the temporary memory")),
            ("--mesh", dict(metavar="AXES", help="plan a run on a mesh that is not here, up to 512 devices")),
            ("--sharding", dict(metavar="MODE", help="with --mesh: 'data', 'fsdp' or 'rules'; default the config's")),
            ("--accelerator", dict(metavar="NAME", help="with --mesh: such as h200 or tpu_v5p; default all known")),
        ),
        inspect,
    ),
    "doctor": Command(
        "show versions, devices, memory, compile cache and extras",
        ("diffjax doctor",),
        (),
        doctor,
    ),
}
