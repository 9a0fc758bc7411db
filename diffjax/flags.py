"""The commands of the command line and their flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

from diffjax import commands

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
        commands.train,
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
        commands.evaluate,
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
        commands.sample,
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
        commands.sweep,
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
        commands.latents,
    ),
    "inspect": Command(
        "show a config's or a checkpoint's parameters, bytes, FLOPs and sharding",
        (
            "diffjax inspect --config=configs/digits.py",
            "diffjax inspect --config=configs/digits_dit.py --config.model.depth=8",
            "diffjax inspect --config=configs/dit_xl_2.py --mesh=data=1,fsdp=8 --sharding=fsdp --accelerator=h200",
            "diffjax inspect stable-diffusion --variant=fp16",
            "diffjax inspect sd_xl_base_1.0.safetensors",
            "diffjax inspect flux/transformer --mesh=fsdp=8 --dtype=bfloat16",
        ),
        (
            ("FOLDER", dict(nargs="?", help="of weights, of a pipeline or of a run, or one .safetensors file")),
            _CONFIG,
            _WORKDIR,
            ("--fast", dict(action="store_true", help="do not compile: without the temporary memory")),
            ("--mesh", dict(metavar="AXES", help="plan a run on a mesh that is not here, up to 512 devices")),
            ("--sharding", dict(metavar="MODE", help="with --mesh: 'data', 'fsdp' or 'rules'; default the config's")),
            ("--accelerator", dict(metavar="NAME", help="with --mesh: such as h200 or tpu_v5p; default all known")),
            ("--variant", dict(metavar="NAME", help="of a folder's weights, such as fp16")),
            ("--dtype", dict(metavar="TYPE", help="count a folder's weights as of this type, such as bfloat16")),
            ("--values", dict(action="store_true", help="read a folder's weights and look for NaN")),
        ),
        commands.inspect,
    ),
    "convert": Command(
        "write a checkpoint again: in another type, in other files, under other names",
        (
            "diffjax convert stable-diffusion/unet half/unet --dtype=float16",
            "diffjax convert flux/transformer flux-2/transformer --shard-gb=5",
            "diffjax convert dit/transformer weights/dit --keys=params",
            "diffjax convert sd_xl_base_1.0.safetensors sdxl/unet --component=unet --dtype=bfloat16",
            "diffjax convert stable-diffusion half --dtype=float16",
            "diffjax convert sd/unet unet.safetensors --keys=original",
            "diffjax convert runs/digits weights/digits --keys=params --ema=raw",
        ),
        (
            ("SOURCE", dict(nargs="?", help="folder of weights, pipeline, file, or a run's workdir")),
            ("TARGET", dict(nargs="?", help="folder to write; a file for --keys=original")),
            ("--dtype", dict(metavar="TYPE", help="of floating point; default the file's own")),
            ("--variant", dict(metavar="NAME", help="of the source's files, such as fp16; the target's have none")),
            ("--shard-gb", dict(type=float, metavar="GB", help="most in one file; default 10")),
            ("--keys", dict(metavar="NAMES", help="'diffusers', 'params' or 'original'; default the same")),
            ("--component", dict(metavar="NAME", help="of a file with several networks: unet, vae, ...")),
            ("--family", dict(metavar="NAME", help="of a file with a VAE alone: sd, sd2, sdxl, sd3 or flux")),
            ("--network", dict(metavar="FILE", help="config.json for --component of no published shapes")),
            ("--overwrite", dict(action="store_true", help="replace the weights and the config that TARGET has")),
            _EMA,
            _STEP,
        ),
        commands.convert,
    ),
    "doctor": Command(
        "show versions, devices, memory, compile cache and extras",
        ("diffjax doctor",),
        (),
        commands.doctor,
    ),
}
