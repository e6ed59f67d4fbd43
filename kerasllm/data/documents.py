"""Everything that documents come from → one `tf.data.Dataset` of strings."""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tensorflow as tf

from kerasllm.data.sources import read_documents
from kerasllm.data.tokens import texts_dataset

_TFDS = "tfds:"
_TFRECORD, _ARRAY_RECORD, _TEXT = "TFRecord", "array_record", "text"


class RandomAccess(Protocol):
    """What grain reads from: `grain.MapDataset`, an array_record data source, a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def documents_dataset(
    source: str | os.PathLike | Sequence[str] | Sequence[os.PathLike] | tf.data.Dataset | RandomAccess,
    field: str = "text",
    *,
    split: str = "train",
) -> tf.data.Dataset:
    """Makes a dataset of documents, in an order that is always the same.

    `language_model_dataset`, `tokenize_documents` and their like take what it returns.

    | source | documents |
    |---|---|
    | a list of strings | the strings |
    | a path, a folder, a pattern such as `"part-*.jsonl"`, or a list of `Path` | what `read_documents` reads from text files and JSON lines |
    | the same of files with `.tfrecord` in their name, as `"c4.tfrecord-*"`; `.gz` at the end for compressed ones | the feature `field` of each `tf.train.Example` |
    | the same of `.array_record` files | the same; this needs array_record |
    | `"tfds:name"`, as `"tfds:ag_news_subset"` | the feature `field` of the TensorFlow Dataset; this needs tensorflow-datasets |
    | a `tf.data.Dataset` | its strings, or the entry `field` of its dictionaries |
    | an object with `__len__` and `__getitem__`, as a `grain.MapDataset` | its strings or bytes, or the entry `field` of its dictionaries |

    Files of a pattern come sorted by name. TFRecord and TensorFlow Datasets are read while the dataset is
    iterated; everything else is in memory.

    Args:
        source: one of those.
        field: the name of the text where a document is a record of several fields.
        split: the split of a TensorFlow Dataset.

    Returns:
        A finite dataset of scalar strings.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a package is missing; the message says which.
        TypeError: `source` is none of those, or holds something else than texts.
        ValueError: `source` is empty, or has no text of the name `field`.
    """  # noqa: E501
    if isinstance(source, tf.data.Dataset):
        return _select_field(source, field)
    if isinstance(source, str) and source.startswith(_TFDS):
        return _select_field(_load_tfds(source.removeprefix(_TFDS), split), field)
    if isinstance(source, (str, os.PathLike)):
        return _read_files(_list_files(os.fspath(source)), field)
    if (
        isinstance(source, (list, tuple))
        and source
        and all(isinstance(item, os.PathLike) for item in source)
    ):
        return _read_files([os.fspath(path) for path in source], field)
    is_random_access = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if not is_random_access or isinstance(source, (Mapping, bytes)):
        raise TypeError(
            "`source` must be a path, a list of strings or of `Path`, a tf.data.Dataset or an object with "
            f"`__len__` and `__getitem__`. Received: {type(source).__name__}"
        )
    if not len(source):
        raise ValueError("`source` must hold at least one document. Received: none")
    return texts_dataset(list(_texts_of_records(source, field)))


def _list_files(path: str) -> list[str]:
    if not glob.has_magic(path) or os.path.exists(path):
        if not tf.io.gfile.exists(path):
            raise FileNotFoundError(
                f"`source` must be a file, a folder or a pattern that exists; texts come in a list. "
                f"Received: {path!r}"
            )
        return [path]
    files = sorted(tf.io.gfile.glob(path))
    if not files:
        raise FileNotFoundError(f"no file has a name of this pattern. Received: {path!r}")
    return files


def _read_files(files: list[str], field: str) -> tf.data.Dataset:
    kinds = {_kind_of(file) for file in files}
    if len(kinds) > 1:
        raise ValueError(f"files must be of one kind. Received: {' and '.join(sorted(kinds))} files")
    (kind,) = kinds
    if kind == _TFRECORD:
        return _read_tfrecords(files, field)
    if kind == _ARRAY_RECORD:
        return _read_array_records(files, field)
    return texts_dataset(read_documents(files, field))


def _kind_of(file: str) -> str:
    name = Path(file).name.lower()
    if ".tfrecord" in name:
        return _TFRECORD
    return _ARRAY_RECORD if ".array_record" in name or ".arrayrecord" in name else _TEXT


def _read_tfrecords(files: list[str], field: str) -> tf.data.Dataset:
    compressed = {file.endswith(".gz") for file in files}
    if len(compressed) > 1:
        raise ValueError("TFRecord files must be all compressed or none. Received: .gz files and others")
    # One file after the other: reading several at once would mix their documents.
    records = tf.data.TFRecordDataset(files, compression_type="GZIP" if compressed == {True} else None)
    return _parse_examples(records, field, files[0])


def _read_array_records(files: list[str], field: str) -> tf.data.Dataset:
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
    except ImportError as error:
        raise ImportError("array_record files need: pip install 'kerasllm[datasets]'") from error
    with ArrayRecordDataSource(files) as records:
        examples = list(records.__getitems__(range(len(records))))
    with tf.device("CPU:0"):
        dataset = tf.data.Dataset.from_tensor_slices(tf.constant(examples, tf.string, [len(examples)]))
    return _parse_examples(dataset, field, files[0])


def _parse_examples(records: tf.data.Dataset, field: str, file: str) -> tf.data.Dataset:
    """The strings of a feature of serialized `tf.train.Example`s, of which the first one is checked."""
    for record in records.take(1).as_numpy_iterator():
        try:
            features = tf.train.Example.FromString(record).features.feature
        except Exception as error:  # protobuf's DecodeError has no public name that is always there
            raise ValueError(f"records must be of tf.train.Example. Received: others in {file}") from error
        if field not in features or len(features[field].bytes_list.value) != 1:
            raise ValueError(
                f"records must have one text in the feature {field!r}. Received: the features "
                f"{sorted(features)} in {file}"
            )
        break
    else:
        raise ValueError(f"`source` must hold at least one document. Received: {file} without records")

    @tf.autograph.experimental.do_not_convert
    def parse(batch: tf.Tensor) -> tf.Tensor:
        return tf.io.parse_example(batch, {field: tf.io.FixedLenFeature([], tf.string)})[field]

    return records.batch(256).map(parse, num_parallel_calls=tf.data.AUTOTUNE).unbatch()


def _load_tfds(name: str, split: str) -> tf.data.Dataset:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError("TensorFlow Datasets need: pip install 'kerasllm[datasets]'") from error
    # Several files read at once come in an order of their own each time.
    read_config = tensorflow_datasets.ReadConfig(interleave_cycle_length=1)
    return tensorflow_datasets.load(name, split=split, shuffle_files=False, read_config=read_config)


def _select_field(dataset: tf.data.Dataset, field: str) -> tf.data.Dataset:
    spec = dataset.element_spec
    if isinstance(spec, Mapping):
        if field not in spec:
            raise ValueError(
                f"documents must have the field {field!r}. Received: the fields {sorted(spec)}; "
                "`field` says which one is the text"
            )
        dataset, spec = dataset.map(lambda element: element[field]), spec[field]
    if not isinstance(spec, tf.TensorSpec) or spec.dtype != tf.string or spec.shape.rank != 0:
        raise TypeError(f"a tf.data.Dataset of documents must hold scalar strings. Received: {spec}")
    return dataset


def _texts_of_records(source: RandomAccess, field: str) -> Iterator[str]:
    for number in range(len(source)):
        record = source[number]
        if isinstance(record, Mapping):
            if field not in record:
                raise ValueError(
                    f"documents must have the field {field!r}. Received: document {number} with the fields "
                    f"{sorted(record)}; `field` says which one is the text"
                )
            record = record[field]
        if isinstance(record, bytes):
            record = record.decode("utf-8", errors="replace")
        if not isinstance(record, str):
            raise TypeError(
                "documents must be strings, or dictionaries that hold one. Received: document "
                f"{number}, {type(record).__name__}"
            )
        yield record
