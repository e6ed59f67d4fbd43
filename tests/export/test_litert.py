import errno
import json
import os
import random
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import compiled_model
from ai_edge_litert import schema_py_generated as schema
from kerasllm_serving.litert import Text
from reference.weights import randomize, widen_columns

from kerasllm import GPT2, CausalLM, GenerationConfig, GPT2Config, Llama, LlamaConfig
from kerasllm.data import generate_stories
from kerasllm.export import export_litert
from kerasllm.export import litert as litert_export
from kerasllm.generation.sampling import choose_tokens
from kerasllm.generation.sampling import uniform_numbers as uniform_tensor
from kerasllm.litert import CachedModel, Generator, choose_token, uniform_numbers

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
    assert set(signatures) == {
        *("prefill_4", "prefill_16", "read_4_24", "read_16_24", "decode_24", "decode"),
    }
    caches = [f"kv_cache_{kind}_{layer}" for layer in range(2) for kind in "kv"]
    for name, values in signatures.items():
        assert set(values["inputs"]) == {"tokens", "input_pos", "mask", *caches}
        assert set(values["outputs"]) == {*caches, *(["logits"] if name.startswith("decode") else [])}
    details = interpreter.get_signature_runner("prefill_4").get_input_details()
    shapes = {name: details[name]["shape"].tolist() for name in details}
    assert shapes["tokens"] == [1, 4] and shapes["input_pos"] == [4] and shapes["mask"] == [1, 1, 4, 46]
    assert shapes["kv_cache_k_0"] == [1, 4, 46, 8] and shapes["kv_cache_v_0"] == [1, 4, 8, 46]
    details = interpreter.get_signature_runner("read_16_24").get_input_details()
    assert details["mask"]["shape"].tolist() == [1, 1, 16, 24]
    details = interpreter.get_signature_runner("decode_24").get_input_details()
    assert details["mask"]["shape"].tolist() == [1, 1, 1, 24]
    assert details["kv_cache_v_0"]["shape"].tolist() == [1, 4, 8, 46]


def test_builtin_ops_only(interpreter):
    names = {detail["op_name"] for detail in interpreter._get_ops_details()}
    assert {"DYNAMIC_UPDATE_SLICE", "EMBEDDING_LOOKUP"} <= names
    assert not any(name.startswith(("Flex", "CUSTOM")) for name in names)


def stored(path):
    """Of each use of a matrix or table in a `.tflite`: operation, rows, type, and where it is stored."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes()))
    codes = {schema.BuiltinOperator.FULLY_CONNECTED: 1, schema.BuiltinOperator.EMBEDDING_LOOKUP: 1}
    found = []
    for graph in model.subgraphs:
        for operator in graph.operators:
            if (code := model.operatorCodes[operator.opcodeIndex].builtinCode) in codes:
                tensor = graph.tensors[operator.inputs[1]]
                found.append((code, int(tensor.shape[0]), tensor.type, tensor.buffer))
    return found


def test_the_tied_table_is_stored_once_and_no_gain_is_folded_into_it(tflite, random_lm):
    table = random_lm.model.token_embedding.embeddings.numpy()
    of_table = [entry for entry in stored(tflite) if entry[1] == len(table)]
    assert {code for code, *_ in of_table} == {
        schema.BuiltinOperator.FULLY_CONNECTED,
        schema.BuiltinOperator.EMBEDDING_LOOKUP,
    }
    assert len({buffer for *_, buffer in of_table}) == 1
    content = tflite.read_bytes()
    assert content.count(table.tobytes()) == 1
    norms = [v for v in random_lm.model.variables if v.path.endswith("scale")]
    assert len(norms) == 5 and all(content.count(v.numpy().tobytes()) == 1 for v in norms)


def test_the_report_compares_with_the_model(tflite, random_lm):
    report = json.loads((tflite.parent / "report.json").read_text())
    assert report["size_bytes"] == tflite.stat().st_size
    assert report["weight_bytes"] == 4 * random_lm.count_params()
    assert report["peak_bytes"] > 1e8 and report["tokens"] > 80 and report["top1_agreement"] == 1
    assert abs(report["divergence"]) < 1e-5 and abs(report["nll"] - report["model_nll"]) < 1e-4
    loss = random_lm.evaluate(  # the same tokens as one text; other texts have other beginnings
        generate_stories(4, seed=5), sequence_length=45
    )["loss"]
    assert abs(report["model_nll"] - loss) < 1.0


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


@pytest.fixture(scope="module")
def generator(tflite):
    return Generator(tflite, num_threads=2)


SAMPLING = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.3}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_generator_gives_the_live_model_s_tokens(generator, random_lm, prompt):
    wanted = random_lm.generate_tokens(prompt, 10)[0].token_ids
    assert generator.generate_ids(prompt, 10) == wanted
    assert generator.generate(prompt, 10) == random_lm.generate(prompt, 10)
    drawn = [random_lm.generate_tokens(prompt, 10, seed=s, **SAMPLING)[0].token_ids for s in (1, -2)]
    assert drawn[0] != drawn[1] != wanted
    assert [generator.generate_ids(prompt, 10, seed=s, **SAMPLING) for s in (1, -2)] == drawn


def test_random_numbers_are_the_live_model_s():
    for seed in (0, 42, -1, 2**31 - 1, -(2**31)):
        wanted = uniform_tensor(tf.constant([seed]), tf.constant(13))[0]
        np.testing.assert_array_equal(uniform_numbers(seed, 13), wanted)


@pytest.mark.parametrize("name", [*SAMPLING, "all"])
def test_each_filter_chooses_as_the_live_model(name):
    """With scores that have ties, over the whole range of the random number."""
    scores = np.round(np.random.default_rng(0).normal(size=300) * 3, 1).astype("float32")
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    changed = {"temperature": 1.7, "top_k": 7, "top_p": 0.7, "min_p": 0.2, "repetition_penalty": 1.5}
    settings = off | (changed if name == "all" else {name: changed[name]})
    penalized, seen = scores.copy(), [3, 5, 250, 5]
    for token in set(seen):
        factor = settings["repetition_penalty"]
        penalized[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    numbers = np.linspace(0, 1, 50, endpoint=False, dtype="float32") + np.float32(0.003)
    columns = {
        key: np.full(50, settings[key], "int32" if key == "top_k" else "float32")
        for key in ("temperature", "top_k", "top_p", "min_p")
    }
    wanted = choose_tokens(np.tile(penalized, (50, 1)), numbers, **columns).numpy().tolist()
    assert [choose_token(scores, number, seen, settings) for number in numbers] == wanted
    assert len(set(wanted)) > 2


def test_of_equal_scores_the_first_are_the_likeliest():
    """As in `top_k` of TensorFlow; of a few scores, any sort keeps the order."""
    scores = np.random.default_rng(0).integers(0, 5, 1000).astype("float32")
    off = {"temperature": 1.0, "top_k": 5, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    numbers = np.linspace(0, 1, 50, endpoint=False, dtype="float32")
    columns = {name: np.full(50, off[name], "float32") for name in ("temperature", "top_p", "min_p")}
    tiled = np.tile(scores, (50, 1))
    wanted = choose_tokens(tiled, numbers, top_k=np.full(50, 5, "int32"), **columns).numpy().tolist()
    assert [choose_token(scores, number, [], off) for number in numbers] == wanted
    assert set(wanted) == set(np.flatnonzero(scores == 4)[:5].tolist())


class Letters:
    """A tokenizer whose ids are code points."""

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize("stops", [("cd", "bcd"), ("bcd", "cd")])
def test_of_stop_strings_that_end_together_the_longest_counts(stops):
    text = Text(Letters(), [], stops)
    assert [text.push(ord(letter)) for letter in "abcd"] == ["a", "", "", ""]
    assert text.stopped and text.finish() == ""


def test_stop_strings_and_streaming(generator, random_lm):
    prompt = PROMPTS[1]
    whole = random_lm.generate(prompt, 12)
    pieces = list(generator.stream(prompt, 12))
    assert "".join(pieces) == whole and len(pieces) > 4
    for stop in (whole[3:6], whole[5:9], "nowhere"):
        wanted = random_lm.generate_tokens(prompt, 12, stop_strings=["zzz", stop])[0]
        assert generator.generate(prompt, 12, stop_strings=["zzz", stop]) == wanted.text
        assert generator.generate_ids(prompt, 12, stop_strings=["zzz", stop]) == wanted.token_ids
    assert whole[3:6] not in generator.generate(prompt, 12, stop_strings=whole[3:6])


def test_one_text_at_a_time_and_known_settings(generator):
    stream = generator.stream(PROMPTS[0], 12)
    next(stream)
    generator.generate_ids(PROMPTS[1], 1)
    with pytest.raises(RuntimeError, match="one text at a time"):
        list(stream)
    for settings, message in (
        ({"num_beams": 2}, "Received: \\['num_beams'\\]"),
        ({"top_p": 0.0}, "`top_p` is out of its range"),
        ({"stop_strings": ["a", ""]}, "`stop_strings` is out of its range"),
    ):
        with pytest.raises(ValueError, match=message):
            generator.generate(PROMPTS[0], 3, **settings)


def test_generator_fills_the_cache_to_the_end(generator, random_lm):
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
    import kerasllm_serving.litert

    command = [sys.executable, "-c", code, kerasllm_serving.litert.__file__, str(tflite)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_call_reaches_past_the_end_of_the_cache(tflite):
    """The runtime would move such a write to the left, over what is there, and say nothing."""
    calls = []

    class Recording(CachedModel):
        def _run(self, name, tokens, length, position, columns):
            calls.append((name, position, length, len(tokens)))
            super()._run(name, tokens, length, position, columns)

    model = Recording(tflite)
    for length in (1, 5, 17, 43, 45):
        calls.clear()
        model.prefill([7] * length)
        assert all(position + size <= 46 for _, position, size, _ in calls), calls
        assert sum(count for *_, count in calls) == length
    calls.clear()
    for place in (22, 23, 24, 45):  # the shortest that reads the token's own place, too
        model.decode(7, place)
    assert [name for name, *_ in calls] == ["decode_24", "decode_24", "decode", "decode"]


def test_the_short_decode_gives_the_long_one_s_logits(tflite, random_lm):
    model, ids = CachedModel(tflite), random_lm.tokenizer.encode("The sun was warm and")
    both = []
    for decodes in (model._decodes, {46: "decode"}):
        model._decodes = decodes
        both.append(np.stack([model.decode(token, place) for place, token in enumerate(ids)]))
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-4)


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
        ("model.bin", {}, "must end in .tflite"),
        ("a.tflite", {"cache_length": 65}, "from 1 to the context of 64"),
        ("a.tflite", {"cache_length": 0}, "from 1 to the context of 64"),
        ("a.tflite", {"prefill_lengths": ()}, "prefill_lengths"),
        ("a.tflite", {"prefill_lengths": (0,)}, "prefill_lengths"),
        ("a.tflite", {"short_lengths": (0,)}, "short_lengths"),
        ("a.tflite", {"quantize": "int3"}, "`quantize` must be one of None, 'fp16', 'int8', 'int4'"),
    ],
)
def test_bad_arguments_are_refused(random_lm, tmp_path, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_litert(random_lm.model, random_lm.tokenizer, tmp_path / name, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_and_unknown_operations_are_refused_at_once(random_lm, tmp_path, monkeypatch):
    def no_conversion(*_):
        raise AssertionError("the conversion was begun")

    monkeypatch.setattr(litert_export, "convert", no_conversion)
    arguments = (random_lm.model, random_lm.tokenizer, tmp_path / "m.tflite")
    assert 1e8 < litert_export.available_memory() < 1e14
    with monkeypatch.context() as patch:
        patch.setattr(litert_export, "available_memory", lambda: 42 * random_lm.count_params())
        with pytest.raises(MemoryError, match="The conversion needs about"):
            export_litert(*arguments)
        with pytest.raises(AssertionError):  # by force it goes on
            export_litert(*arguments, force=True)
    norm = type(random_lm.model.final_norm)
    monkeypatch.setattr(norm, "call", lambda self, x: tf.math.lgamma(x))
    with pytest.raises(ValueError, match="builtin operations. Received: \\['Lgamma'\\] in prefill_8"):
        export_litert(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_calls_look_at_no_more_of_the_cache_than_they_must(tflite, monkeypatch):
    model, names = CachedModel(tflite), []
    run = model._model.run_by_name
    monkeypatch.setattr(
        model._model, "run_by_name", lambda name, *rest: names.append(name) or run(name, *rest)
    )
    model.prefill([1] * 3)
    model.prefill([1] * 16, 8)
    model.prefill([1] * 16, 9)
    model.decode(1, 23)
    model.decode(1, 24)
    assert names == ["read_4_24", "read_16_24", "prefill_16", "decode_24", "decode"]


def test_the_calls_of_a_long_cache():
    shapes = litert_export._shapes((8, 512), 2048, litert_export.SHORT_LENGTHS)
    assert [n for n, columns in shapes.values() if (n, columns) != (1, columns)] == [8, 512, 8, 512]
    assert shapes["read_8_256"] == (8, 256) and shapes["read_512_512"] == (512, 512)
    assert [name for name in shapes if name.startswith("decode_")] == [
        f"decode_{n}" for n in (128, 192, 256, 384, 512, 768, 1024)
    ]
    few = litert_export._shapes((8, 512), 600, (24, 128))
    assert sorted(few) == ["decode", "decode_128", "decode_24", "prefill_512", "prefill_8", "read_8_128"]


@pytest.mark.parametrize("missing", ["", "room", "folder", "memory"])
def test_where_the_weights_lie_changes_nothing(tflite, tmp_path, monkeypatch, missing):
    """In a file that is gone at once, in memory, or a copy for each call."""
    wanted = CachedModel(tflite).decode(7, 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none" if missing == "folder" else tmp_path))
    if missing in ("room", "memory"):

        def full(*_):
            raise OSError(errno.ENOSPC, "no space")

        monkeypatch.setattr(os, "posix_fallocate", full)
    if missing == "memory":
        monkeypatch.delattr(os, "memfd_create")
    paths, from_file = [], compiled_model.CompiledModel.from_file

    def load(path, options):
        paths.append(options.cpu_options.xnnpack_weight_cache_path)
        model = from_file(path, options=options)
        assert missing or os.path.getsize(paths[0]) > 10_000
        return model

    monkeypatch.setattr(compiled_model.CompiledModel, "from_file", load)
    model = CachedModel(tflite)
    assert list(tmp_path.iterdir()) == []
    assert paths[0].startswith({"": str(tmp_path), "memory": ""}.get(missing, ":memory:"))
    np.testing.assert_array_equal(model.decode(7, 0), wanted)


def test_lora_is_refused_where_weights_are_fitted(tokenizer, tmp_path):
    config = LlamaConfig(vocabulary_size=400, context_length=8, num_layers=1, num_heads=1, num_kv_heads=1,
                         dim=32, intermediate_dim=32)  # fmt: skip
    model = Llama(config)
    model(np.array([[1]]))
    model.blocks[0].attention.query.enable_lora(2)
    for kind in ("int8", "int4"):
        with pytest.raises(ValueError, match="takes no LoRA. Received: LoRA in 1 layers"):
            export_litert(model, tokenizer, tmp_path / "m.tflite", quantize=kind)


@pytest.fixture(scope="module")
def llama(tokenizer):
    """A model with what the kin of Llama differ in, as Gemma 3 and Qwen 3 have it."""
    config = LlamaConfig(
        **{
            "vocabulary_size": 400,
            "context_length": 64,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
        },
        **{"dim": 32, "head_dim": 16, "intermediate_dim": 64, "activation": "gelu_tanh", "qk_norm": True},
        **{"norm_last": True, "norm_unit_offset": True, "scale_embeddings": True, "attention_bias": True},
        **{"sliding_window": 8, "window_layers": (True, False), "local_rotary_wavelength": 100.0},
        **{"score_cap": 50.0, "logit_cap": 30.0, "tie_embeddings": True},
        rotary_scaling={"rope_type": "linear", "factor": 2.0},
    )
    return CausalLM(randomize(Llama(config)), tokenizer, GenerationConfig(max_new_tokens=12))


def test_int8_of_llama_is_as_good_as_said_or_refused(llama, tmp_path):
    widen_columns(llama.model)
    arguments = {"prefill_lengths": (8,), "cache_length": 40, "quantize": "int8"}
    with pytest.raises(ValueError, match="must not diverge from the model by more than 1e-12 nats"):
        llama.export(tmp_path / "a" / "m.tflite", largest_divergence=1e-12, **arguments)
    assert list((tmp_path / "a").iterdir()) == []
    path = llama.export(tmp_path / "b" / "m.tflite", largest_divergence=1e-12, force=True, **arguments)
    report = json.loads((path.parent / "report.json").read_text())
    assert 1e-6 < report["divergence"] < 0.05 and 0.85 < report["top1_agreement"] <= 1
    assert {kind for _, _, kind, _ in stored(path)} == {schema.TensorType.INT8}
    table = [entry for entry in stored(path) if entry[1] == 400]
    assert len(table) == 3 and len({buffer for *_, buffer in table}) == 1
    model, scales = schema.Model.GetRootAs(path.read_bytes()), {}
    for graph in map(model.Subgraphs, range(model.SubgraphsLength())):
        for tensor in map(graph.Tensors, range(graph.TensorsLength())):
            if tensor.Quantization() and tensor.Quantization().ScaleLength():
                scales.setdefault(tensor.Buffer(), []).append(tensor.Quantization()._tab.Pos)
    # Both signatures have a tensor for each matrix, but what reads ends with the last keys and values.
    assert len(scales) == 15 and sum(len(places) > 1 for places in scales.values()) == 10
    assert all(len(set(places)) == 1 for places in scales.values())
    prompt = PROMPTS[1]
    generator, wanted = Generator(path), llama.generate_tokens(prompt, 5)[0].token_ids
    assert generator.generate_ids(prompt, 1) == wanted[:1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bound"), [(None, 1e-5), ("fp16", 1e-3), ("int4", 1.0), ("int8_weights", 3e-3)]
)
def test_other_precisions_of_llama(llama, tmp_path, kind, bound):
    arguments = {"prefill_lengths": (8,), "cache_length": 40, "quantize": kind}
    path = llama.export(tmp_path / "m.tflite", largest_divergence=bound, **arguments)
    types = {entry[1] == 400: entry[2] for entry in stored(path)}
    of = schema.TensorType
    assert (
        types
        == {
            None: {True: of.FLOAT32, False: of.FLOAT32},
            "fp16": {True: of.FLOAT32, False: of.FLOAT32},  # widened by an operation before
            "int8_weights": {True: of.FLOAT32, False: of.FLOAT32},  # likewise
            "int4": {True: of.INT8, False: of.INT4},
        }[kind]
    )
    if kind is None:
        for prompt in PROMPTS:
            wanted = llama.generate_tokens(prompt, 10)[0].token_ids
            assert Generator(path).generate_ids(prompt, 10) == wanted


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
