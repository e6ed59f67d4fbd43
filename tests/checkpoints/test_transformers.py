"""What one library writes, the other loads: same ids, logits and greedy tokens."""

import json
import re

import numpy as np
import pytest
from reference.assets import asset
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch", reason="needs pip install 'kerasllm[reference]'")
transformers = pytest.importorskip("transformers", reason="needs pip install 'kerasllm[reference]'")

from kerasllm.checkpoints import load_checkpoint, save_folder  # noqa: E402

IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
_DECODER = {
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GEMMA = {**_DECODER, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 3, "pad_token_id": 0}
_ENCODER = {
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
}
_T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
CONFIGS = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 40, "n_positions": 32, "n_layer": 2, "n_head": 4, "n_embd": 32},
    ),
    "llama": ("LlamaForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {**_DECODER, "sliding_window": 3}),
    "qwen2": ("Qwen2ForCausalLM", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", {**_DECODER, "head_dim": 16}),
    "smollm3": ("SmolLM3ForCausalLM", _DECODER),
    "gemma": ("GemmaForCausalLM", {**_DECODER, "head_dim": 16, "pad_token_id": 0}),
    "gemma2": ("Gemma2ForCausalLM", _GEMMA),
    "gemma3": ("Gemma3ForCausalLM", _GEMMA),
    "bert": ("BertForMaskedLM", _ENCODER),
    "bert, bare": ("BertModel", _ENCODER),
    "roberta": ("RobertaForMaskedLM", {**_ENCODER, "pad_token_id": 1}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {
            "vocab_size": 40,
            "max_position_embeddings": 32,
            "n_layers": 2,
            "n_heads": 4,
            "dim": 32,
            "hidden_dim": 48,
        },
    ),
    "t5": ("T5ForConditionalGeneration", _T5),
    "t5, gated": (
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}


def make_theirs(name):
    """A model of transformers with large random weights."""
    architecture, settings = CONFIGS[name]
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings)).eval()
    if name == "t5, gated":  # transformers 5 makes it tied until it loads a file in which it is not
        model.lm_head.weight = torch.nn.Parameter(torch.empty(40, 32))
    with torch.no_grad():
        for path, weight in model.named_parameters():
            gain = weight.dim() == 1 and path.endswith("weight")
            weight.copy_(float(gain) + (0.2 if gain else 0.3) * torch.randn(weight.shape))
    return model


def their_output(model):
    ids = torch.tensor(IDS)
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        output = model(ids, attention_mask=torch.ones_like(ids), **more)
    return (output.logits if "logits" in output else output.last_hidden_state).numpy()


def our_output(model):
    if not hasattr(model, "make_memory_cache"):
        return np.asarray(model(IDS))
    memory = model.encode(IDS, np.ones_like(IDS))
    caches = {"memory_cache": model.make_memory_cache(memory), "memory_mask": np.ones_like(IDS)}
    return np.asarray(model(IDS[:, :4], **caches))


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name, tmp_path):
    theirs = make_theirs(name)
    expected = their_output(theirs)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    ours = load_checkpoint(tmp_path / "theirs").model
    np.testing.assert_allclose(our_output(ours), expected, atol=1e-4)

    save_folder(tmp_path / "ours", ours, max_shard_size="20KB")
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    # The pooler of a bare BERT is not among our weights.
    lacking = {key for key in report["missing_keys"] if "pooler" not in key}
    assert not lacking and not report["unexpected_keys"] and not report["mismatched_keys"]
    np.testing.assert_allclose(their_output(again.eval()), expected, atol=1e-5)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == [type(theirs).__name__]
    assert config["model_type"] == theirs.config.model_type


@pytest.mark.parametrize("spelling", ["language_model.model.", "model.language_model."])
def test_text_part_of_a_model_that_reads_images(spelling, tmp_path):
    """Gemma 3's larger checkpoints are such; of old their tensors were called otherwise."""
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = make_theirs("gemma3")
    settings = {"image_token_index": 39, "boi_token_index": 38, "eoi_token_index": 37}
    config = transformers.Gemma3Config(text_config=text.config, vision_config=vision, **settings)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.model.language_model.load_state_dict(text.model.state_dict())
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {re.sub(r"^language_model\.model\.", spelling, name): tensors[name] for name in tensors}
    assert renamed.keys() != tensors.keys() or spelling == "language_model.model."
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="Only the language model is loaded, 'gemma3_text'"):
        ours = load_checkpoint(tmp_path).model
    np.testing.assert_allclose(our_output(ours), their_output(text), atol=1e-4)


def test_half_precision(tmp_path):
    make_theirs("llama").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    ours = load_checkpoint(tmp_path / "theirs", dtype="bfloat16").model
    save_folder(tmp_path / "ours", ours)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == torch.bfloat16
    exact = dict(make_theirs("llama").to(torch.bfloat16).named_parameters())
    for name, weight in again.named_parameters():
        assert torch.equal(weight, exact[name]), name


def test_same_ids_logits_and_greedy_tokens(causal_lm, tmp_path):
    causal_lm.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt = "Once upon a time there was a dog"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0].tolist() == causal_lm.tokenizer.encode(prompt)
    with torch.no_grad():
        np.testing.assert_allclose(causal_lm(ids.numpy()), model(ids).logits.numpy(), atol=1e-4)
    new = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    ours = causal_lm.generate_tokens(prompt, 20)[0].token_ids
    assert ours == [token for token in new if token != causal_lm.tokenizer.eos_id]


@pytest.mark.parametrize("changes", [{"use_bias": False}, {"tie_embeddings": False}], ids=str)
def test_variants(changes, tmp_path):
    from kerasllm import GPT2, CausalLM, GPT2Config

    config = {"vocabulary_size": 30, "context_length": 8, "num_layers": 2, "num_heads": 2, "dim": 8}
    ours = CausalLM(GPT2(GPT2Config(**config, **changes)))
    rng = np.random.default_rng(0)
    for weight in ours.weights:
        weight.assign(0.5 * rng.normal(size=weight.shape))
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = np.arange(8)[None]
    with torch.no_grad():
        np.testing.assert_allclose(ours(ids), theirs(torch.tensor(ids)).logits.numpy(), atol=1e-4)


# A real model


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("accelerate", reason="transformers needs it for GGUF files")
    return asset("smollm2")


def test_quantised_smollm2(smollm2):
    ours = load_checkpoint(smollm2)
    ids = ours.tokenizer.encode("The capital of France is")
    for _ in range(4):
        logits = np.asarray(ours.model(np.array([ids])))
        ids.append(int(logits[0, -1].argmax()))
    assert ours.tokenizer.decode(ids).startswith("The capital of France is Paris.")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(ours.model(np.array([ids])), expected, atol=1e-3)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    # transformers leaves out that the published tokenizer cuts numbers into digits.
    text = "Call me Ishmael. Some years ago—never mind how long <|im_end|>\n\n  def f(x):\treturn 'naïve'"
    expected = their_tokenizer(text)["input_ids"]
    assert ours.tokenizer.encode(text, parse_special=True) == expected
    assert ours.tokenizer.decode(ours.tokenizer.encode("12")) == "12"
    assert len(ours.tokenizer.encode("12")) == 2
    chat = [{"role": "user", "content": "Hi"}]
    assert ours.tokenizer.render_chat(chat) == their_tokenizer.apply_chat_template(chat, tokenize=False)
