import random
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from kerasllm import GPT2, CausalLM, GPT2Config
from kerasllm.litert import Generator

PROMPTS = [
    "Once",
    "The little girl went to the park with her dog and",
    "a b c d e f g h i j k l m n o p q r",
]


@pytest.fixture(scope="module")
def interpreter(tflite):
    return tf.lite.Interpreter(str(tflite))


def test_signatures_are_the_contract(interpreter, random_lm):
    signatures = interpreter.get_signature_list()
    assert set(signatures) == {"prefill_4", "prefill_16", "decode"}
    caches = [f"kv_cache_{kind}_{layer}" for layer in range(2) for kind in "kv"]
    for name, values in signatures.items():
        assert set(values["inputs"]) == {"tokens", "input_pos", "mask", *caches}
        assert set(values["outputs"]) == {*caches, *(["logits"] if name == "decode" else [])}
    details = interpreter.get_signature_runner("prefill_4").get_input_details()
    shapes = {name: details[name]["shape"].tolist() for name in details}
    assert shapes["tokens"] == [1, 4] and shapes["input_pos"] == [4] and shapes["mask"] == [1, 1, 4, 46]
    assert shapes["kv_cache_k_0"] == [1, 4, 46, 8] and shapes["kv_cache_v_0"] == [1, 4, 8, 46]


def test_builtin_ops_only(interpreter):
    names = {detail["op_name"] for detail in interpreter._get_ops_details()}
    assert "DYNAMIC_UPDATE_SLICE" in names
    assert not any(name.startswith(("Flex", "CUSTOM")) for name in names)


def test_weights_are_inside_and_the_tied_table_once(tflite, random_lm):
    size = tflite.stat().st_size
    assert 4 * random_lm.count_params() < size < 1.3 * 4 * random_lm.count_params() + 150_000


def test_logits_equal_the_model_s(interpreter, random_lm):
    ids = np.array(random_lm.tokenizer.encode("The sun was warm and the"), "int32")
    details = interpreter.get_signature_runner("decode").get_input_details()
    cache = {name: np.zeros(d["shape"], "float32") for name, d in details.items() if "kv" in name}
    runner = interpreter.get_signature_runner("decode")
    for position, token in enumerate(ids):
        mask = np.where(np.arange(46) <= position, 0, -45824.0).astype("float32")[None, None, None]
        outputs = runner(
            tokens=np.array([[token]], "int32"), input_pos=np.array([position], "int32"), mask=mask, **cache
        )
        cache = {name: outputs[name] for name in cache}
    np.testing.assert_allclose(outputs["logits"][0, 0], random_lm(ids[None])[0, -1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_generator_gives_the_live_model_s_tokens(tflite, random_lm, prompt):
    wanted = random_lm.generate_tokens(prompt, 10)[0].token_ids
    generator = Generator(tflite)
    assert generator.generate_ids(prompt, 10) == wanted
    assert generator.generate(prompt, 10) == random_lm.generate(prompt, 10)


def test_generator_fills_the_cache_to_the_end(tflite, random_lm):
    generator = Generator(tflite)
    length = 43  # after two prefills of 16 there is no room for a third
    prompt = "".join(random.Random(0).choices("#$%&*+=@^~", k=length))  # unseen: a token each
    assert len(random_lm.tokenizer.encode(prompt)) == length
    wanted = random_lm.generate_tokens(prompt, 46 - length)[0].token_ids
    assert generator.generate_ids(prompt) == wanted[: random_lm.generation_config.max_new_tokens]
    with pytest.raises(ValueError, match=f"cache of 46 tokens. Received: a prompt of {length} tokens"):
        generator.generate_ids(prompt, 49 - length)
    with pytest.raises(ValueError, match="empty prompt"):
        generator.generate_ids("")


def test_the_module_itself_needs_no_tensorflow(tflite):
    code = (
        "import sys; sys.modules['tensorflow'] = sys.modules['keras'] = None\n"
        "import importlib.util\n"
        "spec = importlib.util.spec_from_file_location('litert', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.Generator(sys.argv[2]).generate('Once', 3))"
    )
    import kerasllm.litert

    command = [sys.executable, "-c", code, kerasllm.litert.__file__, str(tflite)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_call_reaches_past_the_end_of_the_cache(tflite):
    """The runtime would move such a write to the left, over what is there, and say nothing."""
    calls = []

    class Recording(Generator):
        def _run(self, runner, tokens, length, position, cache):
            calls.append((position, length, len(tokens)))
            return super()._run(runner, tokens, length, position, cache)

    generator = Recording(tflite)
    for length in (1, 5, 17, 43, 45):
        calls.clear()
        generator.generate_ids("#" * length, 1)
        assert all(position + size <= 46 for position, size, _ in calls), calls
        assert sum(count for _, _, count in calls) == length


def test_damaged_or_missing_files(tflite, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        Generator(tmp_path / "none.tflite")
    for name in ("tokenizer.json", "generation_config.json"):
        (tmp_path / name).write_bytes((tflite.parent / name).read_bytes())
    whole = tflite.read_bytes()
    for damaged in (b"", b"not a model", whole[:100]):
        (tmp_path / "m.tflite").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            Generator(tmp_path / "m.tflite")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("model.bin", {}, None),
        ("a.tflite", {"cache_length": 65}, "from 1 to the context of 64"),
        ("a.tflite", {"cache_length": 0}, "from 1 to the context of 64"),
        ("a.tflite", {"prefill_lengths": ()}, "prefill_lengths"),
        ("a.tflite", {"prefill_lengths": (0,)}, "prefill_lengths"),
    ],
)
def test_bad_arguments_are_refused(random_lm, tmp_path, name, arguments, message):
    from kerasllm.export import export_litert

    with pytest.raises(ValueError, match=message or "must end in .tflite"):
        export_litert(random_lm.model, random_lm.tokenizer, tmp_path / name, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_refused(tokenizer, tmp_path):
    config = GPT2Config(vocabulary_size=400, context_length=8, num_layers=1, num_heads=1, dim=4)
    model = CausalLM(GPT2(config, dtype="mixed_bfloat16"), tokenizer)
    with pytest.raises(ValueError, match="takes a float32 model. Received: compute dtype bfloat16"):
        model.export(tmp_path / "m.tflite")


def test_never_overwrites(tflite, random_lm):
    before = {path.name: path.read_bytes() for path in tflite.parent.iterdir()}
    for name in (tflite.name, "another.tflite"):  # another would take the tokenizer away
        with pytest.raises(FileExistsError, match="a folder of its own"):
            random_lm.export(tflite.parent / name)
    assert {path.name: path.read_bytes() for path in tflite.parent.iterdir()} == before
