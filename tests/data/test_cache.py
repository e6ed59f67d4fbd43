"""Tokens on disk: read again, never outdated, never half written."""

import pathlib
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf

import kerasllm.data.cache
from kerasllm.data import packed_dataset, tokenize_documents, windows_dataset
from kerasllm.data.cache import cached_tokens, make_key
from kerasllm.tokenizers import Tokenizer, train_tokenizer

DOCUMENTS = ["To be, or not to be.", "", "That is the question."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("character", DOCUMENTS)


def folders(cache):
    return sorted(path.name for path in cache.iterdir())


def refuse_to_tokenize(*args):
    raise AssertionError("tokens were made although the cache has them")


def test_tokens_are_made_once(tokenizer, tmp_path, monkeypatch):
    cache = tmp_path / "new" / "cache"
    plain = tokenize_documents(DOCUMENTS, tokenizer)
    made = tokenize_documents(DOCUMENTS, tokenizer, cache=cache)
    monkeypatch.setattr("kerasllm.data.tokens._tokenize", refuse_to_tokenize)
    read = tokenize_documents(tf.data.Dataset.from_tensor_slices(DOCUMENTS), tokenizer, cache=str(cache))
    assert len(folders(cache)) == 1
    for arrays in (made, read):
        assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in arrays)
        assert [array.tolist() for array in arrays] == [array.tolist() for array in plain]
        assert [array.dtype for array in arrays] == [np.int32, np.int64]


def test_other_documents_tokenizers_and_ends_have_other_tokens(tokenizer, tmp_path):
    with_settings = Tokenizer.from_json(tokenizer.to_json(), settings={"eos_token": "."})
    bigger = train_tokenizer("character", [*DOCUMENTS, "xyz"])
    cases = [
        (DOCUMENTS, tokenizer, {}),
        (DOCUMENTS, tokenizer, {"end_of_text": False}),
        (DOCUMENTS, bigger, {}),
        (DOCUMENTS, with_settings, {}),
        (DOCUMENTS[::-1], tokenizer, {}),
        (DOCUMENTS[:2], tokenizer, {}),
        (["".join(DOCUMENTS)], tokenizer, {}),
    ]
    for number, (documents, chosen, options) in enumerate(cases, start=1):
        expected = tokenize_documents(documents, chosen, **options)
        for _ in range(2):
            tokens = tokenize_documents(documents, chosen, cache=tmp_path, **options)
            assert [array.tolist() for array in tokens] == [array.tolist() for array in expected]
            assert len(folders(tmp_path)) == number


def test_keys_tell_borders_of_parts():
    keys = {make_key(parts) for parts in ([b"ab"], [b"a", b"b"], [b"ab", b""], [b"", b"ab"], [])}
    assert len(keys) == 5


def test_datasets_take_memory_mapped_tokens(tokenizer, tmp_path):
    tokens = tokenize_documents(DOCUMENTS, tokenizer, cache=tmp_path)
    plain = tokenize_documents(DOCUMENTS, tokenizer)
    for make in (lambda t: windows_dataset(t[0], 8, 2), lambda t: packed_dataset(t, tokenizer, 8, 2)):
        for batch, expected in zip(make(tokens), make(plain), strict=True):
            tf.nest.map_structure(np.testing.assert_array_equal, batch, expected)


def test_no_tokens_at_all_are_kept_too(tmp_path):
    tokenizer = train_tokenizer("character", ["a"], special_tokens=())
    for _ in range(2):
        ids, lengths = tokenize_documents(["", ""], tokenizer, cache=tmp_path)
        assert (ids.tolist(), lengths.tolist()) == ([], [0, 0])


KILLED_WRITER = """
import importlib.util, os, sys
import numpy as np
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
save = np.save

def save_half(file, array):
    if array.dtype == np.int64:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), 9)
    save(file, array)

np.save = save_half
cache.cached_tokens(sys.argv[2], "key", lambda: (np.arange(3, dtype="int32"), np.array([3])))
"""


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path):
    command = [sys.executable, "-c", KILLED_WRITER, kerasllm.data.cache.__file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (left_over,) = folders(tmp_path)
    assert left_over.startswith(".incomplete-")
    ids, lengths = cached_tokens(tmp_path, "key", lambda: (np.arange(2, dtype=np.int32), np.array([2])))
    assert (ids.tolist(), lengths.tolist()) == ([0, 1], [2])


def test_a_failed_writer_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        cached_tokens(tmp_path, "key", lambda: (np.arange(2, dtype=np.int32), np.array([2])))
    assert folders(tmp_path) == []


def test_writers_at_once_agree(tmp_path):
    barrier = threading.Barrier(4)
    results = []

    def make():
        barrier.wait()  # All have seen that the cache is empty.
        return np.arange(5, dtype=np.int32), np.array([2, 3])

    def read():
        results.append(cached_tokens(tmp_path, "key", make)[0].tolist())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [list(range(5))] * 4
    assert folders(tmp_path) == ["key"]


def damage(path: pathlib.Path, how: str) -> None:
    if how == "missing":
        (path / "lengths.npy").unlink()
    elif how == "short":
        content = (path / "token_ids.npy").read_bytes()
        (path / "token_ids.npy").write_bytes(content[:-8])
    elif how == "empty":
        (path / "token_ids.npy").write_bytes(b"")
    elif how == "sum":
        np.save(path / "lengths.npy", np.array([1, 2]))
    elif how == "type":
        np.save(path / "token_ids.npy", np.arange(5.0))


@pytest.mark.parametrize("how", ["missing", "short", "empty", "sum", "type"])
def test_damaged_files_are_refused(tmp_path, how):
    tokens = np.arange(5, dtype=np.int32), np.array([2, 3])
    cached_tokens(tmp_path, "key", lambda: tokens)
    damage(tmp_path / "key", how)
    with pytest.raises(ValueError, match=f"delete the folder to make them anew. Received: {tmp_path}/key"):
        cached_tokens(tmp_path, "key", lambda: tokens)
