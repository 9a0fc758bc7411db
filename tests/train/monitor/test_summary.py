"""The summary of a run whose rows are known."""

import json

from diffjax.train.monitor.summary import summarize

FACTS = dict(step=30, last_step=40, batch_size=16, parameters=1234567, devices="1 cpu", checkpoints=[20, 30])
FACTS |= dict(compile_seconds=61.2, bad_items=0)


def row(step, loss, **rest):
    return json.dumps({"step": step, "loss": loss, "images_per_s": 100.0 * step, "step_ms": 5.0, **rest}) + "\n"


def test_a_summary_tells_losses_rates_and_where_the_time_went(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        row(10, 2.0, memory_gib=1.0) + '{"step": 10, "note": "x"}\n' + row(20, 0.5, memory_gib=3.0) + row(30, 0.75)
    )
    text = summarize(str(tmp_path), FACTS, {"total": 3723.0, "input": 372.3, "checkpoints": 37.23})
    assert "step 30 of 40: 1,234,567 parameters, batch 16, 1:02:03 (input 10.0 %, checkpoints 1.0 %)" in text
    assert "checkpoints 1.0 %) after 1:01 of compiling" in text
    assert "loss 2 -> 0.75, least 0.5 in the window that ends at step 20" in text
    assert "2000 images/s, 5 ms a step, 3 GiB at most" in text and "checkpoints: 20, 30" in text
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["loss"] == {"first": 2.0, "last": 0.75, "least": 0.5, "least_at": 20}
    assert "could not be read" not in text
    worse = summarize(str(tmp_path), FACTS | {"bad_items": 3}, {"total": 1.0})
    assert "could not be read and were replaced by others: 3; see config.input.max_bad" in worse
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_row_or_a_finite_loss_has_a_summary_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "checkpoints: none" in summarize(str(tmp_path), FACTS | {"checkpoints": []}, {"total": 1.0})
    assert not (tmp_path / "curves.png").exists()
    (tmp_path / "metrics.jsonl").write_text(row(10, None))
    assert "0:01" in summarize(str(tmp_path), FACTS, {"total": 1.0})
    (tmp_path / "metrics.jsonl").write_text(row(10, None) + row(20, None))
    assert "0:01" in summarize(str(tmp_path), FACTS, {"total": 1.0}) and not (tmp_path / "curves.png").exists()
