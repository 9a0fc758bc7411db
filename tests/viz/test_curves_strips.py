"""Curves and strips: the data that went in is on the axes, logs of crashed runs are readable."""

import json

import numpy as np
import pytest

from diffjax import viz


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def test_metrics_of_a_resumed_and_cut_run(tmp_path):
    rows = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0, "lr": 0.1}, {"step": 2, "loss": 2.5}]
    metrics = viz.read_metrics(write(tmp_path / "metrics.jsonl", rows, '{"step": 3, "lo'))
    np.testing.assert_array_equal(metrics["loss"], [[1, 2], [4.0, 2.5]])
    np.testing.assert_array_equal(metrics["lr"], [[2], [0.1]])


def test_a_broken_line_in_the_middle_is_left_out(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1,\n{"step": 2, "loss": 1.0}\n')
    np.testing.assert_array_equal(viz.read_metrics(path)["loss"], [[2], [1.0]])
    assert [record.getMessage() for record in caplog.records if f"{path}: left out" in record.getMessage()]


def test_loss_figure_holds_one_line_per_band():
    steps = np.arange(10)
    metrics = {"loss": (steps, 1.0 + steps), "loss_logsnr[-2,0]": (steps, 2.0 + steps), "lr": (steps, steps)}
    metrics |= {"loss_logsnr[,-2]": (steps, 3.0 + steps), "loss_logsnr[0,]": (steps, 1.5 + steps)}
    axes = viz.loss_curves(metrics).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(drawn) == ["log-SNR below -2", "log-SNR -2 to 0", "log-SNR above 0", "all levels"]
    np.testing.assert_array_equal(drawn["log-SNR -2 to 0"], 2.0 + steps)
    # A line of one point would not show: it is a dot.
    once = metrics | {"loss_logsnr[0,]": (steps[:1], np.array([2.0]))}
    once |= {"loss_logsnr[,-2]": (steps[:2], np.array([np.nan, 1.0]))}
    marks = {line.get_label(): line.get_marker() for line in viz.loss_curves(once).axes[0].lines}
    assert marks == {"log-SNR below -2": "o", "log-SNR -2 to 0": "None", "log-SNR above 0": "o", "all levels": "None"}
    with pytest.raises(ValueError, match="no 'loss' among the metrics: lr"):
        viz.loss_curves({"lr": metrics["lr"]})


def test_quality_figure_shows_points_lines_and_the_floor(tmp_path):
    curves = {"DDIM": [(10, 0.3), (5, 0.5)], "Heun": [(9, 0.6), (49, 0.2)]}
    figure = viz.quality_curves(curves, floor=(0.1, 0.01), lines={"memoriser": 0.18})
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[5, 0.5], [10, 0.3]])
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    np.testing.assert_allclose([band.y0, band.y1], [0.09, 0.11], rtol=1e-6)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert viz.save(figure, tmp_path / "nfe.png").stat().st_size > 5000
    width, _ = figure.canvas.get_width_height()
    assert axes.get_legend().get_window_extent().x1 <= width


def test_strip_shows_first_and_last_level_and_the_states_at_unit_scale():
    rng = np.random.default_rng(0)
    sigma = np.append(np.geomspace(40, 0.1, 30), 0.0)
    x0 = np.clip(rng.standard_normal((31, 2, 4, 4, 1)), -1, 1)
    x = x0 + sigma[:, None, None, None, None] * rng.standard_normal(x0.shape)
    figure = viz.denoising_strip(x, x0, np.ones(31), sigma, columns=6)
    texts = [t.get_text() for t in figure.axes[0].texts if t.get_text().strip()]
    assert texts.count("x0 predicted") == 2 and "40" in texts and texts[-1] == "0" and len(texts) == 2 + 4 + 6
    seen = []
    latents = np.tile(x0, (1, 1, 1, 1, 4))
    viz.denoising_strip(latents, latents, np.ones(31), 0 * sigma, show=lambda t: seen.append(t.shape) or t[..., :1])
    assert seen == [(12 * 2 * 2, 4, 4, 4)]  # Both rows of two samples at twelve levels, before anything is drawn.
    with pytest.raises(ValueError, match=r"\[n, S, H, W, C\]"):
        viz.denoising_strip(x[0], x0[0], np.ones(31), sigma)
    for alpha, levels in ((np.ones(30), sigma), (np.ones(31), sigma[1:]), (np.ones(30), sigma[1:])):
        with pytest.raises(ValueError, match=r"\[n\] twice"):
            viz.denoising_strip(x, x0, alpha, levels)
