import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.checks import to_numpy
from reference.weights import randomize

from kerasllm import GPT2, CausalLM, GenerationConfig, GPT2Config, Llama
from kerasllm.data import language_model_dataset, packed_dataset


def small(tokenizer, **changes):
    keras.utils.set_random_seed(0)
    config = GPT2Config(
        **{
            "vocabulary_size": tokenizer.vocabulary_size,
            "context_length": 32,
            "num_layers": 1,
            "num_heads": 2,
            "dim": 16,
            "dropout": 0.0,
            **changes,
        }
    )
    return CausalLM(GPT2(config), tokenizer)


def test_fit_on_strings_learns_them_by_heart(tokenizer):
    model = small(tokenizer, dim=32, context_length=64)
    text = "The quick brown fox jumps over the lazy dog and runs away."
    model.compile(keras.optimizers.Adam(2e-2))
    model.fit([text], epochs=30, verbose=0)
    assert model.evaluate([text], verbose=0)["perplexity"] < 1.2
    assert "The quick brown fox" + model.generate("The quick brown fox", max_new_tokens=40) == text


def test_every_kind_of_input_gives_the_same_loss(tokenizer, stories):
    model = small(tokenizer)
    texts = stories[:10]
    batches = language_model_dataset(texts, tokenizer, 32, 4)
    of_strings = model.evaluate(texts, batch_size=4, verbose=0)
    of_dataset = model.evaluate(tf.data.Dataset.from_tensor_slices(texts), batch_size=4, verbose=0)
    of_batches = model.evaluate(batches, verbose=0)
    assert of_strings == of_dataset == of_batches
    assert model.evaluate(texts, batch_size=7, verbose=0)["loss"] == pytest.approx(of_strings["loss"])


def test_fit_validates_on_strings_and_on_batches(tokenizer, stories):
    model = small(tokenizer)
    batches = language_model_dataset(stories[:10], tokenizer, 32, 4)
    history = model.fit(batches, validation_data=stories[10:12], verbose=0).history
    names = {"loss", "perplexity", "token_accuracy"}
    assert set(history) == names | {f"val_{name}" for name in names}
    assert history["val_perplexity"][0] == pytest.approx(np.exp(history["val_loss"][0]), rel=1e-5)
    model.fit(stories[:4], validation_data=batches, epochs=1, batch_size=2, verbose=0)


def test_fit_and_evaluate_refuse_what_they_would_ignore(tokenizer, stories):
    model = small(tokenizer)
    batches = language_model_dataset(stories[:4], tokenizer, 32, 4)
    for arguments in ({"batch_size": 4}, {"sequence_length": 8}, {"shuffle": True}):
        with pytest.raises(ValueError, match="are for texts"):
            model.fit(batches, verbose=0, **arguments)
    with pytest.raises(ValueError, match="leave `y` out"):
        model.fit(stories[:4], stories[:4])
    with pytest.raises(TypeError, match="Received: str"):
        model.fit("one text")
    with pytest.raises(TypeError, match="Received: ndarray"):
        model.evaluate(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="33 tokens, context_length=32"):
        model.fit(stories[:4], sequence_length=33, verbose=0)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        CausalLM(model.model).fit(stories[:4])


def test_tokenizer_must_fit_the_model(tokenizer):
    with pytest.raises(ValueError, match="a tokenizer of 400 tokens, a model of 399"):
        small(tokenizer, vocabulary_size=399)


def test_keras_file_holds_everything(tmp_path, tokenizer):
    model = CausalLM(small(tokenizer).model, tokenizer, GenerationConfig(max_new_tokens=5, temperature=0.5))
    model.save(tmp_path / "model.keras")
    for loaded in (
        CausalLM.load(tmp_path / "model.keras"),
        keras.models.load_model(tmp_path / "model.keras"),
    ):
        assert loaded.generation_config == model.generation_config
        assert loaded.tokenizer.to_json() == tokenizer.to_json()
        assert loaded.generate("The sun") == model.generate("The sun")


def test_keras_file_without_tokenizer(tmp_path, tokenizer):
    CausalLM(small(tokenizer).model).save(tmp_path / "model.keras")
    assert CausalLM.load(tmp_path / "model.keras").tokenizer is None


def test_damaged_or_missing_files(tmp_path, tokenizer):
    path = tmp_path / "model.keras"
    small(tokenizer).save(path)
    whole = path.read_bytes()
    for damaged in (whole[:2000], b"", whole[:900] + bytes(200) + whole[1100:], whole[:-900] + bytes(900)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            CausalLM.load(path)
    keras.Sequential([keras.layers.Dense(1)]).save(path)
    with pytest.raises(ValueError, match="must hold a CausalLM. Received: Sequential"):
        CausalLM.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CausalLM.load(tmp_path / "nowhere")


def test_failed_save_keeps_the_file(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "model.keras"
    model = small(tokenizer)
    model.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(CausalLM, "save_assets", lambda self, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.keras"]
    with pytest.raises(FileExistsError):
        model.save(path, overwrite=False)


def test_in_mixed_precision(tokenizer, stories):
    config = GPT2Config(
        vocabulary_size=400, context_length=32, num_layers=1, num_heads=2, dim=16, dropout=0.1
    )
    model = CausalLM(GPT2(config, dtype="mixed_bfloat16"), tokenizer)
    model.fit(stories[:4], verbose=0)
    assert isinstance(model.generate("The", max_new_tokens=4), str)


@pytest.mark.parametrize("family", [GPT2, Llama])
def test_packed_documents_do_not_see_each_other(family):
    sizes = {"vocabulary_size": 30, "context_length": 16, "num_layers": 2, "num_heads": 4, "dim": 16}
    if family is Llama:
        sizes |= {"num_kv_heads": 2, "intermediate_dim": 24}
    model = CausalLM(randomize(family(family.config_class(**sizes))))
    rng = np.random.default_rng(0)
    lengths = (5, 1, 6)
    documents = [rng.integers(0, 30, (1, length)) for length in lengths]
    packed = {
        "token_ids": np.concatenate([*documents, np.zeros((1, 2), int)], axis=1),
        "segment_ids": np.repeat([[1, 2, 3, 0]], [*lengths, 2], axis=1),
        "positions": np.concatenate([*map(np.arange, lengths), np.zeros(2, int)])[None],
    }
    got = to_numpy(model(packed))
    alone = np.concatenate([to_numpy(model(document)) for document in documents], axis=1)
    np.testing.assert_allclose(got[:, :12], alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="exclude each other"):
        model({**packed, "attention_mask": np.ones((1, 14), int)})


def test_learns_from_packed_documents(tokenizer, stories):
    keras.utils.set_random_seed(0)
    config = GPT2Config(vocabulary_size=400, context_length=32, num_layers=1, num_heads=2, dim=32)
    model = CausalLM(GPT2(config), tokenizer)
    model.compile(keras.optimizers.Adam(1e-2), jit_compile=False)
    batches = packed_dataset(stories[:20], tokenizer, 32, 4, shuffle=True)
    losses = model.fit(batches, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.3
