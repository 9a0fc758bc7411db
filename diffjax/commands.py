"""What the commands of the command line call; everything heavy is imported when it is used."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from diffjax.train.errors import RESUME, NonFiniteError, WorkdirError

USAGE_ERROR = 2
FAILURE = 1


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
    if arguments.FOLDER:
        return inspect_folder(arguments, overrides)
    if beside := next((name for name in _OF_FOLDERS if getattr(arguments, name)), ""):
        raise UsageError(f"inspect: --{beside} belongs to a folder of weights, as in diffjax inspect FOLDER --{beside}")
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


_OF_FOLDERS = ("variant", "dtype", "values")


def inspect_folder(arguments, overrides) -> int:
    """`diffjax inspect FOLDER`; 1 if what it holds does not fit."""
    from diffjax.folders.convert import is_run
    from diffjax.folders.inspect import describe_folder

    others = [name for name in ("config", "workdir", "accelerator", "fast") if getattr(arguments, name)]
    if is_run(arguments.FOLDER) and "config" not in others and "workdir" not in others:
        arguments.FOLDER, arguments.workdir = None, arguments.FOLDER
        return inspect(arguments, overrides)
    others = [*others, *(f"config.{key}" for key in overrides)]
    if others:
        raise UsageError(f"inspect: --{others[0]} is for configs and runs; {arguments.FOLDER} is a folder of weights")
    if arguments.sharding and not arguments.mesh:
        raise UsageError("inspect: --sharding needs a mesh, such as --mesh=fsdp=8")
    given = _given(arguments, "variant", "dtype", "mesh", "sharding")
    text, fits = describe_folder(arguments.FOLDER, values=arguments.values, **given)
    sys.stdout.write(text)
    return 0 if fits else FAILURE


def convert(arguments, overrides) -> int:
    """`diffjax convert SOURCE TARGET`."""
    if not (arguments.SOURCE and arguments.TARGET):
        raise UsageError("convert: two folders are needed, as in diffjax convert sd/unet sd16/unet --dtype=float16")
    from diffjax.folders.convert import convert as run
    from diffjax.folders.convert import size_of

    names = ("dtype", "variant", "shard_gb", "keys", "component", "family", "network", "ema", "step")
    run(arguments.SOURCE, arguments.TARGET, overwrite=arguments.overwrite, **_given(arguments, *names))
    sys.stdout.write(f"{arguments.SOURCE} -> {arguments.TARGET}: {size_of(arguments.TARGET)}\n")
    return 0


def doctor(arguments, overrides) -> int:
    """`diffjax doctor`."""
    from diffjax.train.describe import machine

    sys.stdout.write(machine())
    return 0


def _given(arguments, *names) -> dict:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
