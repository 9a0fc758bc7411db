"""Data sets prepared by TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import os
from typing import Any

from diffjax import registry
from diffjax.data.errors import require
from diffjax.data.images import Record, image_dataset
from diffjax.data.sources import Dataset


class TFDSReader:
    """Records of one split of a prepared TFDS data set.

    Attributes:
      builder: the TFDS builder.
      split: such as `"train"` or `"train[:90%]"`.
      image, label: names of the features; label may be "".
    """

    def __init__(self, builder: Any, split: str, image: str, label: str):
        self.builder, self.split, self.image, self.label = builder, split, image, label
        self._source = self._open()
        caption = next((n for n in ("caption", "text") if n in builder.info.features), None)
        self.captions = None if caption is None else TFDSTexts(self, caption)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        item = self.item(index)
        return Record(item[self.image], int(item[self.label]) if self.label else 0)

    def item(self, index: int) -> dict:
        """Every feature of one item; images are left encoded."""
        return self._source[index]

    def name(self, index: int) -> str:
        """The data set, the split and the number."""
        return f"{self.builder.info.full_name} {self.split}[{index}]"

    def _open(self):
        import tensorflow_datasets

        feature = self.builder.info.features[self.image]
        encoded = isinstance(feature, tensorflow_datasets.features.Image)
        decoders = {self.image: tensorflow_datasets.decode.SkipDecoding()} if encoded else None
        return self.builder.as_data_source(self.split, decoders=decoders)


class TFDSTexts:
    """The texts of a feature, read when they are asked for."""

    def __init__(self, reader: TFDSReader, feature: str):
        self._reader, self._feature = reader, feature

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index):
        text = self._reader.item(index)[self._feature]
        return text.decode() if isinstance(text, bytes) else str(text)


def tfds(
    name: str, size: int | tuple[int, int] | None = None, *, split: str = "train", heldout: str | float | int = "test",
    data_dir: str = "", builder: str = "", image: str = "image", label: str = "label", crop: str = "center",
    flip: bool = False, zoom: float = 1.0, channels: int = 0, buckets: Any = None, split_seed: int = 0,
) -> Dataset:  # fmt: skip
    """A `Dataset` that TFDS has prepared in the ArrayRecord format; nothing is downloaded, TensorFlow is not needed.

    Args:
      name: as TFDS knows it, such as `"cifar10"` or `"imagenet2012:5.1.0"`; or a folder that holds one version.
      split: what to train on, such as `"train"` or `"train[:90%]"`.
      heldout: another split; or a share in (0, 1) or a number of images of `split`.
      data_dir: where TFDS keeps its data; default `~/tensorflow_datasets` or the variable `TFDS_DATA_DIR`.
      builder: `"package.module:Class"` of a builder of one's own.
      image, label: names of the features; `label=""` for unlabelled.
      channels: 3 or 1; 0 takes the data set's own.
      size, crop, flip, zoom, buckets, split_seed: see `folder`.

    Raises:
      ModuleNotFoundError: if tensorflow_datasets or importlib_resources is not installed.
      FileNotFoundError: if the data is not prepared; says how to do it.
      ValueError: if it is prepared in another format, has no such feature or split, the two splits share items, or as
        `folder`.
    """
    # Undeclared by tensorflow_datasets, and missed only deep inside of it.
    require("importlib_resources", "importlib_resources", "tfds")
    module = require("tensorflow_datasets", "tensorflow-datasets", "tfds")
    made = prepared(module, name, data_dir, builder)
    features = made.info.features
    for feature in filter(None, (image, label)):
        if feature not in features:
            raise ValueError(
                f"{name!r} has no feature {feature!r}; it has: {', '.join(features)}; set image= or label="
            )
    _check_splits(made, name, split, heldout)
    if isinstance(heldout, str):
        _refuse_shared(made, split, heldout)
    num_classes = getattr(features[label], "num_classes", 0) if label else 0
    label = label if num_classes else ""
    held = TFDSReader(made, heldout, image, label) if isinstance(heldout, str) else heldout
    return image_dataset(
        TFDSReader(made, split, image, label), size=size or _size(features[image]), crop=crop, flip=flip, zoom=zoom,
        channels=channels or _channels(features[image]), buckets=buckets, heldout=held, split_seed=split_seed,
        num_classes=num_classes or 0,
    )  # fmt: skip


def prepared(module: Any, name: str, data_dir: str, builder: str) -> Any:
    """The TFDS builder of data that lies on this disk in a format with random access; nothing is fetched.

    Raises:
      FileNotFoundError, ValueError: as `tfds`.
    """
    where = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    if os.path.isfile(os.path.join(os.path.expanduser(name), "dataset_info.json")):
        made = module.builder_from_directory(os.path.expanduser(name))
    elif builder:
        made = registry.lookup(builder, {}, "builder")(data_dir=where, file_format="array_record")
    else:
        made = _from_disk(module, name, where)
    if not os.path.isfile(os.path.join(str(made.data_dir), "dataset_info.json")):
        raise FileNotFoundError(_unprepared(name, where))
    found = getattr(made.info.file_format, "value", None)
    if found != "array_record":
        raise ValueError(
            f"{name!r} is prepared as {found} in {made.data_dir}, which has no random access; prepare it once more: "
            f"tfds build {name} --file_format=array_record --data_dir={where}"
        )
    return made


def _from_disk(module: Any, name: str, where: str) -> Any:
    """A builder from the newest prepared version alone: TFDS itself would look for others in the network first."""
    base, _, version = name.partition(":")
    root = os.path.join(where, *base.split("/"))
    found = []
    for folder, _, files in os.walk(root):
        if "dataset_info.json" in files and version in ("", os.path.basename(folder)):
            found.append(folder)
    if not found:
        raise FileNotFoundError(_unprepared(name, where))
    numbers = lambda path: [int(p) if p.isdecimal() else -1 for p in os.path.basename(path).split(".")]
    return module.builder_from_directory(max(found, key=numbers))


def _unprepared(name: str, where: str) -> str:
    return (
        f"the TFDS data set {name!r} is not prepared in {where!r}; on a machine with a network and tensorflow run: "
        f"tfds build {name} --file_format=array_record --data_dir={where}; or give data_dir="
    )


def _check_splits(made: Any, name: str, *splits: Any) -> None:
    for split in splits:
        if isinstance(split, str) and split.partition("[")[0] not in made.info.splits:
            raise ValueError(f"{name!r} has no split {split!r}; it has: {', '.join(made.info.splits)}")


def _refuse_shared(made: Any, split: str, heldout: str) -> None:
    taken: dict[str, list] = {}
    for part in made.info.splits[split].file_instructions:
        taken.setdefault(part.filename, []).append((part.skip, part.skip + part.take))
    for part in made.info.splits[heldout].file_instructions:
        begin, end = part.skip, part.skip + part.take
        if any(start < end and begin < stop for start, stop in taken.get(part.filename, ())):
            raise ValueError(
                f"split={split!r} and heldout={heldout!r} share items, which would be trained on and held out; give "
                "such as split='train[:90%]', heldout='train[90%:]', or a share such as heldout=0.1"
            )


def _size(feature: Any) -> tuple[int, int] | None:
    height, width = (feature.shape or (None, None))[:2]
    return (height, width) if height and width else None


def _channels(feature: Any) -> int:
    return 1 if len(feature.shape or ()) == 2 or feature.shape[-1] == 1 else 3
