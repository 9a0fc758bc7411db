"""Data sets written by TFDS itself, without TensorFlow."""

import sys
import textwrap

import numpy as np
import pytest

from diffjax import registry
from diffjax.data import SOURCES, batches
from diffjax.data.readers import tfds

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("importlib_resources")

MODULE = "user_of_test_tfds"
BUILDER = """
import numpy as np
import tensorflow_datasets as tfds

class Stripes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({
            "image": tfds.features.Tensor(shape=(4, 6, 3), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=3),
            "caption": tfds.features.Text(),
        })
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 10), "test": self._generate_examples(10, 14)}

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            yield i, {"image": np.full((4, 6, 3), 10 * i, np.uint8), "label": i % 3, "caption": f"stripe {i}"}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    (path / f"{MODULE}.py").write_text(textwrap.dedent(BUILDER))
    sys.path.insert(0, str(path))
    module = __import__(MODULE)
    module.Stripes(data_dir=str(path / "data"), file_format="array_record").download_and_prepare()
    yield path
    sys.path.remove(str(path))


def specs(path):
    data = str(path / "data")
    return {
        "name": f"tfds('stripes', data_dir={data!r})",
        "version": f"tfds('stripes:1.0.0', data_dir={data!r})",
        "builder": f"tfds('stripes', data_dir={data!r}, builder='{MODULE}:Stripes')",
        "folder": f"tfds({data + '/stripes/1.0.0'!r})",
    }


@pytest.mark.parametrize("kind", ["name", "version", "builder", "folder"])
def test_a_prepared_data_set_by_name_version_builder_and_folder(folder, kind):
    data = registry.build(specs(folder)[kind], SOURCES, "data")
    assert (len(data.train), len(data.heldout), data.shape, data.num_classes) == (10, 4, (4, 6, 3), 3)
    values = []
    for source in (data.train, data.heldout):
        for i in range(len(source)):
            value = int(data.to_pixels(source[i]["image"])[0, 0, 0])
            assert (data.to_pixels(source[i]["image"]) == value).all()
            assert source[i]["label"] == value // 10 % 3 and source.captions[i] == f"stripe {value // 10}"
            values.append(value)
    assert sorted(values[:10]) == list(range(0, 100, 10)) and sorted(values[10:]) == [100, 110, 120, 130]
    assert "tensorflow" not in sys.modules


def test_workers_read_it_and_a_split_can_be_cut(folder):
    data = tfds("stripes", data_dir=str(folder / "data"), split="train[:8]", heldout=2, size=(2, 3))
    assert (len(data.train), len(data.heldout), data.shape) == (6, 2, (2, 3, 3))
    plain, worked = batches(data.train, 4, seed=0), batches(data.train, 4, seed=0, workers=1)
    for _ in range(3):
        want, got = next(plain), next(worked)
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])
    worked.close()


def test_splits_that_share_items_are_refused(folder):
    make = lambda split, heldout: tfds("stripes", data_dir=str(folder / "data"), split=split, heldout=heldout)
    for split, heldout in (("train", "train[90%:]"), ("train[:6]", "train[5:]"), ("test", "test")):
        with pytest.raises(ValueError, match="share items"):
            make(split, heldout)
    data = make("train[:6]", "train[6:]")
    assert (len(data.train), len(data.heldout)) == (6, 4)


def test_what_is_not_prepared_is_one_line_without_any_download(folder, tmp_path, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for settings in (dict(name="mnist"), dict(name="stripes", builder=f"{MODULE}:Stripes")):
        with pytest.raises(FileNotFoundError) as caught:
            tfds(**settings, data_dir=str(tmp_path))
        text = str(caught.value)
        assert "\n" not in text and "is not prepared" in text and f"--data_dir={tmp_path}" in text
    with pytest.raises(FileNotFoundError, match="stripes:2.0.0"):
        tfds("stripes:2.0.0", data_dir=str(folder / "data"))
    with pytest.raises(ValueError, match="no split 'validation'; it has: train, test"):
        tfds("stripes", data_dir=str(folder / "data"), heldout="validation")
    with pytest.raises(ValueError, match="no feature 'picture'; it has: "):
        tfds("stripes", data_dir=str(folder / "data"), image="picture")


@pytest.mark.parametrize("missing", ["tensorflow_datasets", "importlib_resources"])
def test_a_missing_package_is_named_with_its_extra(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=r"not installed.*pip install 'diffjax\[tfds\]'"):
        tfds("mnist")
