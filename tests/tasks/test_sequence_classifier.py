import dataclasses

import keras
import numpy as np
import pytest
import tokenizers
from reference.checks import assert_close, to_numpy
from reference.weights import randomize
from reference.word_piece import make_word_piece

from kerasllm.checkpoints import save_folder
from kerasllm.models import GPT2, Bert, BertConfig, GPT2Config
from kerasllm.tasks import SequenceClassifier
from kerasllm.tasks.sequence_classifier import PROBLEM_TYPES, classification_loss
from kerasllm.tasks.texts import encode_texts

CONFIG = BertConfig(
    vocabulary_size=26,
    context_length=12,
    num_layers=2,
    num_heads=2,
    dim=8,
    intermediate_dim=12,
    labels=("ham", "spam", "other"),
)
TEXTS = ["the cat sat on the mat.", "a good film", "bird", "awful book under a tree. the dog"]
PAIRS = [("the cat", "sat on the mat."), ("a dog", "ran"), ("bird", "good")]


def build(**changes):
    return SequenceClassifier(
        randomize(Bert(dataclasses.replace(CONFIG, **changes), head="classifier")), make_word_piece()
    )


@pytest.fixture(scope="module")
def model():
    return build()


def softmax(scores):
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


class TestClassify:
    def test_probabilities_best_first(self, model):
        for text in TEXTS:
            ids = np.array([model.tokenizer.encode(text, add_special_tokens=True)])
            right = softmax(to_numpy(model.model(ids)).astype("float64"))[0]
            results = model.classify(text)
            assert [r["label"] for r in results] == [CONFIG.labels[n] for n in np.argsort(-right)]
            np.testing.assert_allclose([r["score"] for r in results], -np.sort(-right), rtol=1e-4)
        assert len({model.classify(text)[0]["score"] for text in TEXTS}) == len(TEXTS)

    @pytest.mark.parametrize("texts", [TEXTS, PAIRS], ids=["texts", "pairs"])
    def test_neighbours_change_nothing(self, model, texts):
        together = model.classify(texts, batch_size=3)
        for text, results in zip(texts, together, strict=True):
            alone = model.classify(text)
            assert [r["label"] for r in results] == [r["label"] for r in alone]
            np.testing.assert_allclose(
                [r["score"] for r in results], [r["score"] for r in alone], rtol=1e-4
            )

    def test_pairs_have_token_types(self, model):
        ids, types = model.tokenizer.tokenize_pairs(["the cat"], ["sat on the mat."])
        assert types.to_list() == [[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]]
        right = to_numpy(model.model(ids.to_tensor(), token_type_ids=types.to_tensor()))
        assert_close(model.predict(PAIRS[:1]), right)
        assert np.abs(right - to_numpy(model.model(ids.to_tensor()))).max() > 1e-3

    def test_top_k(self, model):
        assert model.classify(TEXTS, top_k=1) == [results[:1] for results in model.classify(TEXTS)]
        with pytest.raises(ValueError, match="`top_k` must be None or at least 1. Received: top_k=0"):
            model.classify(TEXTS, top_k=0)

    @pytest.mark.parametrize(
        "changes, function",
        [
            ({"problem_type": "multi_label_classification"}, lambda x: 1 / (1 + np.exp(-x))),
            ({"problem_type": "regression"}, lambda x: x),
            ({"labels": ("grade",)}, lambda x: x),
        ],
        ids=["multi-label", "regression", "one label"],
    )
    def test_other_problem_types(self, changes, function):
        model = build(**changes)
        scores = model.predict(TEXTS)
        for row, results in zip(scores, model.classify(TEXTS), strict=True):
            found = {result["label"]: result["score"] for result in results}
            right = dict(zip(model.model.config.labels, function(row.astype("float64")), strict=True))
            assert found == pytest.approx(right)

    def test_decoders_classify_by_the_last_token(self, tokenizer):
        config = GPT2Config(vocabulary_size=400, context_length=32, num_layers=1, num_heads=2, dim=8)
        model = SequenceClassifier(randomize(GPT2(config, head="classifier")), tokenizer)
        scores = model.predict(["Once upon a time", "The dog", "A"])
        for text, row in zip(["Once upon a time", "The dog", "A"], scores, strict=True):
            assert_close(row[None], to_numpy(model.model(np.array([tokenizer.encode(text)]))))

    def test_long_texts_are_cut_only_on_request(self, model):
        long = "the cat " * 10
        with pytest.raises(ValueError, match="context of the model, 12 tokens.*text 1 of 22 tokens"):
            model.classify(["a dog", long])
        assert model.classify(long, max_length=12) == model.classify("the cat " * 5)
        for wrong in (0, 13):
            with pytest.raises(ValueError, match=f"`max_length` must be from 1 to .*max_length={wrong}"):
                model.classify(long, max_length=wrong)

    def test_errors(self, model):
        for wrong in (["a dog", ("a", "dog")], None, b"a dog"):
            with pytest.raises(TypeError, match="must be strings, or pairs of strings"):
                model.classify(wrong)
        with pytest.raises(ValueError, match="`batch_size` must be at least 1. Received: batch_size=0"):
            model.classify(TEXTS, batch_size=0)
        with pytest.raises(ValueError, match="`problem_type` must be None or one of .*'ranking'"):
            build(problem_type="ranking")
        gpt2 = GPT2Config(vocabulary_size=26, context_length=32, num_layers=1, num_heads=2, dim=8)
        without_special_tokens = SequenceClassifier(GPT2(gpt2, head="classifier"), None)
        with pytest.raises(ValueError, match=r"SequenceClassifier\(model, tokenizer\)"):
            without_special_tokens.classify("x")

    def test_an_empty_text_without_special_tokens(self, tokenizer):
        config = GPT2Config(vocabulary_size=400, context_length=32, num_layers=1, num_heads=2, dim=8)
        with pytest.raises(ValueError, match="must have a token at least. Received: text 1, empty"):
            SequenceClassifier(GPT2(config, head="classifier"), tokenizer).classify(["a", ""])


@pytest.mark.parametrize("max_length", range(4, 12))
def test_cutting_equals_tokenizers(model, max_length):
    reference = tokenizers.Tokenizer.from_str(model.tokenizer.to_json())
    reference.enable_truncation(max_length, strategy="longest_first")
    texts = ["the cat sat on the mat . a dog", "a dog", "the", ""]
    for items in (texts, [(first, second) for first in texts for second in texts]):
        for item, (ids, types) in zip(items, encode_texts(model.tokenizer, items, max_length), strict=True):
            right = reference.encode(*([item] if isinstance(item, str) else item))
            assert (ids.tolist(), types.tolist()) == (right.ids, right.type_ids)


def test_no_room_for_text(model):
    with pytest.raises(ValueError, match="must leave room for text .*max_length=3, 3 special tokens"):
        encode_texts(model.tokenizer, PAIRS, max_length=3)


class TestTraining:
    good = ["a good film", "the good book .", "nice cat", "good good good", "nice nice bird", "a nice mat"]
    bad = [text.replace("good", "bad").replace("nice", "awful") for text in good]

    def fresh(self, **changes):
        keras.utils.set_random_seed(0)
        calm = {"num_layers": 1, "dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.3}
        network = Bert(dataclasses.replace(CONFIG, **calm, **changes), head="classifier")
        model = SequenceClassifier(network, make_word_piece())
        # Some steps take less time than their graph.
        model.compile(keras.optimizers.Adam(5e-3), run_eagerly=True)
        return model

    def test_learns_to_classify(self):
        model, texts = self.fresh(labels=("bad", "good")), self.good + self.bad
        model.compile(keras.optimizers.Adam(1e-2))
        labels = ["good"] * 6 + ["bad"] * 6
        numbers = np.array([1] * 6 + [0] * 6)
        before = model.evaluate(texts, labels, verbose=0)
        assert before == pytest.approx(model.evaluate(texts, numbers, batch_size=5, verbose=0), rel=1e-5)
        history = model.fit(
            texts, labels, batch_size=5, epochs=15, validation_data=(texts, numbers), verbose=0
        ).history
        assert history["val_accuracy"][-1] == 1.0
        assert history["val_loss"][-1] < 0.1 < before["loss"]
        assert model.classify(self.bad[0])[0]["label"] == "bad"

    def test_learns_several_labels(self):
        model = self.fresh(labels=("good", "cat"), problem_type="multi_label_classification")
        texts = ["good cat", "bad cat", "good dog", "bad dog"]
        labels = [["good", "cat"], ["cat"], ["good"], []]
        np.testing.assert_array_equal(model._read_labels(labels), [[1, 1], [0, 1], [1, 0], [0, 0]])
        signs = np.array([[1, 1], [-1, 1], [1, -1], [-1, -1]])
        right = np.log1p(np.exp(-signs * model.predict(texts))).mean()
        losses = model.fit(texts, labels, epochs=8, shuffle=False, verbose=0).history["loss"]
        assert losses[0] == pytest.approx(right, rel=1e-5) and losses[-1] < 0.95 * losses[0]

    def test_learns_numbers(self):
        model = self.fresh(labels=("grade",))
        texts, grades = ["a good film", "a bad film", "a film"], [1.0, -1.0, 0.25]
        right = ((model.predict(texts)[:, 0] - grades) ** 2).mean()
        losses = model.fit(texts, grades, epochs=8, shuffle=False, verbose=0).history["loss"]
        assert losses[0] == pytest.approx(right, rel=1e-5) and losses[-1] < 0.95 * losses[0]

    def test_the_loss_counts_no_padding(self):
        model, labels = self.fresh(), [0, 2, 1, 1]
        probabilities = softmax(model.predict(TEXTS).astype("float64"))
        right = -np.log(probabilities[range(4), labels]).mean()
        for batch_size in (1, 3, 4):
            results = model.evaluate(TEXTS, labels, batch_size=batch_size, verbose=0)
            assert results["loss"] == pytest.approx(right, rel=1e-4)

    def test_rows_that_fill_a_microbatch_are_not_counted(self):
        model, labels = self.fresh(), [0, 2, 1]
        want = model.evaluate(TEXTS[:3], labels, verbose=0)["loss"]
        model.compile(keras.optimizers.SGD(0.0), microbatches=2, run_eagerly=True)
        losses = model.fit(TEXTS[:3], labels, shuffle=False, verbose=0).history["loss"]
        assert losses[0] == pytest.approx(want, rel=1e-5)

    def test_batches_as_in_keras(self):
        model = self.fresh()
        inputs = model._pad(model._encode(TEXTS))
        history = model.fit(inputs, np.array([0, 1, 2, 1]), epochs=2, verbose=0).history
        assert history["loss"][1] < history["loss"][0]
        assert model.predict(inputs, verbose=0).shape == (4, 3)

    @pytest.mark.parametrize(
        "changes, labels, message",
        [
            ({}, None, "Texts need their labels"),
            ({}, ["ham", "spam", "eggs", "ham"], "A label must be one of .*Received: 'eggs'"),
            ({}, [0, 1, 3, 0], "A label must be one of .*from 0 to 2. Received: 3"),
            ({}, [0, 1], "Each text must have a label. Received: 4 texts, 2 labels"),
            ({"problem_type": "regression"}, [1.0] * 4, r"must be \[texts, 3\]. Received: shape=\(4,\)"),
            ({"problem_type": "multi_label_classification"}, np.full((4, 3), 0.5), "must be 0 or 1"),
        ],
        ids=str,
    )
    def test_labels_that_do_not_fit(self, changes, labels, message):
        with pytest.raises(ValueError, match=message):
            build(**changes).fit(TEXTS, labels)

    def test_unknown_problem_type(self):
        with pytest.raises(ValueError, match="`problem_type` must be one of .*Received: 'ranking'"):
            classification_loss("ranking")


class TestSaving:
    def test_folder(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = SequenceClassifier.load(tmp_path)
        assert loaded.model.config == model.model.config
        assert loaded.classify(PAIRS) == model.classify(PAIRS)

    def test_keras_file_with_the_optimizer(self, tmp_path):
        model = build()
        model.compile(run_eagerly=True)
        model.fit(TEXTS, [0, 1, 2, 0], verbose=0)
        model.save(tmp_path / "model.keras")
        loaded = SequenceClassifier.load(tmp_path / "model.keras")
        np.testing.assert_array_equal(loaded.predict(TEXTS), model.predict(TEXTS))
        assert loaded.optimizer.iterations == model.optimizer.iterations == 1
        results = [m.evaluate(TEXTS, [0, 1, 2, 0], verbose=0) for m in (loaded, model)]
        assert results[0] == pytest.approx(results[1])


@pytest.mark.reference
class TestTransformers:
    @pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
    @pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
    def test_scores_and_losses(self, kind, problem_type, tmp_path):
        transformers = pytest.importorskip("transformers")
        import torch

        spelling = {
            "bert": {},
            "roberta": {"padding_id": 0, "drop_classifier_input": True, "head_activation": "gelu"},
            "distilbert": {
                "token_types": 0,
                "classifier_activation": "relu",
                "classifier_dropout": 0.2,
                "attention_output_dropout": 0.0,
            },
        }[kind]
        model = build(huggingface_type=kind, problem_type=problem_type, **spelling)
        model.save_pretrained(tmp_path)
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
        labels = {
            "single_label_classification": np.array([0, 2, 1, 1]),
            "multi_label_classification": np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 1]], "float32"),
            "regression": np.random.default_rng(1).standard_normal((4, 3)).astype("float32"),
        }[problem_type]
        inputs = {name: torch.tensor(array) for name, array in model._pad(model._encode(TEXTS)).items()}
        inputs["input_ids"] = inputs.pop("token_ids")
        with torch.no_grad():
            result = theirs(**inputs, labels=torch.tensor(labels))
        np.testing.assert_allclose(model.predict(TEXTS), result.logits.numpy(), rtol=0, atol=1e-4)
        loss = model.evaluate(TEXTS, labels, verbose=0)["loss"]
        assert loss == pytest.approx(result.loss.item(), rel=1e-5)

    @pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
    def test_pipeline(self, problem_type, tmp_path):
        transformers = pytest.importorskip("transformers")
        model = build(problem_type=problem_type)
        model.save_pretrained(tmp_path)
        theirs = transformers.pipeline("text-classification", model=str(tmp_path), top_k=None)
        for pair, results in zip(PAIRS, model.classify(PAIRS), strict=True):
            expected = theirs({"text": pair[0], "text_pair": pair[1]})
            assert [r["label"] for r in results] == [e["label"] for e in expected]
            right = [e["score"] for e in expected]
            np.testing.assert_allclose([r["score"] for r in results], right, rtol=1e-4, atol=1e-6)


class TestLabels:
    def test_a_new_head_has_the_labels_that_are_asked_for(self, tmp_path):
        body = randomize(Bert(CONFIG, head="masked_lm"))
        save_folder(tmp_path / "body", body, make_word_piece())
        with pytest.warns(UserWarning, match="is new and must be trained"):
            named = SequenceClassifier.from_pretrained(tmp_path / "body", labels=["a", "b", "c", "d"])
        assert {row["label"] for row in named.classify("the cat")} == set("abcd")
        table, same = (m.get_layer("token_embedding").embeddings for m in (named.model, body))
        np.testing.assert_array_equal(table, same)
        with pytest.warns(UserWarning, match="is new and must be trained"):
            counted = SequenceClassifier.from_pretrained(tmp_path / "body", labels=5)
        assert counted.predict(["the cat"]).shape == (1, 5)

    def test_a_head_that_is_there_must_have_as_many(self, model, tmp_path):
        model.save_pretrained(tmp_path / "head")
        renamed = SequenceClassifier.from_pretrained(tmp_path / "head", labels=["x", "y", "z"])
        names = dict(zip(CONFIG.labels, "xyz", strict=True))
        assert [row["label"] for row in renamed.classify("the cat")] == [
            names[row["label"]] for row in model.classify("the cat")
        ]
        with pytest.raises(ValueError, match="shape"):
            SequenceClassifier.from_pretrained(tmp_path / "head", labels=2)

    @pytest.mark.parametrize("labels", [0, -1, [], "ab", ["a", "a"]])
    def test_bad_labels(self, labels):
        with pytest.raises(ValueError, match="`labels` must be"):
            SequenceClassifier.from_pretrained("nowhere", labels=labels)
