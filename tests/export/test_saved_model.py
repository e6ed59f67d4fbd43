import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from kerasllm import GPT2, CausalLM, GenerationConfig, GPT2Config, Tokenizer, train_tokenizer

PROMPTS = ["Once upon a time", "The", "Mia found a small red box in the garden and"]


def inputs(**settings):
    values = {"max_new_tokens": 9, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 3, **settings}
    dtypes = {"temperature": "float32", "top_p": "float32"}
    return {
        "prompt": tf.constant(PROMPTS),
        **{name: tf.fill([3], tf.constant(v, dtypes.get(name, "int32"))) for name, v in values.items()},
    }


@pytest.fixture(scope="module")
def loaded(served):
    return tf.saved_model.load(str(served / "1"))


def test_serving_default_is_text_to_text(loaded, causal_lm):
    signature = loaded.signatures["serving_default"]
    assert signature.structured_input_signature[1]["prompt"].shape.as_list() == [None]
    outputs = signature(prompt=tf.constant(PROMPTS))
    assert set(outputs) == {"text"}
    assert [text.decode() for text in outputs["text"].numpy()] == causal_lm.generate(PROMPTS)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9}], ids=str)
def test_generate_equals_the_live_model(loaded, causal_lm, settings):
    outputs = loaded.signatures["generate"](**inputs(**settings))
    live = causal_lm.generate_tokens(PROMPTS, 9, seed=3, **settings)
    assert set(outputs) == {"text", "token_ids", "num_tokens"}
    assert [text.decode() for text in outputs["text"].numpy()] == [row.text for row in live]
    rows = [row.token_ids for row in live]
    assert outputs["num_tokens"].numpy().tolist() == [len(row) for row in rows]
    longest = max(map(len, rows))
    assert outputs["token_ids"].numpy().tolist() == [row + [-1] * (longest - len(row)) for row in rows]


def test_no_special_token_in_the_text(stories, tmp_path):
    """A model that says nothing but special tokens says nothing."""
    tokenizer = train_tokenizer("byte_bpe", stories[:9], 300, special_tokens=("<|endoftext|>", "<|tool|>"))
    config = GPT2Config(vocabulary_size=300, context_length=64, num_layers=1, num_heads=2, dim=8)
    model = CausalLM(GPT2(config), tokenizer, GenerationConfig(max_new_tokens=3))
    model.model.final_norm.scale.assign([0.0] * 8)
    model.model.final_norm.bias.assign([1.0] * 8)  # the same state everywhere, so the same scores
    table = np.zeros((300, 8), "float32")
    table[tokenizer.token_to_id("<|tool|>")] = 1
    model.model.token_embedding.embeddings.assign(table)
    served = tf.saved_model.load(str(model.export(tmp_path / "1"))).signatures
    one = {name: value[:1] for name, value in inputs(max_new_tokens=3).items()}
    outputs = served["generate"](**one)
    assert outputs["token_ids"].numpy().tolist() == [[tokenizer.token_to_id("<|tool|>")] * 3]
    assert outputs["text"].numpy().tolist() == [b""]
    assert served["serving_default"](prompt=tf.constant(["a"]))["text"].numpy().tolist() == [b""]
    # And one that ends at once.
    model.model.token_embedding.embeddings.assign(np.roll(table, tokenizer.eos_id - 1, axis=0))
    assert model.generate_tokens("a")[0].token_ids == []


def test_runs_in_graph_mode_without_kerasllm(served, causal_lm):
    """As TensorFlow Serving runs it: a session, and nothing imported but TensorFlow."""
    code = """
import json, sys
import tensorflow as tf
prompts = json.loads(sys.argv[2])
with tf.compat.v1.Session(graph=tf.Graph()) as session:
    meta = tf.compat.v1.saved_model.loader.load(session, ["serve"], sys.argv[1])
    signature = meta.signature_def["serving_default"]
    texts = session.run(signature.outputs["text"].name, {signature.inputs["prompt"].name: prompts})
assert not {"kerasllm", "keras_hub", "tensorflow_text"} & set(sys.modules)
print(json.dumps([text.decode() for text in texts]))
"""
    command = [sys.executable, "-c", code, str(served / "1"), json.dumps(PROMPTS)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == causal_lm.generate(PROMPTS)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("x " * 300, {}, "shorter than the context of 64 tokens. Received: a prompt of"),
        ("", {}, "at least one token"),
        ("a", {"max_new_tokens": 64}, "must fit into the context of 64 tokens"),
        ("a", {"max_new_tokens": 2**31 - 1}, "must fit into the context of 64 tokens"),
        ("a", {"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ("a", {"temperature": -1.0}, "`temperature` must be at least 0"),
        ("a", {"top_k": -1}, "`top_k` must be at least 0"),
        ("a", {"top_p": 0.0}, "`top_p` must be above 0"),
        ("a", {"top_p": float("nan")}, "`top_p` must be above 0"),
    ],
)
def test_bad_input_is_an_invalid_argument(loaded, prompt, settings, message):
    arguments = {name: value[:1] for name, value in inputs(**settings).items()}
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        loaded.signatures["generate"](**{**arguments, "prompt": tf.constant([prompt])})


def test_settings_must_be_one_per_prompt(loaded):
    generate = loaded.signatures["generate"]
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed"):
        values = inputs()
        with pytest.raises(
            tf.errors.InvalidArgumentError, match=f"`{name}` must have one value per prompt"
        ):
            generate(**{**values, name: values[name][:1]})
    with pytest.raises(tf.errors.InvalidArgumentError, match="one value per prompt. Received: 3 values, 1"):
        generate(**{**inputs(), "prompt": tf.constant(["a"])})
    with pytest.raises(tf.errors.InvalidArgumentError, match="at least one prompt"):
        generate(**{name: value[:0] for name, value in inputs().items()})


def test_assets_extra(served, causal_lm):
    extra = served / "1" / "assets.extra"
    assert Tokenizer.from_folder(extra).to_json() == causal_lm.tokenizer.to_json()
    manifest = json.loads((extra / "kerasllm_manifest.json").read_text())
    assert manifest["signatures"] == ["generate", "serving_default"]
    assert manifest["model_config"] == causal_lm.model.config.to_dict()
    generation = json.loads((extra / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == causal_lm.generation_config.max_new_tokens


def test_weights_are_stored_once(served, causal_lm):
    stored = sum(path.stat().st_size for path in (served / "1" / "variables").iterdir())
    assert stored < 1.2 * 4 * causal_lm.count_params() + 20_000


def test_never_overwrites(served, causal_lm):
    before = sorted(path.stat().st_mtime_ns for path in (served / "1").rglob("*"))
    with pytest.raises(FileExistsError, match="never overwrites"):
        causal_lm.export(served / "1")
    assert sorted(path.stat().st_mtime_ns for path in (served / "1").rglob("*")) == before


def test_interrupted_export_leaves_no_version_folder(causal_lm, tmp_path):
    """Kills exports at several moments; a numbered folder must be whole or not there."""
    causal_lm.save_pretrained(tmp_path / "model")
    code = (
        "import sys; from kerasllm import CausalLM; model = CausalLM.load(sys.argv[1]); "
        "print('loaded', flush=True); model.export(sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "served" / "1")]
    export = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert export.stdout.readline() == "loaded\n"
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("served/.*/*")):  # until it has begun to write
        assert export.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(export.pid, signal.SIGKILL)
    export.wait()
    names = [path.name for path in (tmp_path / "served").iterdir()]
    assert names and not any(name.isdecimal() for name in names)
    with_tokenizer = causal_lm.export(tmp_path / "served" / "1")
    assert (with_tokenizer / "saved_model.pb").is_file()
