"""The exports of the tasks that are no causal language model equal the live ones."""

import json

import numpy as np
import pytest
import tensorflow as tf
from reference.saved_models import CAUSAL_SIGNATURES, check_rows, check_signatures, inputs, read_graph
from reference.weights import randomize

from kerasllm import (
    T5,
    Bert,
    BertConfig,
    GenerationConfig,
    MaskedLM,
    Seq2SeqLM,
    SequenceClassifier,
    T5Config,
    TextEmbedder,
    train_tokenizer,
)

TEXTS = ["Mia went home.", "the garden", "Tom and Mia saw a red box by the sea ."]


def load(path):
    return tf.saved_model.load(str(path)).signatures


@pytest.fixture(scope="module")
def word_pieces(stories):
    return train_tokenizer("wordpiece", stories[:50], 300)


@pytest.fixture(scope="module")
def bert(word_pieces):
    def make(head, **fields):
        size = word_pieces.vocabulary_size
        config = BertConfig(
            vocabulary_size=size + 3, context_length=32, num_layers=1, num_heads=2, dim=16, **fields
        )
        return randomize(Bert(config, head=head))

    return make


def test_seq2seq(tokenizer, tmp_path):
    config = T5Config(
        vocabulary_size=400, context_length=32, num_layers=1, num_decoder_layers=1, num_heads=2, dim=16
    )
    task = Seq2SeqLM(randomize(T5(config)), tokenizer, GenerationConfig(max_new_tokens=6))
    path = task.export(tmp_path / "1")
    check_signatures(path, CAUSAL_SIGNATURES - {"chat", "prefill", "decode"})
    served = load(path)
    texts = served["serving_default"](prompt=tf.constant(TEXTS))["text"].numpy()
    assert [text.decode() for text in texts] == task.generate(TEXTS)
    drawn = {"temperature": 1.2, "seed": 3}
    stop = task.generate(TEXTS, 12, **drawn)[0][3:5]
    live = task.generate_tokens(TEXTS, 12, logprobs=0, stop_strings=[stop], **drawn)
    check_rows(served["generate"](**inputs(TEXTS, stop=[stop], max_new_tokens=12, **drawn)), live)
    # The score of the target under teacher forcing.
    outputs = served["score"](prompt=tf.constant(TEXTS[:1]), continuation=tf.constant(["red box"]))
    ids = tokenizer.encode("red box")
    source = np.array([tokenizer.encode(TEXTS[0], add_special_tokens=True)])
    target = np.array([[config.decoder_start_id, *ids[:-1]]])
    logits = np.asarray(task({"source_ids": source, "token_ids": target}))[0].astype("float64")
    values = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = values[np.arange(len(ids)), ids].sum()
    assert outputs["logprob"].numpy()[0] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    with pytest.raises(ValueError, match="Slots are for models that continue"):
        task.export(tmp_path / "2", slots=2)


def test_masked_lm(word_pieces, bert, tmp_path):
    task = MaskedLM(bert("masked_lm"), word_pieces)
    path = task.export(tmp_path / "1")
    check_signatures(path, {"fill", "serving_default"})
    served = load(path)
    texts = ["the [MASK] was [MASK] .", "[MASK]", "Mia saw a [MASK]"]
    outputs = served["fill"](text=tf.constant(texts), top_k=tf.constant([3, 1, 7]))
    outputs = {name: value.numpy() for name, value in outputs.items()}
    assert outputs["num_masks"].tolist() == [2, 1, 1]
    assert outputs["token_ids"].shape == outputs["tokens"].shape == (3, 2, 7)
    for row, (text, top_k) in enumerate(zip(texts, (3, 1, 7), strict=True)):
        for mask, live in enumerate(task.fill_mask(text, top_k=top_k)):
            wanted = [candidate["token_id"] for candidate in live] + [-1] * (7 - top_k)
            assert outputs["token_ids"][row, mask].tolist() == wanted
            tokens = [token.decode() for token in outputs["tokens"][row, mask, :top_k]]
            assert tokens == [candidate["token"] for candidate in live]
            scores = [candidate["score"] for candidate in live]
            np.testing.assert_allclose(outputs["probabilities"][row, mask, :top_k], scores, atol=1e-5)
    assert served["serving_default"](text=tf.constant(texts[:1]))["token_ids"].shape == [1, 2, 5]
    for text, top_k, message in (
        ("no mask", 1, "must have the mask token"),
        ("[MASK]", 0, "`top_k` must be from 1 to"),
        ("[MASK] " * 40, 1, "of at most 32 tokens. Received: 42"),
        (b"\xff", 1, "`text` must be UTF-8"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            served["fill"](text=tf.constant([text]), top_k=tf.constant([top_k]))


@pytest.mark.parametrize(
    "problem", ["single_label_classification", "multi_label_classification", "regression"]
)
def test_classifier(word_pieces, bert, tmp_path, problem):
    labels = ("bad", "fair", "good")
    task = SequenceClassifier(bert("classifier", labels=labels, problem_type=problem), word_pieces)
    path = task.export(tmp_path / "1", max_batch_size=3)
    check_signatures(path, {"serving_default", "classify", "classify_pairs"})
    assert read_graph(path).signature_def["classify"].method_name == "tensorflow/serving/classify"
    served = load(path)
    name = "scores" if problem == "regression" else "probabilities"
    outputs = served["serving_default"](text=tf.constant(TEXTS))
    examples = [
        tf.train.Example(
            features=tf.train.Features(
                feature={"text": tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))}
            )
        ).SerializeToString()
        for text in TEXTS
    ]
    classified = served["classify"](inputs=tf.constant(examples))
    assert [[label.decode() for label in row] for row in classified["classes"].numpy()] == [[*labels]] * 3
    for row, live in enumerate(task.classify(TEXTS)):
        if problem != "regression":
            assert outputs["label"].numpy()[row].decode() == live[0]["label"]
        wanted = {entry["label"]: entry["score"] for entry in live}
        for scores in (outputs[name], classified["scores"]):
            np.testing.assert_allclose(scores[row], [wanted[label] for label in labels], atol=1e-5)
    pairs = served["classify_pairs"](text=tf.constant(TEXTS), second_text=tf.constant(TEXTS[::-1]))
    for row, live in enumerate(task.classify(list(zip(TEXTS, TEXTS[::-1], strict=True)))):
        wanted = {entry["label"]: entry["score"] for entry in live}
        np.testing.assert_allclose(pairs[name][row], [wanted[label] for label in labels], atol=1e-5)
    with pytest.raises(tf.errors.InvalidArgumentError, match="at most 3 rows. Received: 4"):
        served["serving_default"](text=tf.constant(["a"] * 4))


@pytest.mark.parametrize("normalize", [False, True])
def test_embedder(word_pieces, bert, tmp_path, normalize):
    prompts = {"query": "find : "}
    task = TextEmbedder(
        bert(None), word_pieces, normalize=normalize, max_length=9, prompts=prompts, default_prompt="query"
    )
    path = task.export(tmp_path / "1")
    check_signatures(path, {"serving_default", "embed"})
    manifest = json.loads((path / "assets.extra" / "kerasllm_manifest.json").read_text())
    assert manifest["max_length"] == 9 and manifest["prompts"] == prompts
    outputs = load(path)["embed"](text=tf.constant(TEXTS))
    live = task.encode(TEXTS)
    np.testing.assert_allclose(outputs["embedding"], live, atol=1e-5)
    unit = live / np.linalg.norm(live, axis=1, keepdims=True)
    np.testing.assert_allclose(outputs["normalized_embedding"], unit, atol=1e-5)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        TextEmbedder(task.model).export(tmp_path / "2")
