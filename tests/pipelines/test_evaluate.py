"""`sample` and `eval` end to end on the digits, with the exact denoiser of one Gaussian per class: a known quality."""

import json
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from ml_collections import ConfigDict

from diffjax.core import EDM, VP, X0
from diffjax.core.types import Model
from diffjax.data import arrays, digits
from diffjax.pipelines import evaluate as evaluation
from diffjax.pipelines import judge
from diffjax.pipelines.generate import check_classes, classes_of, generate
from diffjax.pipelines.sampler import Cost


class Run(NamedTuple):
    config: ConfigDict
    dataset: object
    model: Model
    params: dict
    schedule: object
    head: object
    step: int
    ema: str = "raw"


def gaussians(images, labels, num_classes):
    """Means, variances and bases of one Gaussian per class, and of all images as the null class."""
    groups = [images[labels == c] for c in range(num_classes)] + [images]
    flat = [g.reshape(len(g), -1).astype(np.float64) for g in groups]
    pairs = [np.linalg.eigh(np.cov(g, rowvar=False)) for g in flat]
    params = {
        "mean": np.stack([g.mean(0) for g in flat]),
        "var": np.stack([np.maximum(values, 0) for values, _ in pairs]),
        "basis": np.stack([vectors for _, vectors in pairs]),
    }
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}


def posterior_mean(params, x, t, y=None):
    """The exact x0 of those Gaussians; in EDM's coordinates alpha is 1 and t is log(sigma) / 4."""
    y = jnp.full(len(x), len(params["mean"]) - 1) if y is None else y
    mean, var, basis = (params[name][y] for name in ("mean", "var", "basis"))
    z = jnp.einsum("bde,bd->be", basis, x.reshape(len(x), -1) - mean)
    shrunk = var / (var + jnp.exp(8 * t)[:, None]) * z
    return (mean + jnp.einsum("bde,be->bd", basis, shrunk)).reshape(x.shape)


def open_run(monkeypatch, dataset, data):
    sample = dict(solver="dpmpp_2m()", steps=12, spacing="karras(s_max=40.0)", guidance=1.0, interval=(0.0, math.inf))
    config = ConfigDict(dict(data=data, ema=("power(std=0.1)",), sample=sample, label_dropout=0.1,
                             eval=dict(num_samples=0, seeds=1, batch_size=450)))
    params = gaussians(dataset.train.images, dataset.train.labels, dataset.num_classes)
    model = Model(lambda key: params, posterior_mean, {})
    run = Run(config, dataset, model, params, EDM(), X0, 7)
    monkeypatch.setattr("diffjax.train.state.load_run", lambda workdir, ema=None, step=None, data=None, items=True: run)
    return run


def log(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')


def test_an_exact_model_of_known_quality_gets_the_numbers_of_that_quality(monkeypatch, tmp_path, capsys):
    run = open_run(monkeypatch, digits(1), "digits(split_seed=1)")
    log(tmp_path)
    monkeypatch.setattr(evaluation, "SWEEP", {"heun()": (8, 35), "dpmpp_2m()": (10, 12)})
    monkeypatch.setattr(evaluation, "SCALES", (0.0, 1.0, 3.0))
    monkeypatch.setattr(judge, "BASELINES", ("memoriser", "class_gaussian"))
    evaluation.evaluate(tmp_path)

    folder = tmp_path / "eval"
    report = json.loads((folder / "report.json").read_text())
    rows = report["rows"]
    ours, known = rows["ours: dpmpp_2m(), 12 NFE"], rows["a Gaussian per class"]
    # The same distribution up to the clipping of x0 and one draw's noise of some 0.03 (spread over seeds).
    assert abs(ours["fd_relu"] - known["fd_relu"]) < 0.12 and abs(ours["c2st"] - known["c2st"]) < 0.05
    assert ours["fd_relu"] > 2 * report["floor"]["mean"] and ours["accuracy"] > 0.95
    assert "split floor: real training images" in rows
    assert report["cost"] == Cost(12, 12, 12)._asdict() and report["data"] == "digits(split_seed=1)"
    assert {"config_sha256", "versions", "settings", "seconds", "device", "sampling_seconds"} <= set(report)

    assert [(row["solver"], row["nfe"]) for row in report["nfe"]] == [
        ("heun()", 7), ("heun()", 35), ("dpmpp_2m()", 10), ("dpmpp_2m()", 12)
    ]
    # The main samples are those of the sweep at the same settings.
    assert report["nfe"][-1]["fd_relu"] == pytest.approx(ours["fd_relu"], rel=1e-6)
    assert report["few_step_ratio"] == pytest.approx(report["nfe"][2]["fd_relu"] / report["nfe"][1]["fd_relu"])
    nobody, plain, strong = report["guidance"]
    assert (nobody["nfe"], plain["nfe"], strong["nfe"]) == (10, 10, 20)
    assert nobody["accuracy"] < 0.2 < 0.95 < plain["accuracy"] <= strong["accuracy"] + 0.01

    drawn = np.load(folder / "samples.npz")
    assert drawn["images"].shape == (898, 8, 8, 1) and drawn["images"].dtype == np.uint8 and drawn["images"].max() <= 16
    assert drawn["split_seed"] == 1
    np.testing.assert_array_equal(np.bincount(drawn["labels"]), np.bincount(run.dataset.heldout.labels))
    for name in ("grid", "neighbours", "strip", "guidance", "nfe", "loss"):
        picture = imread(folder / f"{name}.png")
        assert min(picture.shape[:2]) > 150 and picture[..., :3].std() > 0.05, name
    shown = capsys.readouterr().out
    assert "good is" in shown and "12 network evaluations per sample" in shown and "ours: dpmpp_2m()" in shown


def test_other_data_is_judged_on_pixels_with_a_note(monkeypatch, tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = np.arange(240) % 2
    images = np.clip(100 + 60 * labels[:, None, None, None] + 20 * rng.standard_normal((240, 20, 20, 1)), 0, 255)
    dataset = arrays(images.astype(np.uint8), labels, heldout=120)
    open_run(monkeypatch, dataset, "npz(path='bands.npz')")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    report = evaluation.evaluate(tmp_path, quick=True, seeds=2, num_samples=60)
    mean, spread = (report["rows"][name] for name in ("ours: dpmpp_2m(), 12 NFE", "  std of 2 seeds"))
    each = [row["fd_pixels"] for row in report["each_seed"]]
    assert mean["fd_pixels"] == pytest.approx(np.mean(each))
    assert spread["fd_pixels"] == pytest.approx(np.std(each, ddof=1))
    # 100 averaged pixels, so every distance is far below that of unrelated images, and there is no classifier.
    assert "accuracy" not in mean and "fd_relu" not in mean and mean["fd_pixels"] < 1
    notes = " ".join(report["notes"])
    assert "no feature extractor" in notes and "100 values" in notes and "60 samples against 120" in notes
    assert not (tmp_path / "eval" / "nfe.png").exists() and (tmp_path / "eval" / "grid.png").exists()
    # One loss is no curve.
    assert not (tmp_path / "eval" / "loss.png").exists()
    assert "note: no feature extractor" in capsys.readouterr().out


def test_sample_writes_what_it_drew_and_a_seed_does_not_depend_on_its_batch(monkeypatch, tmp_path, capsys):
    open_run(monkeypatch, digits(0), "digits()")
    every = generate(tmp_path, classes=(3, 8), seeds=(0, 1, 2), guidance=1.5, interval=(0.1, 3.0))
    assert every.images.shape == (6, 8, 8, 1)
    np.testing.assert_array_equal(every.labels, [3, 8] * 3)
    np.testing.assert_array_equal(every.seeds, [0, 0, 1, 1, 2, 2])
    alone = generate(tmp_path, classes=(8,), seeds=(1,), guidance=1.5, interval=(0.1, 3.0), out=tmp_path / "one.png")
    np.testing.assert_allclose(alone.x[0], every.x[3], atol=1e-5)
    assert alone.files == (tmp_path / "one.npz", tmp_path / "one.png") and all(f.stat().st_size for f in alone.files)
    stored = np.load(every.files[0])
    np.testing.assert_array_equal(stored["x"], every.x)
    facts = json.loads(str(stored["settings"]))
    assert facts["settings"]["guidance"] == 1.5 and facts["cost"]["evaluations"] == every.cost.evaluations > 12
    assert f"{every.cost.evaluations} network evaluations" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_without_null_class_is_judged_but_not_guided(monkeypatch, tmp_path):
    labels = np.arange(48) % 2
    noise = np.random.default_rng(0).standard_normal((48, 4, 4, 1))
    images = np.clip(100 + 60 * labels[:, None, None, None] + 20 * noise, 0, 255).astype(np.uint8)
    run = open_run(monkeypatch, arrays(images, labels, heldout=24), "npz(path='bands.npz')")
    run.config.label_dropout = 0.0
    with pytest.raises(ValueError, match=r"guidance=1.5: .*label_dropout=0.*null class.*guidance=1"):
        evaluation.evaluate(tmp_path, guidance=1.5)
    with pytest.raises(ValueError, match="guidance=0: .*label_dropout=0"):
        generate(tmp_path, guidance=0.0)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(evaluation, "SWEEP", {"ddim()": (2,)})
    report = evaluation.evaluate(tmp_path, steps=3, batch_size=7)
    assert "guidance" not in report and len(report["nfe"]) == 1 and "label_dropout" in " ".join(report["notes"])


def test_the_summary_tells_the_two_floors_apart(tmp_path):
    rows = {"ours": {"fd_relu": 0.3, "closer": 1.0}, evaluation.NAMES["floor"]: {"fd_relu": 0.12}}
    report = {"num_samples": 898, "data": "digits()", "floor": {"metric": "fd_relu", "mean": 0.1, "std": 0.01},
              "rows": rows, "cost": {"steps": 1, "evaluations": 1}, "sampling_seconds": [1.0], "notes": [],
              "seconds": {"all": 1.0}, "closer_if_new": 90 / 97}
    shown = evaluation.summary(report, tmp_path)
    assert "FD-relu is 3.00 times the halves floor 0.100 +- 0.010" in shown and shown.count("split floor") == 2
    # In the table and in its legend, where the halves are not of one size.
    [good] = [line.split() for line in shown.splitlines() if line.startswith("good is")]
    assert good[-1] == "0.93" and "held-out images: 0.93 = new, 1 = copies" in shown


def test_sample_refuses_classes_that_the_data_does_not_have(monkeypatch, tmp_path):
    open_run(monkeypatch, digits(0), "digits()")
    with pytest.raises(ValueError, match=r"classes=\[3, 10\]: expected 0 to 9"):
        generate(tmp_path, classes=(3, 10))
    with pytest.raises(ValueError, match="seeds: none were given"):
        generate(tmp_path, seeds=())


def test_sample_refuses_classes_that_the_network_is_not_told(monkeypatch, tmp_path):
    run = open_run(monkeypatch, digits(0), "digits()")
    run.model.config.update(name="checkpoint", network={"_class_name": "UNet2DModel", "num_class_embeds": None})
    with pytest.raises(ValueError, match=r"classes=\[3\]: expected 0 only: the model has no classes"):
        generate(tmp_path, classes=(3,))
    assert check_classes(None, classes_of(run)) == [0]


@pytest.mark.parametrize(("solver", "nfe", "steps"), [("heun()", 35, 18), ("heun()", 10, 5), ("ddim()", 10, 10)])
def test_steps_for_a_budget_of_calls(solver, nfe, steps):
    assert evaluation.steps_for(solver, nfe, VP()) == steps


def test_labels_come_in_the_shares_of_the_heldout_data():
    labels = np.repeat([0, 1, 2], [100, 60, 40])
    dataset = arrays(np.zeros((200, 2, 2, 1), np.uint8), labels, heldout=0.5)
    np.testing.assert_array_equal(np.bincount(evaluation.stratified(dataset, 20)), [10, 6, 4])
    assert len(evaluation.stratified(dataset, 33)) == 33


def test_the_floor_is_that_of_the_protocols_split(monkeypatch):
    """Ten random halvings must bracket the one split that the floor's row shows."""
    from diffjax import metrics

    protocol = metrics.digits_protocol(1)
    mean, std = judge.halves(protocol)
    features = protocol.features["relu"]
    split = metrics.frechet_distance(features(protocol.train), features(protocol.heldout))
    assert abs(split - mean) < 4 * std


@pytest.mark.parametrize("heldout, num", [(3, 6), (10, 10), (898, 898), (50_000, 5000)])
def test_as_many_samples_as_held_out_images_within_reason(heldout, num):
    assert evaluation.as_many_as(heldout) == num
