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


def in_new_process(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_import_leaves_servers_and_text_ops_alone():
    printed = in_new_process(
        "import sys; from kerasllm import CausalLM; "
        "heavy = ('tensorflow_text', 'grpc', 'kerasllm_serving', 'uvicorn', 'llguidance', 'keras_hub', "
        "'torch', 'transformers'); print([m for m in heavy if m in sys.modules])"
    )
    assert printed == "[]"


def test_what_runs_exports_leaves_tensorflow_alone():
    printed = in_new_process(
        "import sys, kerasllm, kerasllm.litert, kerasllm.litertlm, kerasllm.cli; "
        "print([m for m in ('tensorflow', 'keras', 'jax', 'torch') if m in sys.modules])"
    )
    assert printed == "[]"


def test_names_are_there_when_they_are_asked_for():
    """Keras too knows the layers at once, where it was imported before."""
    code = "import kerasllm; print(kerasllm.Llama, kerasllm.export.Batching, 'T5' in dir(kerasllm))"
    printed = in_new_process(
        f"{code}; print(hasattr(kerasllm, 'Lama'), hasattr(kerasllm, '_Llama'))"
    ).split("\n")
    assert "models.llama.Llama" in printed[0] and "Batching" in printed[0] and printed[0].endswith("True")
    assert printed[1] == "False False"
    code = "import keras, kerasllm; print(keras.saving.get_registered_object('kerasllm>Llama'))"
    assert "models.llama.Llama" in in_new_process(code)
