import io
import pickle

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from diffjax.data import Unreadable, batches
from diffjax.data.readers import array_record
from diffjax.data.readers.records import example


def write(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def encoded(pixels, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
MODULE = "user_of_test_records"


def test_records_that_are_image_files(tmp_path):
    write(tmp_path / "a.array_record-0", [encoded(p) for p in PIXELS[:4]])
    write(tmp_path / "a.array_record-1", [encoded(p) for p in PIXELS[4:]])
    data = array_record(str(tmp_path / "a.array_record-*"), heldout=2)
    assert (len(data.train), data.num_classes, data.shape) == (4, 0, (5, 4, 3))
    for source in (data.train, pickle.loads(pickle.dumps(data.train)), data.heldout):
        for i in range(len(source)):
            number = int(source.positions[i])
            np.testing.assert_array_equal(data.to_pixels(source[i]["image"]), PIXELS[number])
            assert f"record {number} of " in source.name(i)


def test_a_decoder_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / f"{MODULE}.py").write_text(
        "import numpy as np\n"
        "def decode(data):\n"
        "    return {'image': np.frombuffer(data[1:], np.uint8).reshape(5, 4, 3), 'label': data[0]}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path / "raw.array_record", [bytes([i % 2]) + p.tobytes() for i, p in enumerate(PIXELS)])
    data = array_record(str(tmp_path / "raw.array_record"), decode=f"{MODULE}:decode", num_classes=2, heldout=1)
    for i in range(5):
        number = int(data.train.positions[i])
        np.testing.assert_array_equal(data.to_pixels(data.train[i]["image"]), PIXELS[number])
        assert data.train[i]["label"] == number % 2
    few = array_record(str(tmp_path / "raw.array_record"), decode=f"{MODULE}:decode", num_classes=1, heldout=1)
    odd = int(np.flatnonzero(few.train.positions % 2)[0])
    with pytest.raises(Unreadable, match="record .*: label 1; expected 0 .. 0"):
        few.train[odd]
    none = array_record(str(tmp_path / "raw.array_record"), decode=f"{MODULE}:decode", heldout=1)
    assert none.num_classes == 0 and none.train[odd]["label"] == 0
    with pytest.raises(ValueError, match="unknown decode 'exmple'.*did you mean 'example'"):
        array_record(str(tmp_path / "raw.array_record"), decode="exmple")


def test_examples_are_read_as_protobufs_own_parser_reads_them():
    # The published .proto files, built here at run time: google.protobuf writes, we read.
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields):
        m = file.message_type.add(name=name)
        for number, (label, kind, of) in enumerate(fields, 1):
            f = m.field.add(name=f"f{number}", number=number, label=label, type=kind)
            if of:
                f.type_name = of
        return m

    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    message("Bytes", (many, field.TYPE_BYTES, None))
    message("Floats", (many, field.TYPE_FLOAT, None))
    message("Ints", (many, field.TYPE_INT64, None))
    lists = [(one, field.TYPE_MESSAGE, f".t.{n}") for n in ("Bytes", "Floats", "Ints")]
    message("Feature", *lists)
    message("Entry", (one, field.TYPE_STRING, None), (one, field.TYPE_MESSAGE, ".t.Feature"))
    message("Features", (many, field.TYPE_MESSAGE, ".t.Entry"))
    message("Example", (one, field.TYPE_MESSAGE, ".t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))()
    values = {"image": [b"\x00bytes\xff" * 40, b""], "label": [7, -3, 2**62], "x": [1.5, -0.25], "empty": []}
    for name, content in values.items():
        entry = made.f1.f1.add(f1=name)
        kind = "f1" if name in ("image", "empty") else "f3" if name == "label" else "f2"
        getattr(entry.f2, kind).SetInParent()
        getattr(entry.f2, kind).f1.extend(content)
    assert example(made.SerializeToString()) == values
    with pytest.raises(ValueError, match="no whole tf.train.Example"):
        example(made.SerializeToString()[:-3])


def test_files_of_another_kind_and_broken_records(tmp_path):
    (tmp_path / "text").write_text("no records here" * 100)
    with pytest.raises(ValueError, match="cannot be read as ArrayRecord"):
        array_record(str(tmp_path / "text"))
    write(tmp_path / "bad.array_record", [encoded(PIXELS[0]), b"no image", *[encoded(p) for p in PIXELS[1:]]])
    data = array_record(str(tmp_path / "bad.array_record"), heldout=1, split_seed=3)
    assert 1 in data.train.positions
    iterator = batches(data.train, 6, seed=0)
    next(iterator)
    assert list(iterator.bad.values()) == [f"record 1 of {tmp_path / 'bad.array_record'}: not an image file"]
