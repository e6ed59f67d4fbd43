"""The public names, written by hand here too: a change of them is a decision, not an accident."""

import inspect
import re
import subprocess
import sys

import pytest

import kerasllm
import kerasllm.layers

NAMES = [
    "GPT2",
    "T5",
    "Bert",
    "BertConfig",
    "CausalLM",
    "Completion",
    "GPT2Config",
    "GenerationConfig",
    "Llama",
    "LlamaConfig",
    "MaskedLM",
    "Seq2SeqLM",
    "SequenceClassifier",
    "T5Config",
    "TextEmbedder",
    "Tokenizer",
    "__version__",
    "pipeline",
    "train_tokenizer",
]
LAYERS = [
    "CausalSelfAttention",
    "DecoderBlock",
    "EncoderBlock",
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm",
    "LearnedPositionEmbedding",
    "MultiHeadAttention",
    "RMSNorm",
    "RelativePositionBias",
    "RotaryEmbedding",
    "SelfAttention",
    "SimplifiedSelfAttention",
    "SinusoidalPositionEncoding",
    "TokenEmbedding",
]


def test_names():
    assert kerasllm.__all__ == NAMES
    assert kerasllm.layers.__all__ == LAYERS
    assert all(hasattr(kerasllm, name) for name in NAMES)


@pytest.mark.parametrize("module", [kerasllm, kerasllm.layers], ids=lambda module: module.__name__)
def test_public_names_are_documented(module):
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name
            signature = inspect.signature(value if inspect.isfunction(value) else value.__init__)
            parameters = [
                p
                for p in signature.parameters.values()
                if p.name != "self" and p.kind is p.POSITIONAL_OR_KEYWORD
            ]
            undocumented = [
                p.name for p in parameters if not re.search(rf"^ +{p.name}:", value.__doc__, re.MULTILINE)
            ]
            assert not undocumented or "As in `DecoderBlock`" in value.__doc__, (name, undocumented)
            assert all(p.annotation is not p.empty for p in parameters), name


def test_import_leaves_servers_and_text_ops_alone():
    code = (
        "import sys, kerasllm; "
        "heavy = ('tensorflow_text', 'grpc', 'kerasllm_serving', 'uvicorn', 'llguidance', 'keras_hub', "
        "'torch', 'transformers'); print([m for m in heavy if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
