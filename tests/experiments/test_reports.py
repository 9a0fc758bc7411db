"""The statistics of the studies against scipy and against data with known effects."""

import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[2]


def load(name, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location(f"{name}_report", ROOT / "experiments" / name / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_power_law_and_its_interval_are_those_of_linear_regression(monkeypatch):
    report = load("dit_scaling", monkeypatch)
    x = np.array([1.0, 2, 5, 10, 20, 50]) * 1e10
    y = 300 * x**-0.21 * np.exp(0.05 * np.random.default_rng(0).standard_normal(6))
    law, known = report.fit(x, y), stats.linregress(np.log(x), np.log(y))
    reach = stats.t.ppf(0.975, 4) * known.stderr
    wanted = [-known.slope, -known.slope - reach, -known.slope + reach]
    np.testing.assert_allclose([law.exponent, law.low, law.high], wanted, rtol=1e-9)
    np.testing.assert_allclose(law(x), np.exp(known.intercept) * x**known.slope, rtol=1e-9)


def test_a_floor_is_seen_as_a_bend_and_scatter_is_not(monkeypatch):
    report = load("dit_scaling", monkeypatch)
    x = np.array([1.0, 2, 5, 10, 20, 50]) * 1e10
    scatter = np.exp(0.02 * np.random.default_rng(0).standard_normal(6))
    assert "not told from scatter" in report.bend(x, 300 * x**-0.2 * scatter)
    floored = 300 * x**-0.2
    assert "flattens" in report.bend(x, floored + floored.min())
    assert "steepens" in report.bend(x, floored - 0.9 * floored.min())
    assert report.bend(x[:3], floored[:3]) == ""


def rows_of(noise=0.0):
    rng, rows = np.random.default_rng(1), []
    for head, schedule, weight in itertools.product(("eps()", "x0()", "v()"), ("cosine()", "flow()"), ("a", "b")):
        size = {"eps()": 2.0, "x0()": 3.0, "v()": 1.0}[head] * {"cosine()": 1.0, "flow()": 0.5}[schedule]
        value = size * np.exp(noise * rng.standard_normal())
        rows.append(
            {
                "head": head, "schedule": schedule, "weight": weight, "fd_relu": value, "heldout_loss": 2 * value,
                "fd_tanh": value, "accuracy": 0.9, "seconds": 60.0,
            }
        )  # fmt: skip
    return rows


def test_known_effects_are_found_and_nothing_else(monkeypatch):
    report = load("parameterisation", monkeypatch)
    found = {row[:3]: row[3] for row in report.comparisons(rows_of(), "fd_relu")}
    assert found["head", "eps()", "x0()"] == pytest.approx(2 / 3) and found["head", "x0()", "v()"] == pytest.approx(3)
    assert found["schedule", "cosine()", "flow()"] == pytest.approx(2)
    assert found["weight", "a", "b"] == pytest.approx(1)


def test_the_interval_of_two_levels_is_that_of_a_regression_on_dummies(monkeypatch):
    report = load("parameterisation", monkeypatch)
    rows = rows_of(0.3)
    # Treatment coding, the other way to write the same model: weight b is the last column.
    dummies = [
        [1, r["head"] == "x0()", r["head"] == "v()", r["schedule"] == "flow()", r["weight"] == "b"] for r in rows
    ]
    design, values = np.array(dummies, float), np.log([r["fd_relu"] for r in rows])
    beta, rest, *_ = np.linalg.lstsq(design, values, rcond=None)
    error = np.sqrt(rest[0] / 7 * np.linalg.inv(design.T @ design)[4, 4])
    wanted = np.exp([-beta[4], -beta[4] - stats.t.ppf(0.975, 7) * error, -beta[4] + stats.t.ppf(0.975, 7) * error])
    ours = next(row for row in report.comparisons(rows, "fd_relu") if row[0] == "weight")
    np.testing.assert_allclose(ours[3:], wanted, rtol=1e-9)


def test_the_text_of_the_reports_stands_between_the_markers(monkeypatch, tmp_path):
    report = load("parameterisation", monkeypatch)
    text = report.text_of(rows_of(0.1))
    assert "12 runs" in text and text.count("| `v()` |") == 4 and "not told apart" in text
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{report.reporting.BEGIN}\nEARLIER\n{report.reporting.END}\nb\n")
    report.reporting.fill(readme, text)
    page = readme.read_text()
    assert page.startswith("a\n") and page.endswith("\nb\n") and text.strip() in page and "EARLIER" not in page
    scaling = load("dit_scaling", monkeypatch)
    flops, losses = {16: (1e11, 20, 800), 32: (4e11, 80, 800), 64: (1.6e12, 300, 800)}, [[2.0, 2.1], [1.569], [1.2013]]
    law = scaling.fit([1e11, 4e11, 1.6e12], [2.0494, 1.569, 1.2013])
    text = scaling.text_of([16, 32, 64], flops, losses, losses, [law, law])
    assert "2.05 (2 to 2.1)" in text and "Doubling the compute" in text
    scaling.viz.save(scaling.picture([1e11, 4e11, 1.6e12], losses, losses, [law, law]), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000
