"""Writers: strict JSON on disk, a readable terminal, and event files that TensorBoard's own format parses."""

import io
import json
import sys

import numpy as np
import pytest

from diffjax import files
from diffjax.train.monitor import writers


class Tty(io.StringIO):
    def isatty(self):
        return True


def rows(path):
    refuse = lambda constant: pytest.fail(f"{constant} is not strict JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_jsonl_has_one_strict_object_per_call(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = writers.Jsonl(str(path))
    writer.write_scalars(np.int32(1), {"loss": np.float32(0.5), "bad": np.nan})
    writer.write_texts(2, {"note": 'a "quoted" line\nand another'})
    writer.write_images(2, {"grid": np.zeros((2, 2, 1))})
    writer.flush()
    assert rows(path) == [{"step": 1, "loss": 0.5, "bad": None}, {"step": 2, "note": 'a "quoted" line\nand another'}]
    writer.close()


def test_a_resumed_file_reads_like_an_uninterrupted_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 2.0}\n{"step": 30, "loss": 3.0}\n{"step": 40, "lo')
    writer = writers.Jsonl(str(path), upto=20)
    writer.write_scalars(30, {"loss": 4.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in rows(path)] == [(10, 1.0), (20, 2.0), (30, 4.0)]
    assert files.read_rows(path) == rows(path)


def test_terminal_draws_a_bar_with_rate_and_values_on_a_terminal():
    stream = Tty()
    terminal = writers.Terminal(stream, total=50, initial=10)
    terminal.advance(11)
    terminal.write_scalars(11, {"loss": 0.25, "lr": 1e-3})
    terminal.write_texts(11, {"note": "hello"})
    terminal.close()
    text = stream.getvalue()
    assert "11/50" in text and "loss=0.25" in text and "step/s" in text and "hello" in text


def test_elsewhere_lines_are_sparse_but_the_first_and_the_last_are_there():
    stream = io.StringIO()
    terminal = writers.Terminal(stream, total=100, every_s=1e9)
    for step in range(10, 101, 10):
        terminal.advance(step)
        terminal.write_scalars(step, {"loss": float(step), "steps_per_s": 0.5})
    terminal.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["10/100", "100/100"]
    assert lines[0].endswith("eta 3:00")  # 90 steps at half a step per second


def test_hours_to_go_are_told_as_such():
    stream = io.StringIO()
    writers.Terminal(stream, total=3601).write_scalars(1, {"loss": 1.0, "steps_per_s": 0.1})
    assert stream.getvalue().rstrip().endswith("eta 10:00:00")


def test_several_writes_to_each(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    writer = writers.Several([writers.Jsonl(str(first)), writers.Jsonl(str(second))])
    writer.write_hparams({"lr": 0.1})
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    assert rows(first) == rows(second) == [{"step": 0, "hparams": {"lr": 0.1}}, {"step": 1, "loss": 1.0}]


def events(folder):
    """The events of TensorBoard's files in a folder, in the order in which they were written."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    # The TFRecord framing: length, its checksum, the record, its checksum.
    for path in sorted(folder.glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_events_hold_the_scalars_and_images(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = writers.TensorBoard(str(tmp_path))
    writer.write_scalars(7, {"loss": 0.5})
    writer.write_images(7, {"one": np.zeros((8, 8, 1), np.uint8), "many": np.zeros((2, 8, 8, 3), np.uint8)})
    writer.write_texts(7, {"note": "hi"})
    writer.write_hparams({"lr": 0.1})
    writer.close()
    values = {value.tag: (event.step, value) for event in events(tmp_path) for value in event.summary.value}
    assert values["loss"][0] == 7 and values["loss"][1].simple_value == 0.5
    assert values["one"][1].image.height == 8 and values["one"][1].image.width == 8
    assert {"many", "note/text_summary", "hparams/text_summary"} <= set(values)


@pytest.mark.parametrize("upto, forgotten", [(None, []), (0, [1]), (20, [21])])
def test_a_resumed_run_tells_tensorboard_what_to_forget(tmp_path, upto, forgotten):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import SessionLog

    writer = writers.TensorBoard(str(tmp_path), upto=upto)
    writer.close()
    # TensorBoard drops events of these steps and later ones that were written before a START.
    starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == forgotten


def test_without_tensorboardx_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'diffjax\[tensorboard\]'"):
        writers.TensorBoard(str(tmp_path))
