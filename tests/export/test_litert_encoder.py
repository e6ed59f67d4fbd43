import json

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from reference.assets import asset
from reference.weights import randomize
from reference.word_piece import make_word_piece

from kerasllm import T5, GenerationConfig, T5Config
from kerasllm.litert import Encoder
from kerasllm.models import Bert, BertConfig
from kerasllm.tasks import MaskedLM, Seq2SeqLM, SequenceClassifier, TextEmbedder

CONFIG = BertConfig(
    **{"vocabulary_size": 26, "context_length": 16, "num_layers": 2, "num_heads": 2, "dim": 8},
    **{"intermediate_dim": 12, "labels": ("bad", "so", "good")},
)
TEXTS = ["the cat sat on the mat.", "a good film", "bird", "awful book under a tree. the dog"]
LENGTHS = (6, 16)  # so that texts of the list are filled up in both


def test_embedder(tmp_path):
    network = randomize(Bert(CONFIG, head=None))
    model = TextEmbedder(network, make_word_piece(), pooling="mean", normalize=True, max_length=8)
    encoder = Encoder(model.export(tmp_path / "m.tflite", lengths=LENGTHS), num_threads=2)
    assert set(encoder._buffers) == {6, 8}  # no text is longer than 8
    for text, wanted in zip(TEXTS, model.encode(TEXTS), strict=True):
        np.testing.assert_allclose(encoder(text)["embedding"], wanted, atol=1e-5)
    names = {detail["op_name"] for detail in Interpreter(str(tmp_path / "m.tflite"))._get_ops_details()}
    assert not any(name.startswith(("Flex", "CUSTOM")) for name in names)
    with pytest.raises(FileExistsError, match="a folder of its own"):
        model.export(tmp_path / "other.tflite")
    with pytest.raises(ValueError, match="`lengths` must be at least 1 each"):
        model.export(tmp_path / "b" / "m.tflite", lengths=(0,))


@pytest.mark.slow
def test_classifier_of_texts_and_pairs(tmp_path):
    model = SequenceClassifier(randomize(Bert(CONFIG, head="classifier")), make_word_piece())
    encoder = Encoder(model.export(tmp_path / "m.tflite", lengths=LENGTHS))
    for text in (*TEXTS, ("a good film", "awful book")):
        wanted = {result["label"]: result["score"] for result in model.classify([text], top_k=3)[0]}
        got = encoder(*((text,) if isinstance(text, str) else text))["probabilities"]
        assert encoder.settings["labels"] == ["bad", "so", "good"]
        np.testing.assert_allclose(got, [wanted[label] for label in model.model.config.labels], atol=1e-5)
    with pytest.raises(ValueError, match="1 to 16 tokens. Received: 22 tokens"):
        encoder("the " * 20)


@pytest.mark.slow
def test_masked_lm(tmp_path):
    model = MaskedLM(randomize(Bert(CONFIG)), make_word_piece())
    encoder = Encoder(model.export(tmp_path / "m.tflite", lengths=LENGTHS))
    text = f"the {model.tokenizer.mask_token} sat"
    ids = model.tokenizer.encode(text, parse_special=True, add_special_tokens=True)
    np.testing.assert_allclose(encoder(text)["logits"], model.model(np.array([ids]))[0], atol=1e-4)
    assert model.tokenizer.mask_id in ids


def test_encoder_decoder(tokenizer, tmp_path):
    config = T5Config(
        **{"vocabulary_size": 400, "context_length": 64, "num_layers": 2, "num_decoder_layers": 2},
        **{"num_heads": 2, "head_dim": 8, "dim": 16, "intermediate_dim": 24},
    )
    model = Seq2SeqLM(randomize(T5(config)), tokenizer, GenerationConfig(max_new_tokens=8, eos_token_id=()))
    path = model.export(tmp_path / "m.tflite", source_lengths=(4, 24), cache_length=12)
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_new_tokens"] == 8
    interpreter = Interpreter(str(path))
    decode = interpreter.get_signature_runner("decode")
    shapes = {name: detail["shape"] for name, detail in decode.get_input_details().items()}
    for source, length in (("The", 4), ("Once upon a time there was", 24)):
        ids = tokenizer.encode(source, add_special_tokens=True)
        filled = np.zeros((2, 24), "int32")
        filled[0, : len(ids)], filled[1, : len(ids)] = ids, 1
        encode = interpreter.get_signature_runner(f"encode_{length}")
        memory = encode(token_ids=filled[:1, :length], attention_mask=filled[1:, :length])
        cache = {name: np.zeros(shape, "float32") for name, shape in shapes.items() if "kv" in name}
        token, got = config.decoder_start_id, []
        for place in range(8):
            mask = np.where(np.arange(12) <= place, 0, -45824.0).astype("float32")
            outputs = decode(
                tokens=np.array([[token]], "int32"),
                input_pos=np.array([place], "int32"),
                mask=mask[None, None, None],
                memory_mask=filled[1:],
                **memory,
                **cache,
            )
            cache = {name: outputs[name] for name in cache}
            got.append(token := int(outputs["logits"].argmax()))
        assert len(ids) <= length and got == model.generate_tokens(source, 8)[0].token_ids


@pytest.mark.slow
def test_real_sentence_encoder(tmp_path):
    model = TextEmbedder.from_pretrained(asset("minilm"))
    encoder = Encoder(model.export(tmp_path / "m.tflite", lengths=(16, 64)), num_threads=2)
    texts = [
        "A cat sits on the mat.",
        "The stock market fell sharply today, analysts said.",
        "Hi",
        "x " * 40,
    ]
    for text, wanted in zip(texts, model.encode(texts), strict=True):
        got = encoder(text)["embedding"]
        assert 1 - got @ wanted / np.linalg.norm(got) / np.linalg.norm(wanted) < 1e-5
        np.testing.assert_allclose(got, wanted, atol=1e-4)
