"""The sizes of images by their headers: what is read for them, and that they are those of the decoded images."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffjax.data.images import HEADER, decode, measure
from diffjax.data.readers import FolderReader, TarReader, folder, tar
from diffjax.data.readers.tar import OpenFiles

ORIENTATION = 0x0112


def encoded(kind, orientation=1, size=(7, 4)):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **({} if kind in ("GIF", "PPM") else {"exif": exif}))
    return stream.getvalue()


def behind(png):
    """The PNG with its EXIF data between the pixels and the end, where the standard allows it too."""
    at = png.index(b"eXIf") - 4
    length = int.from_bytes(png[at : at + 4], "big") + 12
    rest = png[:at] + png[at + length :]
    return rest[:-12] + png[at : at + length] + rest[-12:]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG, behind", "WEBP", "TIFF", "GIF", "PPM"])
def test_the_size_by_the_header_is_that_of_the_upright_image(kind, orientation):
    data = encoded(kind.split(",")[0], orientation)
    data = behind(data) if "," in kind else data
    size = decode(data, 3).size
    assert size == ((4, 7) if orientation > 4 and kind not in ("GIF", "PPM") else (7, 4))
    assert measure(data) == measure(io.BytesIO(data)) == size


def test_an_animated_png_has_the_size_of_its_image():
    frames = [Image.new("RGB", (6, 5), (i, 0, 0)) for i in range(3)]
    stream = io.BytesIO()
    frames[0].save(stream, "PNG", save_all=True, append_images=frames[1:])
    assert measure(stream.getvalue()) == (6, 5)


@pytest.fixture
def photos(tmp_path):
    """Noise of 300 x 200 pixels, which no format shortens, in a folder and in a shard; half of them lie on a side."""
    (tmp_path / "photos").mkdir()
    for i in range(4):
        for kind in ("JPEG", "PNG"):
            name = f"{i}-{'tall' if i % 2 else 'wide'}-{kind}.{kind.lower()}"
            (tmp_path / "photos" / name).write_bytes(encoded(kind, 6 if i % 2 else 1, (300, 200)))
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        for path in sorted((tmp_path / "photos").iterdir()):
            file.add(path, path.name)
    return tmp_path


@pytest.mark.parametrize("make, name", [(folder, "photos"), (tar, "photos.tar")])
def test_buckets_are_chosen_by_the_headers_alone(photos, monkeypatch, make, name):
    read = []

    class Counted(io.FileIO):
        def readinto(self, buffer):
            read.append(super().readinto(buffer))
            return read[-1]

    def whole(self, index):
        raise AssertionError("all of an image was read")

    def part(self, path, size, offset, plain=OpenFiles.read):
        read.append(size)
        return plain(self, path, size, offset)

    with monkeypatch.context() as patched:
        patched.setattr(FolderReader, "__getitem__", whole)
        patched.setattr(TarReader, "__getitem__", whole)
        patched.setattr(FolderReader, "open", lambda self, i: io.BufferedReader(Counted(self.name(i)), HEADER))
        patched.setattr(OpenFiles, "read", part)
        train = make(str(photos / name), buckets=((16, 24), (24, 16)), heldout=1).train
    assert {(train.view.shapes[b], "tall" in train.name(i)) for i, b in enumerate(train.buckets)} == {
        ((16, 24), False), ((24, 16), True),
    }  # fmt: skip
    assert train[0]["image"].shape == (*train.view.shapes[0], 3)
    assert 0 < sum(read) < sum(path.stat().st_size for path in (photos / "photos").iterdir()) / 10
