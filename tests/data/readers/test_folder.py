import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from diffjax import registry
from diffjax.data import SOURCES, batches
from diffjax.data.readers import folder


def picture(rng, width, height):
    """Noise that is smooth enough for resizing to mean something."""
    small = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height))


@pytest.fixture
def pets(tmp_path):
    """Two classes of six images, of several sizes, modes and formats."""
    rng = np.random.default_rng(0)
    sizes = [(20, 20), (31, 17), (16, 40), (25, 24), (33, 33), (18, 22)]
    for kind in ("cats", "dogs"):
        (tmp_path / kind).mkdir()
        for i, size in enumerate(sizes):
            image = picture(rng, *size)
            suffix = ("png", "jpg", "webp")[i % 3]
            image = image.convert("L") if i == 3 else image
            image.save(tmp_path / kind / f"{i}.{suffix}")
    return tmp_path


def of(source, name):
    """The item whose file ends in `name`."""
    return source[[source.name(i).endswith(name) for i in range(len(source))].index(True)]


def both(data):
    for source in (data.train, data.heldout):
        for i in range(len(source)):
            yield source.name(i), source[i]


def test_pixels_are_pillows_own_fit_and_labels_follow_the_names_of_the_folders(pets):
    data = registry.build(f"folder(path={str(pets)!r}, size=(12, 16), heldout=4)", SOURCES, "data")
    assert (len(data.train), len(data.heldout), data.shape, data.num_classes) == (8, 4, (12, 16, 3), 2)
    assert data.shapes == ((12, 16, 3),)
    seen = set()
    for name, item in both(data):
        opened = Image.open(name).convert("RGB")
        want = np.asarray(ImageOps.fit(opened, (16, 12), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(data.to_pixels(item["image"]), want)
        assert item["label"] == int("dogs" in name) and item["image"].dtype == np.float32
        seen.add(name)
    assert len(seen) == 12
    assert sorted(int(data.heldout[i]["label"]) for i in range(4)) == [0, 0, 1, 1]


def test_crop_none_is_pillows_resize_and_grey_is_its_luminance(pets):
    data = folder(str(pets), 9, crop="none", channels=1)
    for name, item in both(data):
        want = Image.open(name).convert("L").resize((9, 9), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(data.to_pixels(item["image"])[..., 0], np.asarray(want))


def test_a_window_of_the_images_own_width_is_not_made_wider_by_rounding(tmp_path):
    rng = np.random.default_rng(4)
    for i, size in enumerate([(225, 240), (240, 225)]):  # 224 * (225 / 224) is 225.00000000000003.
        picture(rng, *size).save(tmp_path / f"{i}.png")
    for name, item in both(data := folder(str(tmp_path), 224, heldout=1)):
        want = ImageOps.fit(Image.open(name), (224, 224), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(data.to_pixels(item["image"]), np.asarray(want))


def test_images_of_the_wanted_size_come_back_bit_for_bit(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, 6, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    data = folder(str(tmp_path), heldout=1)
    assert data.shape == (7, 6, 3) and data.num_classes == 0
    for name, item in both(data):
        np.testing.assert_array_equal(data.to_pixels(item["image"]), pixels[int(name[-5])])


def test_random_crops_are_windows_of_the_image_with_uniform_corners_and_fair_flips(tmp_path):
    # The value of a pixel is its column: the window's first column is read off the image, and so is the mirroring.
    columns = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None], (8, 40, 3))
    for i in range(2):
        Image.fromarray(columns).save(tmp_path / f"{i}.png")
    data = folder(str(tmp_path), 8, crop="random", flip=True, heldout=1)
    lefts, mirrored = [], 0
    for place in range(2000):
        row = (data.train.draw(0, (0, place))["image"][4, :, 0] + 1) * 127.5
        mirrored += row[0] > row[-1]
        lefts.append(min(row[0], row[-1]))
        # Columns are one apart up to the rounding of the pixels, away from the filter's reach at the border.
        np.testing.assert_allclose(np.abs(np.diff(row[2:-2])), 1, atol=1.01)
    # Uniform on [0, 32]: mean 16 with standard error 32 / sqrt(12 * 2000) = 0.21; half a pixel of rounding.
    assert abs(np.mean(lefts) - 16) < 4 * 0.21 + 0.5
    assert min(lefts) < 2 and max(lefts) > 30
    assert abs(mirrored - 1000) < 4 * np.sqrt(500)


def test_exif_orientation_transparency_and_palettes_are_shown_as_viewers_show_them(tmp_path):
    rng = np.random.default_rng(2)
    upright = picture(rng, 12, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: viewers rotate by 270 degrees.
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    clear = Image.new("RGBA", (12, 8), (200, 10, 10, 0))
    clear.save(tmp_path / "clear.png")
    upright.convert("P").save(tmp_path / "palette.gif")
    data = folder(str(tmp_path), (8, 12), heldout=1)
    found = {name.rsplit("/", 1)[1]: data.to_pixels(item["image"]) for name, item in both(data)}
    np.testing.assert_array_equal(found["turned.png"], np.asarray(upright))
    assert (found["clear.png"] == 255).all()
    np.testing.assert_array_equal(found["palette.gif"], np.asarray(upright.convert("P").convert("RGB")))


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
def test_a_table_names_files_labels_and_captions(pets, table):
    rows = [{"file_name": f"cats/{i}.{s}", "label": i % 3, "text": f"cat, number {i}"} for i, s in enumerate(
        ("png", "jpg", "webp", "png", "jpg"))]  # fmt: skip
    if table.endswith("jsonl"):
        text = "\n".join(map(json.dumps, rows)) + "\n"
    else:
        text = "file_name,label,text\n" + "".join(f'{r["file_name"]},{r["label"]},"{r["text"]}"\n' for r in rows)
    (pets / table).write_text(text, encoding="utf-8-sig")  # As spreadsheets save it.
    data = folder(str(pets), 8, heldout=2)
    assert (len(data.train), data.num_classes) == (3, 3)
    for source in (data.train, data.heldout):
        for i in range(len(source)):
            number = int(source.name(i).split("/")[-1][0])
            assert source[i]["label"] == number % 3 and source.captions[i] == f"cat, number {number}"
    iterator = batches(data.train, 2, seed=0)
    numbers = [int(data.train.captions[i][-1]) for i in iterator.batch_ids(0)]
    np.testing.assert_array_equal(next(iterator)["label"], np.array(numbers) % 3)


def test_captions_beside_the_images_and_none_where_one_is_missing(tmp_path):
    for i in range(4):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"grey {i}\n")
    data = folder(str(tmp_path), heldout=1)
    assert [data.train.captions[i] for i in range(3)] == [f"grey {data.train.name(i)[-5]}" for i in range(3)]
    (tmp_path / "2.txt").unlink()
    assert folder(str(tmp_path), heldout=1).train.captions is None


def test_another_folder_is_held_out_with_the_classes_of_the_first(pets, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "dogs").mkdir()
    Image.new("RGB", (9, 9)).save(other / "dogs" / "a.png")
    data = folder(str(pets), 8, heldout=str(other))
    assert (len(data.train), len(data.heldout)) == (12, 1) and data.heldout[0]["label"] == 1
    with pytest.raises(ValueError, match="1 of its images would be trained on, such as '.*dogs/a.png'"):
        folder(str(other), 8, heldout=str(other / ".." / other.name))
    (other / "mice").mkdir()
    Image.new("RGB", (9, 9)).save(other / "mice" / "a.png")
    with pytest.raises(ValueError, match="mice.*not among those to train on: cats, dogs"):
        folder(str(pets), 8, heldout=str(other))
    loose = tmp_path_factory.mktemp("loose")
    Image.new("RGB", (9, 9)).save(loose / "a.png")
    with pytest.raises(ValueError, match="only one of .* has labels"):
        folder(str(pets), 8, heldout=str(loose))
    assert len(folder(str(pets), 8, heldout=str(loose), labels=False).heldout) == 1


def test_buckets_give_each_batch_one_shape_near_the_aspect_of_its_items_and_visit_all_equally(tmp_path):
    rng = np.random.default_rng(3)
    sizes = [(32, 32)] * 9 + [(48, 24)] * 7 + [(24, 48)] * 4
    for i, size in enumerate(sizes):
        picture(rng, *size).save(tmp_path / f"{i:02}.png")
    data = folder(str(tmp_path), 16, buckets=((16, 16), (12, 24), (24, 12), (8, 32)), heldout=1, crop="random")
    # The fullest bucket comes first, and the shape that fits no image is left out.
    assert set(data.shapes) == {(16, 16, 3), (12, 24, 3), (24, 12, 3)} and data.shape == data.shapes[0] == (16, 16, 3)
    iterator, seen = batches(data.train, 4, seed=0), np.zeros(19, int)
    for b in range(19):
        ids, batch = iterator.batch_ids(b), next(iterator)
        kinds = {sizes[int(data.train.name(i)[-6:-4])] for i in ids}
        assert len(kinds) == 1
        width, height = kinds.pop()
        assert batch["image"].shape[1:] == {32: (16, 16, 3), 48: (12, 24, 3), 24: (24, 12, 3)}[width]
        np.add.at(seen, ids, 1)
    # 19 batches of 4 are 4 passes over the 19 items; in each bucket a batch may have begun the next pass.
    assert seen.sum() == 76 and seen.min() >= 3 and seen.max() <= 5
    assert data.train[0]["image"].shape == data.shape  # Evaluation sees one shape.


def test_an_integer_stands_for_all_shapes_of_its_multiples_with_no_more_pixels(tmp_path):
    for i, size in enumerate([(64, 64), (100, 50), (50, 100), (80, 60)] * 2):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    data = folder(str(tmp_path), 32, buckets=8, heldout=1)
    # Of 24 x 42.7 the nearest multiple below is 40; 16 x 64 is longer than 2 to 1.
    assert {s[:2] for s in data.shapes} == {(32, 32), (24, 40), (40, 24)}
    with pytest.raises(ValueError, match="buckets=7: expected a divisor"):
        folder(str(tmp_path), 32, buckets=7)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(crop="middle"), "crop='middle'; known: center, random, none"),
        (dict(channels=4), "channels=4"),
        (dict(zoom=0.5), "at least 1"),
        (dict(zoom=1.5), "crop='random'"),
        (dict(size=(4, 4, 4)), "size="),
        (dict(size=0), "size=0"),
        (dict(heldout=12), "cannot hold out 12 of 12"),
        (dict(heldout=0), "cannot hold out 0"),
        (dict(buckets=((0, 4),)), "buckets="),
    ],
)
def test_impossible_settings_are_refused(pets, settings, message):
    with pytest.raises(ValueError, match=message):
        folder(str(pets), **{"size": 8} | settings)


def test_missing_empty_and_half_labelled_folders_and_broken_tables_are_named(pets):
    with pytest.raises(FileNotFoundError, match="no folder '.*nowhere'"):
        folder(str(pets / "nowhere"))
    (pets / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image in '.*empty'"):
        folder(str(pets / "empty"))
    Image.new("RGB", (4, 4)).save(pets / "loose.png")
    with pytest.raises(ValueError, match=r"loose\.png' lies in no class folder.*labels=False"):
        folder(str(pets), 8)
    assert folder(str(pets), 8, labels=False).num_classes == 0
    for text, message in [
        ('{"file": "a"}', "row 1 has no file_name"),
        ('{"file_name": "a", "label": "x"}', "label 'x'"),
        ('{"file_name": "a", "text": "t"}\n{"file_name": "b"}', "row 2 has no 'text'"),
        ('{"file_name": "a"}\n{"file_name": "b"}\n{"file_name": "a"}', "'a' comes more than once"),
        ("{", "metadata.jsonl"),
    ]:
        (pets / "metadata.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            folder(str(pets), 8)
