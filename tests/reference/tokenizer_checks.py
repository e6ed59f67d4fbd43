"""Compares a tokenizer with the `tokenizers` library, in all the ways it may run."""

import json
import random

import tensorflow as tf
import tokenizers

from kerasllm.tokenizers import Tokenizer

BATCH = 64
AT_ONCE = 1000


def reference_for(tokenizer: Tokenizer, parse_special: bool = False) -> tokenizers.Tokenizer:
    """The library's tokenizer of the same file, less what is done to batches."""
    reference = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    reference.no_truncation()
    reference.no_padding()
    reference.encode_special_tokens = not parse_special
    return reference


def assert_same_ids(tokenizer: Tokenizer, texts: list, parse_special: bool = False) -> list[list[int]]:
    """Compares the ids of texts (str, or bytes that may be invalid); returns them."""
    raw = [text if isinstance(text, bytes) else text.encode() for text in texts]
    decoded = [text.decode("utf-8", errors="replace") for text in raw]
    reference = reference_for(tokenizer, parse_special)
    expected = []
    for first in range(0, len(decoded), AT_ONCE):  # Its results take hundreds of bytes for each token.
        encodings = reference.encode_batch(decoded[first : first + AT_ONCE], add_special_tokens=False)
        expected += [encoding.ids for encoding in encodings]
    received = tokenizer.tokenize(tf.constant(raw, tf.string), parse_special).to_list()
    assert len(received) == len(expected)
    for text, ids, expected_ids in zip(decoded, received, expected, strict=True):
        if ids != expected_ids:
            names = [[reference.id_to_token(i) for i in row[:30]] for row in (ids, expected_ids)]
            raise AssertionError(f"{text[:200]!a}: {names[0]!a} != {names[1]!a}")
    return expected


def assert_same_texts(tokenizer: Tokenizer, rows: list[list[int]], seed: int = 0) -> None:
    """Compares what ids are decoded to, those of texts and random ones."""
    generator = random.Random(seed)
    limit = tokenizer.vocabulary_size + 5  # Some ids are not in the vocabulary.
    rows = [
        *rows,
        *([generator.randrange(limit) for _ in range(generator.randrange(20))] for _ in range(300)),
    ]
    reference = reference_for(tokenizer)
    for skip_special_tokens in (False, True):
        expected = reference.decode_batch(rows, skip_special_tokens=skip_special_tokens)
        received = tokenizer.decode(rows, skip_special_tokens)
        for row, text, expected_text in zip(rows, received, expected, strict=True):
            assert text == expected_text, row


def assert_same_in_graphs(tokenizer: Tokenizer, texts: list[bytes], folder) -> None:
    """Compares eager results with those of tf.data and of a reloaded SavedModel."""
    eager = tokenizer.tokenize(tf.constant(texts), parse_special=True)
    dataset = tf.data.Dataset.from_tensor_slices(texts).batch(BATCH)
    dataset = dataset.map(lambda batch: tokenizer.tokenize(batch, parse_special=True))
    assert [row for batch in dataset for row in batch.to_list()] == eager.to_list()

    served = _Served(tokenizer)
    tf.saved_model.save(
        served, folder, signatures={"tokenize": served.tokenize, "detokenize": served.detokenize}
    )
    reloaded = tf.saved_model.load(folder)
    ids = reloaded.signatures["tokenize"](text=tf.constant(texts))
    assert ids["ids"].numpy().tolist() == eager.values.numpy().tolist()
    assert ids["row_splits"].numpy().tolist() == eager.row_splits.numpy().tolist()
    decoded = reloaded.signatures["detokenize"](**ids)["text"]
    assert decoded.numpy().tolist() == tokenizer.detokenize(eager).numpy().tolist()


class _Served(tf.Module):
    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def tokenize(self, text):
        ids = self.tokenizer.tokenize(text, parse_special=True)
        return {"ids": ids.values, "row_splits": ids.row_splits}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.int32, name="ids"),
            tf.TensorSpec([None], tf.int64, name="row_splits"),
        ]
    )
    def detokenize(self, ids, row_splits):
        rows = tf.RaggedTensor.from_row_splits(ids, row_splits)
        return {"text": self.tokenizer.detokenize(rows)}


def changed(tokenizer: Tokenizer, **parts) -> str:
    """The tokenizer's JSON with some of its parts replaced."""
    return json.dumps(json.loads(tokenizer.to_json()) | parts)
