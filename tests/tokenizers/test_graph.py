"""The same ids in eager code, in tf.function, in tf.data and in a reloaded SavedModel."""

import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

BATCH = 64


class Served(tf.Module):
    def __init__(self, tokenizer):
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


@pytest.fixture
def eager(tokenizer, adversarial):
    ids = tokenizer.tokenize(tf.constant(adversarial), parse_special=True)
    return ids, tokenizer.detokenize(ids)


def test_tf_function_and_tf_data(tokenizer, adversarial, eager):
    expected = eager[0].to_list()
    traced = tf.function(lambda texts: tokenizer.tokenize(texts, parse_special=True))
    assert traced(tf.constant(adversarial)).to_list() == expected
    readable = [text.decode("utf-8", errors="replace") for text in adversarial]
    assert tokenizer.encode(readable, parse_special=True) == expected

    dataset = tf.data.Dataset.from_tensor_slices(adversarial).batch(BATCH)
    dataset = dataset.map(lambda texts: tokenizer.tokenize(texts, parse_special=True))
    rows = [row for batch in dataset for row in batch.to_list()]
    assert rows == expected


def test_saved_model(tokenizer, adversarial, eager, tmp_path):
    expected_ids, expected_texts = eager
    # What Python code uses must not end up in the file.
    tokenizer.decode(tokenizer.encode("a"))
    served = Served(tokenizer)
    signatures = {"tokenize": served.tokenize, "detokenize": served.detokenize}
    tf.saved_model.save(served, tmp_path, signatures=signatures)

    reloaded = tf.saved_model.load(tmp_path)
    ids = reloaded.signatures["tokenize"](text=tf.constant(adversarial))
    assert tf.reduce_all(ids["ids"] == expected_ids.values)
    assert tf.reduce_all(ids["row_splits"] == expected_ids.row_splits)
    texts = reloaded.signatures["detokenize"](**ids)["text"]
    assert tf.reduce_all(texts == expected_texts)

    # TensorFlow Serving's loader is the one of graph mode.
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(tmp_path))
        signature = loaded.signature_def["tokenize"]
        received = session.run(
            {name: info.name for name, info in signature.outputs.items()},
            {signature.inputs["text"].name: adversarial},
        )
    assert received["ids"].tolist() == expected_ids.values.numpy().tolist()
    assert received["row_splits"].tolist() == expected_ids.row_splits.numpy().tolist()

    content = (tmp_path / "saved_model.pb").read_bytes()
    graph = saved_model_pb2.SavedModel.FromString(content).meta_graphs[0].graph_def
    functions = {function.signature.name: function for function in graph.library.function}
    nodes = [*graph.node, *(node for f in functions.values() for node in f.node_def)]
    used = {node.op for node in nodes} - functions.keys()
    assert "StaticRegexReplace" in used
    # An op of tensorflow-text would not load in a plain TensorFlow.
    assert used <= {name for name in dir(tf.raw_ops) if not name.startswith("_")}
    # No more than tables, texts and two traced methods: nothing of what Python code traced before.
    assert len(content) < 400_000
    assert sum("detokenize" in name for name in functions) <= 6
