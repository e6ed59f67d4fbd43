import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.weights import randomize

from kerasllm import GenerationConfig
from kerasllm.generation import AnswerGenerator, Engine, batch_settings
from kerasllm.models import T5, T5Config
from kerasllm.tasks import Seq2SeqLM


def config(tokenizer, **changes):
    return T5Config(
        **{
            "vocabulary_size": tokenizer.vocabulary_size,
            "context_length": 64,
            "num_layers": 2,
            "num_decoder_layers": 1,
            "num_heads": 4,
            "dim": 32,
            "head_dim": 8,
            "intermediate_dim": 48,
            "dropout": 0.0,
            "decoder_start_id": 3,
            "tie_embeddings": False,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def model(tokenizer):
    """Large random weights: each token of the source changes what comes out."""
    network = randomize(T5(config(tokenizer)))
    return Seq2SeqLM(network, tokenizer, GenerationConfig(max_new_tokens=12, eos_token_id=()))


SOURCES = ["Once upon a time there was a dog.", "The", "A cat and a bird went to the river to swim " * 2]


def by_hand(model, source, count):
    """Greedy, the whole target anew for each token, without padding, cache or graph."""
    source_ids = np.array([model.tokenizer.encode(source, add_special_tokens=True)])
    target = [model.model.config.decoder_start_id]
    for _ in range(count):
        logits = model.model(np.array([target]), source_ids=source_ids)
        target.append(int(np.argmax(logits[0, -1])))
    return target[1:]


def test_generates_what_the_model_says(model):
    expected = [by_hand(model, source, 12) for source in SOURCES]
    assert len({tuple(ids) for ids in expected}) == len(SOURCES)
    assert max(len(set(ids)) for ids in expected) > 2
    completions = model.generate_tokens(SOURCES)
    assert [completion.token_ids for completion in completions] == expected
    assert model.generate(SOURCES) == [model.generate(source) for source in SOURCES]
    assert "".join(model.generate(SOURCES[0], stream=True)) == model.generate(SOURCES[0])


def test_several_results_keep_their_source(model):
    drawn = model.generate(SOURCES[:2], n=3, temperature=1.0, seed=5)
    assert [len(texts) for texts in drawn] == [3, 3]
    assert drawn[1] == model.generate(SOURCES[1], n=3, temperature=1.0, seed=5)
    beams = model.generate(SOURCES[:2], num_beams=3, n=2)
    assert beams[1] == model.generate(SOURCES[1], num_beams=3, n=2)


def test_learns_pairs_and_saves_them(tokenizer, tmp_path):
    keras.utils.set_random_seed(0)
    pairs = [("the dog", "runs home"), ("the cat", "sleeps well"), ("the bird", "sings a song")]
    model = Seq2SeqLM(T5(config(tokenizer)), tokenizer, GenerationConfig(max_new_tokens=12))
    model.compile(keras.optimizers.Adam(1e-2))
    before = model.evaluate(pairs, verbose=0)["loss"]
    model.fit(20 * pairs, batch_size=len(pairs), epochs=3, verbose=0, validation_data=pairs)
    after = model.evaluate(pairs, batch_size=1, verbose=0)
    assert after["loss"] < 0.1 * before
    assert after["perplexity"] == pytest.approx(np.exp(after["loss"]), rel=1e-4)
    texts = model.generate([source for source, _ in pairs])
    assert all(text.startswith(target) for text, (_, target) in zip(texts, pairs, strict=True))
    model.save(tmp_path / "model.keras")
    model.save_pretrained(tmp_path / "folder")
    for path in ("model.keras", "folder"):
        loaded = Seq2SeqLM.load(tmp_path / path)
        assert loaded.generate([source for source, _ in pairs]) == texts


def test_what_an_encoder_decoder_does_not_do(model):
    with pytest.raises(ValueError, match="Contrastive search is for models that continue"):
        model.generate("a", penalty_alpha=0.6, top_k=4)
    with pytest.raises(ValueError, match="`assistant_model` is for models that continue"):
        model.generate("a", assistant_model=model)


def test_min_length_of_a_checkpoint(model, tmp_path):
    """It counts the token that starts the target."""
    model.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "min_length": 30, "max_new_tokens": 60}))
    assert Seq2SeqLM.from_pretrained(tmp_path).generation_config.min_new_tokens == 29


@pytest.mark.parametrize("num_beams", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_compiled_by_xla(model, num_beams):
    """As models are that are large enough for it: with the other layout of the cache."""
    prompts = [[5, 6, 7, 8], [9, 3], [4] * 40]
    wanted = model.generate_tokens(prompts, 10, num_beams=num_beams)
    compiled = Seq2SeqLM(model.model)
    compiled._engine = Engine(model.model, jit_compile=True)
    found = compiled.generate_tokens(prompts, 10, num_beams=num_beams, eos_token_id=model.tokenizer.eos_id)
    assert [row.token_ids for row in found] == [row.token_ids for row in wanted]


def test_a_graph_compiled_by_xla(model):
    sources = tf.ragged.constant([[5, 6, 7, 8], [9, 3], [4] * 40])
    found = []
    for jit_compile in (False, True):
        generator = AnswerGenerator(model.model, model.tokenizer, jit_compile=jit_compile)
        knobs = batch_settings(GenerationConfig(max_new_tokens=10, temperature=1.5, seed=2), 3)
        found.append(generator.continue_ids(sources, **knobs))
    assert len(set(found[0]["token_ids"].numpy().ravel())) > 5
    for name, value in found[0].items():
        if value.dtype == tf.float32:
            np.testing.assert_allclose(found[1][name], value, atol=1e-4)
        else:
            np.testing.assert_array_equal(found[1][name], value)


def test_bad_pairs_and_lengths(model):
    for pairs in ([], ["text"], [("a", "b", "c")], [("a", 3)], "ab"):
        with pytest.raises(TypeError, match="list of .source, target. texts"):
            model.fit(pairs)
    with pytest.raises(ValueError, match="from 1 to 64 tokens.*Received: 0 tokens"):
        model.fit([("a", "")])
    with pytest.raises(ValueError, match="from 1 to 64 tokens"):
        model.generate("word " * 100)
    with pytest.raises(ValueError, match="leave `y` out"):
        model.evaluate(tf.data.Dataset.range(3), y=1)
