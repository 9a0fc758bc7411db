"""Files from anywhere for each reader of its own form: they are read, or refused in a line of words, and soon."""

import contextlib
import functools
import json
import random
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffjax.convert.weights import (
    WeightsError,
    load_ip_adapter,
    load_lora,
    load_official_dit,
    load_textual_inversion,
    official_dit,
    original_components,
)
from diffjax.convert.weights.adapters.lora_config import METADATA
from diffjax.convert.weights.folders.survey import components
from diffjax.convert.weights.originals.load import infer
from diffjax.convert.weights.tensors import Source, write
from diffjax.core.types import Model
from diffjax.data import load_tokenizer
from diffjax.models import dit

TOKENIZERS = Path(__file__).parents[2] / "parity" / "golden" / "tokenizers"
SCALES = pytest.mark.parametrize("scale", [1, pytest.param(5, marks=pytest.mark.slow)])
LONGEST, SECONDS = 4000, 5  # of a message, and of the time until it comes
NASTY = (
    0, 1, -1, 2, 8, 10**9, 2**62, 10**19, 0.5, 1e300, None, True, False, "", "a", "\0", "ü", "²", "(a+)+$", "n" * 999,
    [], {}, [[]], ["a"], [None], {"a": 1}, {"a": []}, "77", [1] * 99, {"^a.b": 3, "b": 2.5}, {"content": "x"}, "false",
)  # fmt: skip
DTYPES = ("float32", "float16", "float64", "int32", "bool", "uint8")


@contextlib.contextmanager
def soon():
    """Fails if what is inside takes longer than `SECONDS`."""

    def late(*_):
        raise TimeoutError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tried(scale, count, attempt, refusal=WeightsError):
    """Runs `attempt(rng)` often; it may raise `refusal` alone, and must do both."""
    seen = {"read": 0, "refused": 0}

    @settings(
        max_examples=count * scale, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, 2**40))
    def run(seed):
        try:
            with soon():
                attempt(random.Random(seed))
        except refusal as error:
            assert 10 < len(str(error)) < LONGEST and "\n" not in str(error)[:200]
            seen["refused"] += 1
        else:
            seen["read"] += 1

    run()
    assert all(seen.values()), seen


def spoiled_name(name, rng):
    """A name with another number, or with a part less, more, or of another kind."""
    parts = name.split(".")
    i = rng.randrange(len(parts))
    number = str(rng.choice([0, 7, 10**9, "²", "-1", "01"]))
    parts[i : i + 1] = rng.choice([[], [parts[i]] * 2, [number], [""], ["\0"], [parts[i] + "x"], ["n" * 999]])
    return ".".join(parts)


def spoiled(tensors, rng):
    """The arrays with up to three of them gone, renamed, of another shape or type, or with one more; or as they are."""
    tensors = dict(tensors)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        name = rng.choice(sorted(tensors) or [""])
        array = tensors.get(name, np.zeros(3, np.float32))
        what = rng.randrange(6)
        if what < 2:
            tensors.pop(name, None)
        if what == 1:
            tensors[spoiled_name(name, rng)] = array
        elif what == 2:
            shape = list(array.shape) + [1] * rng.choice([0, 0, 1])
            shape[rng.randrange(len(shape) or 1) : rng.choice([None, len(shape)])] = [rng.choice([0, 1, 2, 5])]
            tensors[name] = np.zeros(shape, array.dtype)
        elif what == 3:
            tensors[name] = array.astype(rng.choice(DTYPES))
        elif what == 4:
            tensors[spoiled_name(name, rng)] = array
        elif what == 5:
            tensors[name] = array.T
    return tensors


def written(path, tensors, metadata=None):
    sources = {k: Source(v.dtype, v.shape, lambda v=v: np.ascontiguousarray(v)) for k, v in tensors.items()}
    write(path, sources, metadata or {})
    return path


def ones(shapes):
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


def model_of(shapes, config):
    """A network of which nobody asks more than its parameters."""
    leaf = lambda tree: {k: leaf(v) if isinstance(v, dict) else np.zeros(v, np.float32) for k, v in tree.items()}
    return Model(lambda key: leaf(shapes), None, config)


BLOCK = {"attn": {f"to_{x}": {"kernel": (2, 4, 4)} for x in "qkv"}}
FLUX = model_of(
    {"transformer_blocks": {"0:2": BLOCK}, "proj_out": {"kernel": (4, 3)}, "norm_out": {"linear": {"kernel": (4, 8)}}},
    {"_class_name": "FluxTransformer2DModel"},
)
LORAS = {
    "peft": {
        f"transformer_blocks.{i}.attn.to_{x}.lora_{s}.weight": shape
        for i in (0, 1) for x in "qk" for s, shape in (("A", (2, 4)), ("B", (4, 2)))
    },
    "kohya": {
        "lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight": (2, 4),
        "lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight": (12, 2),
        "lora_unet_double_blocks_1_img_attn_qkv.alpha": (),
        "lora_unet_final_layer_adaLN_modulation_1.lora_down.weight": (1, 4),
        "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight": (8, 1),
    },
}  # fmt: skip
CONFIG = {"r": 2, "lora_alpha": 4, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "peft_type": "LORA"}


@SCALES
def test_lora(scale, tmp_path):
    def attempt(rng):
        tensors = spoiled(ones(LORAS[rng.choice([*LORAS])]), rng)
        if rng.random() < 0.2:
            tensors = {f"{rng.choice(['base_model.model', 'unet', 'text_encoder'])}.{k}": v for k, v in tensors.items()}
        config = dict(CONFIG)
        for _ in range(rng.choice([0, 0, 1, 2])):
            config[rng.choice([*CONFIG, "use_dora", "bias", "unet.r", "prior.lora_alpha"])] = rng.choice(NASTY)
        text = json.dumps(config)
        text = text[: rng.choice([None] * 9 + [7])]
        path = written(tmp_path / "a.safetensors", tensors, {METADATA: text} if rng.random() < 0.7 else None)
        load_lora(path, FLUX, component=rng.choice([None, None, None, "unet", "text_encoder"]))

    tried(scale, 300, attempt)


UNET = model_of(
    {"mid_block": {"attentions": {"0": {"transformer_blocks": {"0:1": {"attn2": {
        f"to_{x}": {"kernel": (1, 12, 8)} for x in "qkv"
    }}}}}}}, {},
)  # fmt: skip
IP = {
    "plain": {"image_proj.proj.weight": (24, 6), "image_proj.proj.bias": (24,)},
    "full": {
        "image_proj.proj.0.weight": (6, 6), "image_proj.proj.0.bias": (6,), "image_proj.proj.2.weight": (12, 6),
        "image_proj.proj.2.bias": (12,), "image_proj.proj.3.weight": (12,), "image_proj.proj.3.bias": (12,),
    },
    "plus": {
        "image_proj.latents": (1, 2, 8), "image_proj.proj_in.weight": (8, 6), "image_proj.proj_in.bias": (8,),
        "image_proj.layers.0.0.to_q.weight": (64, 8), "image_proj.layers.0.0.to_kv.weight": (128, 8),
        "image_proj.layers.0.1.1.weight": (9, 8), "image_proj.proj_out.weight": (12, 8),
    },
}  # fmt: skip
NORM = {"image_proj.norm.weight": (12,), "image_proj.norm.bias": (12,)}
IP["plain"] |= NORM


@SCALES
def test_ip_adapter(scale, tmp_path):
    attention = {f"ip_adapter.1.to_{x}_ip.weight": (8, 12) for x in "kv"}

    def attempt(rng):
        tensors = spoiled(ones(IP[rng.choice([*IP])] | attention), rng)
        load_ip_adapter(written(tmp_path / "a.safetensors", tensors), UNET)

    tried(scale, 50, attempt)


@SCALES
def test_textual_inversion(scale, tmp_path):
    forms = ({"<cat>": (3,)}, {"emb_params": (2, 3)}, {"clip_l": (2, 3), "clip_g": (2, 5)})

    def attempt(rng):
        path = written(tmp_path / "a.safetensors", spoiled(ones(rng.choice(forms)), rng))
        token, encoder = (
            rng.choice(some) for some in ([None, "<dog>", ["a", "b"], [], ["a", "a"]], [None, None, "clip_l", "x"])
        )
        load_textual_inversion(path, token, encoder=encoder)

    tried(scale, 200, attempt)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    path = tmp_path_factory.mktemp("dit") / "dit.safetensors"
    net = dit(shape=(4, 4, 1), num_classes=2, width=8, depth=1, heads=2, time_scale=1.0)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    official_dit.save_official_dit(net, jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes), path)
    return {name: tensor.part() for name, tensor in official_dit.find(path).items()}


@SCALES
def test_official_dit(scale, official, tmp_path, monkeypatch):
    # Most files are of the same few networks, and building one takes long.
    monkeypatch.setattr(official_dit, "dit", functools.cache(dit))

    def attempt(rng):
        path = written(tmp_path / "dit.safetensors", spoiled(official, rng))
        load_official_dit(path, heads=rng.choice([2, 2, 3]))

    tried(scale, 150, attempt)


@SCALES
def test_original_checkpoints(scale, tmp_path):
    vae = {
        "encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3), "encoder.conv_in.weight": (8, 3, 3, 3),
        "decoder.conv_out.weight": (3, 8, 3, 3), "decoder.conv_in.weight": (8, 4, 3, 3),
    }  # fmt: skip
    unet = {
        "input_blocks.0.0.weight": (8, 4, 3, 3), "input_blocks.1.0.in_layers.2.weight": (8, 8, 3, 3),
        "input_blocks.1.1.proj_in.weight": (8, 8, 1, 1), "out.2.weight": (4, 8, 3, 3),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 12),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (8, 12),
    }  # fmt: skip
    clip = {
        "embeddings.position_embedding.weight": (5, 8), "embeddings.token_embedding.weight": (9, 8),
        "encoder.layers.0.mlp.fc1.weight": (16, 8),
    }  # fmt: skip
    whole = {f"model.diffusion_model.{k}": v for k, v in unet.items()}
    whole |= {f"first_stage_model.{k}": v for k, v in vae.items()}
    whole |= {f"cond_stage_model.transformer.{k}": v for k, v in clip.items()}
    flux = {
        "double_blocks.0.img_attn.qkv.weight": (384, 128), "double_blocks.0.img_attn.norm.query_norm.scale": (128,),
        "img_in.weight": (128, 4), "txt_in.weight": (128, 6), "vector_in.in_layer.weight": (128, 5),
        "final_layer.linear.weight": (4, 128), "single_blocks.0.linear1.weight": (9, 128),
    }  # fmt: skip
    sd3 = {
        "joint_blocks.0.x_block.attn.qkv.weight": (24, 8), "x_embedder.proj.weight": (8, 4, 2, 2),
        "pos_embed": (1, 9, 8), "context_embedder.weight": (8, 6), "y_embedder.mlp.0.weight": (8, 5),
        "final_layer.linear.weight": (16, 8),
    }  # fmt: skip

    def attempt(rng):
        tensors = spoiled(ones(rng.choice([whole, flux, sd3, vae])), rng)
        contents = original_components(written(tmp_path / "a.safetensors", tensors))
        for name in contents.parts:
            infer(contents, name, rng.choice([None, "sd"]))

    tried(scale, 300, attempt)


@SCALES
@pytest.mark.parametrize("name", ["clip", "bert", "t5", "bert-json"])
def test_tokenizer(scale, name, tmp_path):
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    keys = (
        "model_max_length", "unk_token", "bos_token", "eos_token", "pad_token", "extra_ids",
        "additional_special_tokens", "added_tokens_decoder", "padding_side", "add_prefix_space", "do_lower_case",
        "strip_accents", "a",
    )  # fmt: skip
    sound = sorted(path for path in (TOKENIZERS / name).iterdir() if path.name not in names)

    def attempt(rng):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        shutil.copytree(TOKENIZERS / name, tmp_path / "a")
        for _ in range(rng.choice([0, 1, 2])):
            if rng.random() < 0.3:
                path = tmp_path / "a" / rng.choice(sound).name
                raw = bytearray(path.read_bytes())
                at = rng.randrange(len(raw))
                raw[at : at + rng.choice([0, 1, 9])] = rng.choice([b"", b"\0", b"\xff", b"{", b"\n", b'"', b"0"])
                path.write_bytes(raw[: rng.choice([None, None, at])])
            else:
                config = {rng.choice(keys): rng.choice(NASTY) for _ in range(rng.choice([1, 1, 2]))}
                (tmp_path / "a" / rng.choice(names)).write_text(json.dumps(config))
        tokenizer = load_tokenizer(tmp_path / "a")
        tokenizer(["a horse", ""], length=9, pad="longest")

    tried(scale, 60, attempt, (ValueError, FileNotFoundError))


@SCALES
def test_pipelines(scale, tmp_path):
    (tmp_path / "unet").mkdir()

    def attempt(rng):
        index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
        for _ in range(rng.choice([0, 1, 2])):
            index[rng.choice(["unet", "../x", "/etc", "", "a\0", "n" * 400, ".."])] = rng.choice([*NASTY, ["a", "b"]])
        text = json.dumps(index)
        (tmp_path / "model_index.json").write_text(text[: rng.choice([None] * 9 + [9])])
        assert components(tmp_path).keys() <= {"unet"}

    tried(scale, 150, attempt, (WeightsError, OSError))  # a name may be too long for the system
