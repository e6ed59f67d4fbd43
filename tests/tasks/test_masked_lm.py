import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.checks import to_numpy
from reference.weights import randomize
from reference.word_piece import make_word_piece

from kerasllm.models import Bert, BertConfig
from kerasllm.tasks import MaskedLM

CONFIG = BertConfig(
    vocabulary_size=28,  # two more than the tokenizer has
    context_length=12,
    num_layers=2,
    num_heads=2,
    dim=8,
    intermediate_dim=12,
)
TEXTS = ["the [MASK] sat on the mat.", "a [MASK] [MASK] under the tree", "[MASK]"]


@pytest.fixture(scope="module")
def model():
    return MaskedLM(randomize(Bert(CONFIG)), make_word_piece())


class TestFillMask:
    def test_the_likeliest_tokens(self, model):
        ids = [model.tokenizer.encode(TEXTS[0], parse_special=True, add_special_tokens=True)]
        assert ids[0][2] == model.tokenizer.mask_id == 4
        logits = to_numpy(model.model(np.array(ids)))[0, 2].astype("float64")
        probabilities = np.exp(logits) / np.exp(logits).sum()
        best = [number for number in np.argsort(-probabilities) if number < 26][:3]
        (candidates,) = model.fill_mask(TEXTS[0], top_k=3)
        assert [candidate["token_id"] for candidate in candidates] == best
        np.testing.assert_allclose([c["score"] for c in candidates], probabilities[best], rtol=1e-4)
        for candidate in candidates:
            assert candidate["token"] == model.tokenizer.id_to_token(candidate["token_id"])
        words = [c for c in model.fill_mask(TEXTS[0], top_k=26)[0] if c["token"] == "dog"]
        assert words[0]["sequence"] == "the dog sat on the mat."

    def test_several_masks_and_texts_of_unlike_lengths(self, model):
        together = model.fill_mask(TEXTS, top_k=4, batch_size=2)
        assert [len(masks) for masks in together] == [1, 2, 1]
        for text, masks in zip(TEXTS, together, strict=True):
            alone = model.fill_mask(text, top_k=4)
            for mine, theirs in zip(masks, alone, strict=True):
                assert [c["token_id"] for c in mine] == [c["token_id"] for c in theirs]
                assert [c["sequence"] for c in mine] == [c["sequence"] for c in theirs]
                np.testing.assert_allclose([c["score"] for c in mine], [c["score"] for c in theirs], 1e-4)
        first, second = together[1]
        assert first[0]["sequence"] != second[0]["sequence"]
        assert all(candidate["sequence"].count("[MASK]") >= 1 for candidate in first + second)

    def test_targets(self, model):
        (everything,) = model.fill_mask(TEXTS[0], top_k=28)
        assert len(everything) == 26
        (chosen,) = model.fill_mask(TEXTS[0], targets=["dog", "cat", "##ing"])
        assert {candidate["token_id"] for candidate in chosen} == {7, 8, 25}
        scores = {candidate["token_id"]: candidate["score"] for candidate in everything}
        assert [c["score"] for c in chosen] == sorted((scores[n] for n in (7, 8, 25)), reverse=True)

    def test_errors(self, model):
        with pytest.raises(ValueError, match=r"must have the mask token '\[MASK\]'. Received: 'the cat'"):
            model.fill_mask([TEXTS[0], "the cat"])
        with pytest.raises(ValueError, match="12 tokens, or be cut.*Received: text 1 of 15 tokens"):
            model.fill_mask([TEXTS[0], "[MASK]" + " the" * 12])
        with pytest.raises(ValueError, match="`top_k` must be at least 1. Received: top_k=0"):
            model.fill_mask(TEXTS, top_k=0)
        with pytest.raises(ValueError, match="`token` must be in the vocabulary. Received: token='whale'"):
            model.fill_mask(TEXTS, targets=["whale"])
        with pytest.raises(ValueError, match=r"needs a tokenizer.*MaskedLM\(model, tokenizer\)"):
            MaskedLM(model.model).fill_mask(TEXTS)

    def test_a_tokenizer_without_a_mask(self, model, tokenizer):
        config = BertConfig(vocabulary_size=400, num_layers=1, dim=8, num_heads=2, intermediate_dim=12)
        with pytest.raises(ValueError, match="a tokenizer with a mask token"):
            MaskedLM(Bert(config), tokenizer).fill_mask("a [MASK]")

    def test_another_head(self):
        with pytest.raises(ValueError, match="must have the head 'masked_lm'. Received: head=None"):
            MaskedLM(Bert(CONFIG, head=None))


@pytest.mark.parametrize("ending", ["", ".keras"])
def test_saving(model, tmp_path, ending):
    path = tmp_path / f"model{ending}"
    (model.save if ending else model.save_pretrained)(path)
    assert MaskedLM.load(path).fill_mask(TEXTS) == model.fill_mask(TEXTS)


@pytest.mark.reference
def test_transformers_finds_the_same(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path)
    theirs = transformers.pipeline("fill-mask", model=str(tmp_path), top_k=7)
    for text, masks in zip(TEXTS, model.fill_mask(TEXTS, top_k=7), strict=True):
        wanted = theirs(text)
        wanted = wanted if isinstance(wanted[0], list) else [wanted]
        assert len(wanted) == len(masks)
        for mine, expected in zip(masks, wanted, strict=True):
            # They also offer the ids that the tokenizer does not have.
            expected = [candidate for candidate in expected if candidate["token"] < 26]
            for candidate, other in zip(mine, expected, strict=False):
                assert (candidate["token_id"], candidate["token"]) == (other["token"], other["token_str"])
                if candidate["token"] != "[PAD]":  # they take padding out of the text
                    assert candidate["sequence"] == other["sequence"]
                np.testing.assert_allclose(candidate["score"], other["score"], rtol=1e-4)


class TestTraining:
    def test_learns_what_is_masked(self):
        keras.utils.set_random_seed(0)
        model = MaskedLM(Bert(CONFIG), make_word_piece())
        texts = ["the cat sat on the mat.", "a dog under the tree"] * 6
        model.compile(keras.optimizers.Adam(2e-2), jit_compile=False)
        options = {"sequence_length": 12, "mask_rate": 0.3, "batch_size": 4}
        before = model.evaluate(texts, verbose=0, **options)
        assert model.evaluate(texts, verbose=0, **options) == before  # the same masks again
        history = model.fit(texts, epochs=12, validation_data=texts, verbose=0, **options).history
        assert history["val_loss"][-1] < before["loss"] - 1
        assert set(before) == {"loss", "perplexity", "token_accuracy"}

    def test_step_is_the_gradient_of_the_mean_over_the_masked(self):
        config = dataclasses.replace(CONFIG, dropout=0.0, attention_dropout=0.0)
        model, reference = (MaskedLM(randomize(Bert(config))) for _ in range(2))
        rng = np.random.default_rng(0)
        inputs = {"token_ids": rng.integers(0, 28, (3, 9)), "attention_mask": np.ones((3, 9), "int32")}
        labels, weights = rng.integers(0, 28, (3, 9)), (rng.random((3, 9)) < 0.3).astype("float32")
        variables = [weight.value for weight in reference.trainable_weights]
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(
                labels, reference(inputs), from_logits=True
            )
            loss = tf.reduce_sum(losses * weights) / weights.sum()
        gradients = tape.gradient(loss, variables)
        model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
        batches = tf.data.Dataset.from_tensors((inputs, labels, weights))
        history = model.fit(batches, verbose=0).history
        np.testing.assert_allclose(history["loss"][0], loss, rtol=1e-5)
        for got, variable, gradient in zip(model.trainable_weights, variables, gradients, strict=True):
            want = variable - 0.1 * tf.convert_to_tensor(gradient)
            np.testing.assert_allclose(to_numpy(got), want, rtol=1e-4, atol=1e-6)

    def test_what_does_not_fit_is_refused(self, model):
        with pytest.raises(ValueError, match="leave `y` out"):
            model.fit(TEXTS, [1, 2, 3])
        with pytest.raises(TypeError, match="`x` must be a list of texts"):
            model.fit(np.zeros((2, 3)))
        batches = tf.data.Dataset.from_tensors((np.ones((1, 3)),) * 3)
        with pytest.raises(ValueError, match=r"are for texts.*mask_rate"):
            model.fit(batches, mask_rate=0.2)
