import numpy as np
import pytest
from keras import ops
from reference.gguf_files import stored_tensors, write_gguf
from reference.weights import randomize

from kerasllm import GPT2, GPT2Config
from kerasllm.checkpoints import load_checkpoint
from kerasllm.checkpoints.gguf_file import GGUFFile
from kerasllm.checkpoints.gguf_model import huggingface_config, load_gguf
from kerasllm.checkpoints.gguf_tokenizer import tokenizer_json
from kerasllm.models import find_model_class
from kerasllm.tasks import TextEmbedder

IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
_SIZES = {
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}
_METADATA = {
    "context_length": 64,
    "block_count": 3,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500.0,
    "vocab_size": 40,
}
_GEMMA = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
_GEMMA_METADATA = {"attention.key_length": 16, "attention.value_length": 16}
# GGUF's architecture, Hugging Face's config, GGUF's further metadata.
DECODERS = {
    "llama": ("llama", {"model_type": "llama"}, {"rope.dimension_count": 8}),
    "llama, tied": ("llama", {"model_type": "llama", "tie_word_embeddings": True}, {}),
    "llama, linear": (
        "llama",
        {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "mistral": (
        "llama",
        {"model_type": "mistral", "sliding_window": 3},
        {"attention.sliding_window": 3},
    ),
    "qwen2": ("qwen2", {"model_type": "qwen2"}, {}),
    "qwen3": ("qwen3", {"model_type": "qwen3", "head_dim": 16}, _GEMMA_METADATA),
    "smollm3": ("smollm3", {"model_type": "smollm3", "no_rope_layer_interval": 4}, {}),
    "gemma": ("gemma", {"model_type": "gemma", **_GEMMA}, _GEMMA_METADATA),
    "gemma2": (
        "gemma2",
        {
            "model_type": "gemma2",
            **_GEMMA,
            "query_pre_attn_scalar": 16,
            "sliding_window": 3,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        {
            **_GEMMA_METADATA,
            "attention.sliding_window": 3,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3",
        {
            "model_type": "gemma3_text",
            **_GEMMA,
            "query_pre_attn_scalar": 16,
            "sliding_window": 3,
            "rope_local_base_freq": 10000.0,
        },
        {**_GEMMA_METADATA, "attention.sliding_window": 3},
    ),
}


def make_model(values):
    family = find_model_class(values)
    return randomize(family(family.config_class.from_huggingface(values)))


def huggingface_tensors(model):
    variables = model.variables_by_path()
    return {
        name: transform.to_tensor([ops.convert_to_numpy(variables[path]) for path in paths])
        for name, (paths, transform) in model.weight_map().items()
    }


def write_model(path, model, architecture, metadata, kinds=None, more=None):
    tensors = stored_tensors(architecture, huggingface_tensors(model), layers=3, heads=4, key_value_heads=2)
    metadata = {f"{architecture}.{key}": value for key, value in metadata.items()}
    return write_gguf(path, metadata, tensors | (more or {}), kinds, architecture)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(tmp_path, name):
    architecture, values, metadata = DECODERS[name]
    model = make_model({**_SIZES, **values})
    path = write_model(tmp_path / "x.gguf", model, architecture, {**_METADATA, **metadata})
    loaded, tokenizer, generation, _ = load_checkpoint(path)
    assert tokenizer is None and generation == {}
    assert loaded.config.huggingface_type == values["model_type"]
    np.testing.assert_allclose(loaded(IDS), model(IDS), atol=1e-5)


def test_gpt2(tmp_path):
    config = GPT2Config(vocabulary_size=40, context_length=16, num_layers=3, num_heads=4, dim=32)
    model = randomize(GPT2(config))
    metadata = {
        "context_length": 16,
        "block_count": 3,
        "embedding_length": 32,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": 1e-5,
    }
    # llama.cpp's converter writes the tied head a second time.
    embeddings = {"output.weight": ops.convert_to_numpy(model.token_embedding.embeddings)}
    for more in ({}, embeddings):
        loaded = load_gguf(write_model(tmp_path / "x.gguf", model, "gpt2", metadata, more=more)).model
        np.testing.assert_allclose(loaded(IDS), model(IDS), atol=1e-5)
        assert loaded.config.tie_embeddings == (not more)


def test_bert(tmp_path):
    values = {
        "model_type": "bert",
        "vocab_size": 40,
        "max_position_embeddings": 16,
        "type_vocab_size": 2,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "layer_norm_eps": 1e-6,
    }
    family = find_model_class(values)
    model = randomize(family(family.config_class.from_huggingface(values), head=None))
    metadata = {
        "context_length": 16,
        "block_count": 3,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": 1e-6,
        "attention.causal": False,
        "pooling_type": 2,
    }
    loaded, _, _, pooling = load_gguf(write_model(tmp_path / "x.gguf", model, "bert", metadata))
    assert loaded.head is None and pooling == "cls"
    np.testing.assert_allclose(loaded(IDS), model(IDS), atol=1e-5)
    assert TextEmbedder.from_pretrained(tmp_path / "x.gguf").pooling == "cls"
    ranker = write_model(tmp_path / "y.gguf", model, "bert", {**metadata, "pooling_type": 4})
    with pytest.raises(ValueError, match="bert.pooling_type must be one of .* Received: 4"):
        load_gguf(ranker)


def test_quantised_weights(tmp_path):
    """The model computes with what the blocks say, also in bfloat16."""
    model = make_model({**_SIZES, "model_type": "llama"})
    names = ["token_embd.weight", *(f"blk.{n}.attn_q.weight" for n in range(3)), "blk.1.ffn_down.weight"]
    path = write_model(tmp_path / "x.gguf", model, "llama", _METADATA, dict.fromkeys(names, "Q8_0"))
    loaded = load_gguf(path).model
    weights, exact = loaded.variables_by_path(), model.variables_by_path()
    for path_of_weight, weight in weights.items():
        error = np.abs(weight.numpy() - exact[path_of_weight].numpy()).max()
        is_quantised = any(
            part in path_of_weight for part in ("token_embedding", "query", "block_1/feed_forward/down")
        )
        assert (1e-4 < error < 0.02) if is_quantised else error == 0, path_of_weight
    half = load_gguf(path, dtype="bfloat16").model
    for weight, exact in zip(half.weights, loaded.weights, strict=True):
        assert weight.dtype == "bfloat16"
        np.testing.assert_allclose(weight.numpy().astype("float32"), exact.numpy(), rtol=0.01)


def test_llama3_rope(tmp_path):
    """A GGUF file has Llama 3's scaling only as the factors that follow from it."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    values = {**_SIZES, "model_type": "llama", "hidden_size": 64, "rope_theta": 500_000.0}
    model = make_model({**values, "max_position_embeddings": 131072, "rope_scaling": scaling})
    # As in convert_hf_to_gguf.py.
    factors = []
    for frequency in 1.0 / 500_000.0 ** (np.arange(0, 16, 2) / 16):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        in_between = 1 / ((1 - smooth) / 8.0 + smooth)
        factors.append(1.0 if wavelength < 8192 / 4 else 8.0 if wavelength > 8192 else in_between)
    assert len({round(factor, 3) for factor in factors}) > 2
    metadata = {**_METADATA, "embedding_length": 64, "rope.freq_base": 500_000.0, "context_length": 131072}
    rope_freqs = {"rope_freqs.weight": np.array(factors)}
    path = write_model(tmp_path / "x.gguf", model, "llama", metadata, more=rope_freqs)
    with GGUFFile(path) as file:
        assert huggingface_config(file)["rope_scaling"] == scaling
    np.testing.assert_allclose(load_gguf(path).model(IDS), model(IDS), atol=1e-5)
    rope_freqs = {"rope_freqs.weight": np.linspace(1, 8, 8)}
    path = write_model(tmp_path / "x.gguf", model, "llama", metadata, more=rope_freqs)
    with pytest.raises(ValueError, match="must be those of Llama 3's rope scaling"):
        load_gguf(path)


@pytest.fixture(scope="module")
def llama():
    return make_model({**_SIZES, "model_type": "llama"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope.scaling.type": "longrope"}, "must be none, linear or yarn"),
        ({"rope.scaling.type": [1, 2]}, "must be none, linear or yarn"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": [1, 2]}, "must be one number"),
        ({"rope.scaling.type": "linear"}, "must be one number"),
        ({"rope.freq_base": 0.0}, "must be a positive number"),
        ({"new.setting": [0, 1, 2]}, r"must be known.*llama\.new\.setting=array"),
        ({"rope.dimension_count": [8, 8, 4]}, "heads of one width"),
        ({"expert_count": 8}, r"must be known.*llama\.expert_count=8"),
        ({"rope.dimension_count": 4}, "heads of one width"),
        ({"block_count": 10**9}, "every layer"),
        ({"block_count": 2}, "Left over"),
        ({"block_count": [1, 2, 3]}, "one number for all layers"),
        ({"block_count": "3"}, "one number for all layers"),
        ({"attention.head_count": 3}, "3 heads must divide|num_heads|must be"),
        ({"feed_forward_length": 10**9}, "at most 64 wide. Received: intermediate_size=1000000000"),
        ({"feed_forward_length": 63}, "must fill .* of shape"),
    ],
    ids=str,
)
def test_metadata_that_do_not_fit(tmp_path, llama, changes, message):
    path = write_model(tmp_path / "x.gguf", llama, "llama", {**_METADATA, **changes})
    with pytest.raises(ValueError, match=message):
        load_gguf(path)


def test_incomplete_files(tmp_path, llama):
    with pytest.raises(ValueError, match="general.architecture of a GGUF file must be one of.*'mamba'"):
        load_gguf(write_gguf(tmp_path / "x.gguf", {}, {}, architecture="mamba"))
    with pytest.raises(ValueError, match="lacks block_count"):
        load_gguf(write_gguf(tmp_path / "x.gguf", {}, {}))
    tensors = stored_tensors("llama", huggingface_tensors(llama), 3, 4, 2)
    metadata = {f"llama.{key}": value for key, value in _METADATA.items()}
    with pytest.raises(ValueError, match=r"Left over: \['blk.0.what.weight'\]"):
        load_gguf(write_gguf(tmp_path / "x.gguf", metadata, tensors | {"blk.0.what.weight": np.ones(3)}))
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(ValueError, match=r"Missing: \['model.layers.1.mlp.up_proj.weight'\]"):
        load_gguf(write_gguf(tmp_path / "x.gguf", metadata, tensors))


def test_fuzz_the_translation(tmp_path):
    """Whatever the metadata say, they become a config and a tokenizer.json, or a ValueError."""
    metadata = {f"llama.{key}": value for key, value in _METADATA.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<s>", "a", "b", "ab"],
        "tokenizer.ggml.token_type": [3, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }
    tensors = {"token_embd.weight": np.ones((4, 32)), "rope_freqs.weight": np.ones(4)}
    path = write_gguf(tmp_path / "x.gguf", metadata, tensors)
    whole = np.frombuffer(path.read_bytes(), "uint8")
    rng, accepted = np.random.default_rng(0), 0
    for _ in range(2000):
        content = whole.copy()
        places = rng.integers(0, len(whole) - 600, size=rng.integers(1, 3))
        content[places] ^= 1 << rng.integers(0, 8, size=len(places), dtype="uint8")
        path.write_bytes(content.tobytes())
        try:
            with GGUFFile(path) as file:
                huggingface_config(file)
                tokenizer_json(file.metadata)
                accepted += 1
        except ValueError:
            pass
    assert 100 < accepted < 1900
