"""Where images are stored: folders, tar shards, ArrayRecord files, TFDS. Each is a reader of records and a function
that makes a `Dataset` of one."""

from diffjax.data.readers.folder import FolderReader, folder
from diffjax.data.readers.records import RecordReader, array_record
from diffjax.data.readers.tar import TarReader, tar
from diffjax.data.readers.tfds import TFDSReader, tfds

__all__ = ["FolderReader", "RecordReader", "TFDSReader", "TarReader", "array_record", "folder", "tar", "tfds"]
