"""Training on the JAX backend. Keras's backend is chosen when it is imported: each test is a process."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import pytest

from kerasllm.training import bytes_per_device, make_distribution

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "check_layouts"
SCRIPT = pathlib.Path(__file__).parent / "on_jax.py"


def run_on_jax(name, cache):
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    # What is trained several times is compiled once.
    environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    environment["JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    result = subprocess.run([sys.executable, SCRIPT, name], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def check(*arguments):
    result = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal to one device" in result.stdout


def test_tensorflow_has_no_layouts():
    with pytest.raises(ValueError, match="need the JAX backend"):
        make_distribution()
    with pytest.raises(ValueError, match="needs the JAX backend"):
        bytes_per_device(keras.Sequential([keras.layers.Dense(1)]))


@pytest.mark.reference
def test_divided_training_equals_tensorflow_and_one_device():
    check("--models", "llama", "microbatches", "bfloat16", "--layouts", "tensor 2, weights")


@pytest.mark.reference
def test_every_weight_of_every_family_is_divided(tmp_path):
    shares = run_on_jax("shares", tmp_path)
    assert len(shares) == 11
    for name, share in shares.items():
        assert share["weights"]["weights"] < 0.15, name
        assert share["weights"]["optimizer"] < 0.15, name
        assert share["optimizer"]["weights"] == 1, name
        assert share["optimizer"]["optimizer"] < 0.15, name


@pytest.mark.reference
def test_what_does_not_fit_is_refused(tmp_path):
    errors = run_on_jax("errors", tmp_path)
    expected = {
        "vocabulary": "token_embedding/embeddings of shape (130, 64), tensor=4",
        "wide layer": "gate/kernel of shape (64, 102), tensor=4",
        "width": "token_embedding/embeddings of shape (128, 60), data=8",
        "heads": "num_heads=8, num_kv_heads=2, tensor=4",
        "devices": "`data` times `tensor` must be the number of devices, 8. Received: data=3, tensor=2",
        "columns": "`tensor` must divide the number of devices, 8. Received: tensor=3",
        "shard": "`shard` must be one of",
        "unknown weight": "A weight must have a layout",
        "model of no distribution": "A model must be made, compiled and trained under the same distri",
        "model of another distribution": "A model must be made, compiled and trained under the same distri",
        "rows": "The rows of a batch must be a multiple of the devices that they are divided among",
        "rounded weights": "`quantization_aware` needs the TensorFlow backend",
        "shared state": "on JAX use `make_distribution(shard=",
        "generate": "Generating text needs the TensorFlow backend",
        "embed": "Reading texts needs the TensorFlow backend",
        "export": "An export needs the TensorFlow backend",
    }
    assert set(errors) == set(expected)
    for name, text in expected.items():
        assert text in errors[name], (name, errors[name])


@pytest.mark.reference
def test_texts_train_and_are_saved(tmp_path):
    facts = run_on_jax("texts", tmp_path)
    assert facts["causal_lm"]["last"] < 0.9 * facts["causal_lm"]["first"]
    assert facts["causal_lm"]["perplexity_error"] < 1e-4
    assert facts["seq2seq_lm"]["last"] < facts["seq2seq_lm"]["first"]
    # The same optimizer and masks after a restart; other masks with another seed.
    assert facts["resumed_error"] < 1e-5
    assert facts["seed_difference"] > 1e-4


@pytest.mark.reference
def test_an_interrupted_training_is_the_uninterrupted_one(tmp_path):
    errors = run_on_jax("checkpoints", tmp_path)
    assert errors.pop("divided, one") < 1e-3  # the steps before have sums in another order
    assert errors == {"one, one": 0, "divided, divided": 0}


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything():
    check()
