"""Documents from every kind of source; what needs a package that is missing says which."""

import gzip
import itertools
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from kerasllm.data import documents_dataset, packed_dataset, tokenize_documents
from kerasllm.tokenizers import train_tokenizer

TEXTS = ["One.", "Twö,\nthree.", "", "Four"]


def texts_of(*args, **kwargs):
    dataset = documents_dataset(*args, **kwargs)
    assert dataset.element_spec == tf.TensorSpec([], tf.string)
    texts = [text.decode() for text in dataset.as_numpy_iterator()]
    assert [text.decode() for text in dataset.as_numpy_iterator()] == texts, "the order changes"
    return texts


def example(**features):
    features = {
        name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode()]))
        if isinstance(value, str)
        else tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        for name, value in features.items()
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write_tfrecord(path, texts, field="text"):
    compression = "GZIP" if path.suffix == ".gz" else ""
    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for number, text in enumerate(texts):
            writer.write(example(**{field: text, "id": number}))
    return path


def test_lists_of_strings_are_the_texts():
    assert texts_of(TEXTS) == texts_of(tuple(TEXTS)) == texts_of(np.array(TEXTS)) == TEXTS


def test_text_files_folders_and_patterns(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    assert texts_of(tmp_path) == texts_of(f"{tmp_path}/*.txt") == ["text a", "text b", "text c"]
    assert texts_of(str(tmp_path / "b.txt")) == ["text b"]
    assert texts_of([tmp_path / "c.txt", tmp_path / "a.txt"]) == ["text c", "text a"]
    (tmp_path / "[d].txt").write_text("not a pattern")
    assert texts_of(tmp_path / "[d].txt") == ["not a pattern"]


def test_json_lines_have_a_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"body": text, "text": "other"}) for text in ["a", "b"]))
    assert texts_of(path, "body") == texts_of(path, field="body") == ["a", "b"]
    assert texts_of(path) == ["other", "other"]
    with pytest.raises(ValueError, match='non-empty string "title"'):
        documents_dataset(path, "title")


def test_tfrecord_files_come_sorted_and_one_after_the_other(tmp_path):
    expected = [f"text {shard}-{number}" for shard in range(12) for number in range(30)]
    for shard in reversed(range(12)):
        write_tfrecord(
            tmp_path / f"c.tfrecord-{shard:05d}-of-00012", expected[shard * 30 : shard * 30 + 30]
        )
    assert texts_of(f"{tmp_path}/c.tfrecord-*") == expected
    files = sorted(tmp_path.iterdir())
    assert texts_of(files[1]) == expected[30:60]
    assert texts_of([files[1], files[0]]) == expected[30:60] + expected[:30]


def test_tfrecord_files_may_be_compressed_and_have_another_field(tmp_path):
    path = write_tfrecord(tmp_path / "c.tfrecord.gz", TEXTS, "body")
    assert gzip.open(path).read(1)
    assert texts_of(path, "body") == TEXTS
    with pytest.raises(ValueError, match=r"feature 'text'. Received: the features \['body', 'id'\]"):
        documents_dataset(path)
    with pytest.raises(ValueError, match="feature 'id'"):
        documents_dataset(path, "id")


def test_array_record_files(tmp_path, monkeypatch):
    class DataSource:
        """What is used of the real one."""

        def __init__(self, paths):
            self.records = list(itertools.chain(*(Path(path).read_bytes().split(b"|") for path in paths)))

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.records = None

        def __len__(self):
            return len(self.records)

        def __getitems__(self, numbers):
            return [self.records[number] for number in numbers]

    module = types.ModuleType("array_record.python.array_record_data_source")
    module.ArrayRecordDataSource = DataSource
    for name in ("array_record", "array_record.python"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, texts in (("b", TEXTS[2:]), ("a", TEXTS[:2])):
        content = b"|".join(example(text=text) for text in texts)
        (tmp_path / f"{name}.array_record").write_bytes(content)
    assert texts_of(f"{tmp_path}/*.array_record") == TEXTS


def test_real_array_record_files(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for text in TEXTS:
        writer.write(example(text=text))
    writer.close()
    assert texts_of(tmp_path / "a.array_record") == TEXTS


def test_tensorflow_datasets(monkeypatch):
    calls = []

    def load(name, **options):
        calls.append((name, options["split"], options["shuffle_files"], options["read_config"]))
        return tf.data.Dataset.from_tensor_slices({"text": TEXTS, "label": [0, 1, 0, 1]})

    module = types.ModuleType("tensorflow_datasets")
    module.load = load
    module.ReadConfig = lambda interleave_cycle_length: interleave_cycle_length
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    assert texts_of("tfds:news/plain:1.0.0") == TEXTS
    documents_dataset("tfds:news", split="test[:10%]")
    assert calls == [("news/plain:1.0.0", "train", False, 1), ("news", "test[:10%]", False, 1)]
    with pytest.raises(ValueError, match=r"'body'. Received: the fields \['label', 'text'\]"):
        documents_dataset("tfds:news", "body")


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("tfds:news", "tensorflow_datasets"),
        ("a.array_record", "array_record.python.array_record_data_source"),
    ],
)
def test_missing_packages_are_named(source, module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.array_record").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'kerasllm\[datasets\]'"):
        documents_dataset(source)


@pytest.mark.parametrize(
    "to_record", [str, lambda t: {"text": t, "id": 3}, str.encode, lambda t: {"text": t.encode()}]
)
def test_objects_with_random_access(to_record):
    class Source:
        def __len__(self):
            return len(TEXTS)

        def __getitem__(self, index):
            return to_record(
                TEXTS[index]
            )  # as grain's, it goes on at the beginning: no IndexError at the end

    assert texts_of(Source()) == TEXTS


def test_real_grain_dataset():
    grain = pytest.importorskip("grain")
    assert texts_of(grain.MapDataset.source(TEXTS).map(lambda text: {"text": text + "!"}))[0] == "One.!"


def test_tf_data_of_strings_or_dictionaries():
    assert texts_of(tf.data.Dataset.from_tensor_slices(TEXTS)) == TEXTS
    assert (
        texts_of(tf.data.Dataset.from_tensor_slices({"body": TEXTS, "id": [1, 2, 3, 4]}), "body") == TEXTS
    )


def test_documents_are_what_the_other_functions_take(tmp_path):
    tokenizer = train_tokenizer("character", TEXTS)
    documents = documents_dataset(write_tfrecord(tmp_path / "c.tfrecord", TEXTS))
    for array, expected in zip(
        tokenize_documents(documents, tokenizer), tokenize_documents(TEXTS, tokenizer), strict=True
    ):
        np.testing.assert_array_equal(array, expected)
    for batch, expected in zip(
        packed_dataset(documents, tokenizer, 8, 2), packed_dataset(TEXTS, tokenizer, 8, 2), strict=True
    ):
        tf.nest.map_structure(np.testing.assert_array_equal, batch, expected)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere.txt", FileNotFoundError, "'nowhere.txt'"),
        ("nowhere-*.txt", FileNotFoundError, "pattern. Received: 'nowhere-"),
        ([], ValueError, "at least one document"),
        (["a", 5], TypeError, "document 1, int"),
        ([{"text": "a"}, {"body": "a"}], ValueError, r"document 1 with the fields \['body'\]"),
        ({"text": ["a"]}, TypeError, "Received: dict"),
        (b"abc", TypeError, "Received: bytes"),
        (5, TypeError, "Received: int"),
        (tf.data.Dataset.range(3), TypeError, "scalar strings.*int64"),
        (tf.data.Dataset.from_tensor_slices(["a"]).batch(1), TypeError, "scalar strings"),
    ],
)
def test_bad_sources_are_refused(source, error, message):
    with pytest.raises(error, match=message):
        documents_dataset(source)


def test_bad_files_are_refused(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("a")
    records = write_tfrecord(tmp_path / "b.tfrecord", TEXTS)
    with pytest.raises(ValueError, match="of one kind. Received: TFRecord and text files"):
        documents_dataset([text, records])
    with pytest.raises(ValueError, match="all compressed or none"):
        documents_dataset([records, tmp_path / "b.tfrecord.gz"])
    empty = write_tfrecord(tmp_path / "c.tfrecord", [])
    with pytest.raises(ValueError, match="at least one document. Received: .*c.tfrecord without records"):
        documents_dataset(empty)
    with tf.io.TFRecordWriter(str(tmp_path / "d.tfrecord")) as writer:
        writer.write(b"no example")
    with pytest.raises(ValueError, match="must be of tf.train.Example. Received: others in .*d.tfrecord"):
        documents_dataset(tmp_path / "d.tfrecord")
