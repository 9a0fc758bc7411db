"""IP-Adapters: what diffusers makes of the same files, and what is refused."""

import json
import os
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from compare import close_gradient
from drawn import params_of
from networks import unet_cond

from diffjax.adapters import ip_adapter
from diffjax.convert import WeightsError, load_ip_adapter, save, save_ip_adapter
from diffjax.convert.weights.tensors import Source, read_header, write
from diffjax.models import from_config
from diffjax.nn.functional import names_of
from diffjax.train import paths

GOLDEN = Path(__file__).parent.parent / "parity" / "golden" / "adapters"
LIVE = os.environ.get("DIFFJAX_PARITY")
RUNS = sorted(Path(LIVE, "ip_adapter").glob("*.npz")) if LIVE else []
TOLERANCE = dict(atol=2e-5, rtol=1e-4)
SCALES = (0.6, -0.3)


def written(path, tensors):
    sources = {k: Source(v.dtype, v.shape, lambda v=v: v) for k, v in tensors.items()}
    write(path, sources, {"format": "pt"})
    return path


class Run:
    """A recorded run, and the same adapters in files."""

    def __init__(self, path, folder):
        self.run = dict(np.load(path))
        facts = json.loads(str(self.run["facts"]))
        self.model, name = from_config(facts["config"]), path.stem.removeprefix("ip_adapter_")
        self.params, self.tensors, self.files = params_of(self.model), [], []
        for i, shapes in enumerate(facts["adapters"]):
            self.tensors.append({k: networks.weight(f"{name}/{i}/{k}", tuple(s)) for k, s in shapes.items()})
            self.files.append(written(folder / f"{i}.safetensors", self.tensors[-1]))
        self.adapters = [load_ip_adapter(file, self.model) for file in self.files]
        self.embeds = [self.run[f"embeds/{i}"] for i in range(len(self.files))]
        self.given = {k[3:]: v for k, v in self.run.items() if k.startswith("in/")}
        self.net = ip_adapter.with_pictures(facts["config"], len(self.files))

    def output(self, adapters, scales):
        tokens = [ip_adapter.project(a, e) for a, e in zip(adapters, self.embeds, strict=True)]
        given = dict(self.given, pictures=list(zip(tokens, scales, strict=True)))
        return unet_cond.ours(self.net, ip_adapter.join(self.params, adapters), given)["out"]

    def check(self, gradients=True):
        def loss(adapters, scales):
            out = self.output(adapters, scales)
            return jnp.sum(out * self.run["probe"]), out

        run = jax.jit(jax.value_and_grad(loss, has_aux=True) if gradients else lambda *given: (loss(*given), None))
        (_, out), gradients = run(self.adapters, jnp.float32(SCALES[: len(self.files)]))
        # What the pictures add is not small beside the output.
        assert np.std(self.run["out/out"] - self.run["out/base"]) > 0.02 * np.std(self.run["out/out"])
        np.testing.assert_allclose(out, self.run["out/out"], **TOLERANCE)
        return gradients


@cache
def recorded(name, folder):
    return Run(GOLDEN / f"ip_adapter_{name}.npz", folder)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ip")

    def of(name):
        (folder / name).mkdir(exist_ok=True)
        return recorded(name, folder / name)

    return of


def compare(run, gradients, tmp_path):
    """Gradients under the names of the files, by writing them as an adapter."""
    for i, gradient in enumerate(gradients):
        save_ip_adapter(gradient, run.model, tmp_path / "gradient.safetensors")
        ours = {k: t.part() for k, t in read_header(tmp_path / "gradient.safetensors")[0].items()}
        truth = {k.split("/", 2)[2]: v for k, v in run.run.items() if k.startswith(f"gradient/{i}/")}
        assert len(truth) > 3
        for key, value in truth.items():
            close_gradient(ours[key], value, key, run.run[f"rounding/{i}/{key}"])


def test_adapters_are_those_of_diffusers(case):
    case("sdxl").check(gradients=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_gradients_for_adapters_are_those_of_diffusers(name, case, tmp_path):
    run = case(name)
    compare(run, run.check(), tmp_path)


@pytest.mark.skipif(not LIVE, reason="`make parity` records random adapters and sets DIFFJAX_PARITY")
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_live_adapters_are_those_of_diffusers(path, tmp_path):
    run = Run(path, tmp_path)
    compare(run, run.check(), tmp_path)
    round_trip(run, tmp_path)


def round_trip(run, tmp_path):
    for adapter, tensors in zip(run.adapters, run.tensors, strict=True):
        save_ip_adapter(adapter, run.model, tmp_path / "again.safetensors")
        again = {k: t.part() for k, t in read_header(tmp_path / "again.safetensors")[0].items()}
        assert again.keys() == tensors.keys()
        assert all(again[k].tobytes() == v.tobytes() for k, v in tensors.items())


def test_a_unet_is_saved_without_its_adapters(case, tmp_path):
    run = case("sd")
    net, params = ip_adapter.with_pictures(run.model.config), ip_adapter.join(run.params, run.adapters[:1])
    with pytest.raises(WeightsError, match=f"^{tmp_path}: parameters of IP-Adapters, .*: .*to_k_ip"):
        save(net, params, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_what_is_saved_is_what_was_read(name, case, tmp_path):
    round_trip(case(name), tmp_path)


def test_a_fresh_adapter_starts_with_the_text(case):
    run = case("sd")
    adapter = ip_adapter.init(jax.random.key(0), run.params, 6, tokens=2)
    assert ip_adapter.project(adapter, jnp.ones((3, 6))).shape == (3, 2, 12)
    assert ip_adapter.project(adapter, jnp.ones((3, 2, 6))).shape == (3, 4, 12)
    leaves = names_of(ip_adapter.join(run.params, [adapter]))
    for name in ip_adapter.attentions(run.params):
        for a in "kv":
            made = leaves[f"{name}/processor/to_{a}_ip/0/kernel"]
            np.testing.assert_array_equal(made, leaves[f"{name}/to_{a}/kernel"])


def test_sharding_rules_cover_what_is_added(case):
    net = case("sdxl").net
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    for name, axes in paths.match(net.rules, paths.named_leaves(shapes), "sharding").items():
        assert "processor" not in name or axes == (None, "fsdp", "tensor")


WRONG = {
    "missing": (
        lambda t: {k: v for k, v in t.items() if k != "ip_adapter.1.to_k_ip.weight"},
        "1 missing: ip_adapter.1.to_k_ip.weight",
    ),
    "unexpected": (
        lambda t: t | {"ip_adapter.2.to_k_ip.weight": np.zeros((8, 12))}, "1 unexpected: ip_adapter.2.to_k_ip.weight"
    ),
    "shape": (
        lambda t: t | {"ip_adapter.1.to_v_ip.weight": np.zeros((8, 11), np.float32)},
        r"1 of another shape: ip_adapter.1.to_v_ip.weight \[8, 11\] instead of \[8, 12\]",
    ),
    "loras": (lambda t: t | {"ip_adapter.0.to_k_lora.down.weight": np.zeros((8, 2))}, "FaceID is not supported"),
    "face": (lambda t: t | {"image_proj.proj.0.weight": np.zeros((8, 2))}, "FaceID is not supported"),
    "resampler": (lambda t: t | {"image_proj.latents": np.zeros((1, 3, 8))}, "no kind that is known: there is no"),
    "output": (
        lambda t: t | {"image_proj.latents": np.zeros((1, 3, 8)), "image_proj.proj_in.weight": np.zeros((8, 6))},
        "no kind that is known: there is no 'proj_out/kernel'",
    ),
    "empty": (lambda t: t | {"image_proj.norm.weight": np.zeros(0)}, r"'norm/scale' of shape \(0,\), of no numbers"),
    "nothing": (lambda t: {"x": np.zeros(2)}, "no kind that is known: there is no 'proj/kernel'"),
    "tokens": (lambda t: t | {"image_proj.norm.weight": np.zeros(7)}, "48 channels is not of tokens with 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_file(name, case, tmp_path):
    run, (change, message) = case("sd"), WRONG[name]
    with pytest.raises(WeightsError, match=message):
        load_ip_adapter(written(tmp_path / "a.safetensors", change(run.tensors[0])), run.model)


def test_what_is_wrong_with_a_call(case):
    run, other = case("sd"), case("sdxl")
    with pytest.raises(ValueError, match="adapter 1 is not for this network: its to_k_ip differ at"):
        ip_adapter.join(run.params, [run.adapters[0], other.adapters[0]])
    with pytest.raises(WeightsError, match="the adapter is for another network"):
        save_ip_adapter(other.adapters[0], run.model, "nowhere.safetensors")
    with pytest.raises(ValueError, match=r"embeds have shape \(2, 5\); expected \[B, 6\] or \[B, n, 6\]"):
        ip_adapter.project(run.adapters[0], jnp.ones((2, 5)))
    x, t, context = (run.given[name] for name in ("x", "t", "context"))
    shapes = jax.eval_shape(lambda: ip_adapter.join(run.params, run.adapters))
    ask = lambda net, params, *pictures: jax.eval_shape(
        lambda params: net.apply(params, x, t, context, pictures=[(a, 1.0) for a in pictures]), params
    )
    with pytest.raises(ValueError, match="1 pictures, in a network for 2 IP-Adapters"):
        ask(run.net, shapes, context)
    with pytest.raises(ValueError, match="1 pictures, in a network for 0 IP-Adapters"):
        ask(run.model, run.params, context)
    with pytest.raises(ValueError, match=r"pictures\[1\] has shape .*expected \[2, any, 12\]"):
        ask(run.net, shapes, context, context[..., 1:])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(only_cross_attention=True), "only_cross_attention=True is not supported"),
        (dict(mid_block_type="UNetMidBlock2DSimpleCrossAttn"), "UNetMidBlock2DSimpleCrossAttn are not supported"),
        (dict(encoder_hid_dim=5, encoder_hid_dim_type="image_proj"), "encoder_hid_dim_type='image_proj' is not"),
        (dict(attention_type="gated"), "attention_type='gated' is not supported"),
        (dict(_class_name="UNet2DModel"), "the config is that of a UNet2DModel; expected a UNet2DConditionModel"),
    ],
)
def test_networks_that_take_no_pictures(change, message, case):
    with pytest.raises(ValueError, match=message):
        ip_adapter.with_pictures(dict(case("sd").model.config) | change)
