"""Speed: what is counted as tokens, and as floating-point operations."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasllm import GPT2, T5, Bert, BertConfig, CausalLM, GPT2Config, Llama, LlamaConfig, T5Config
from kerasllm.training import Throughput, TrainingProgress, training_flops


def make_model():
    config = GPT2Config(vocabulary_size=20, context_length=8, num_layers=1, num_heads=2, dim=8)
    model = CausalLM(GPT2(config))
    model.compile(jit_compile=False)
    return model


def make_batches(count=6):
    """Batches of 2 rows of 8 tokens; the weights of batch i leave 16 - i of them."""
    weights = np.ones((count, 16), "float32")
    for number in range(count):
        weights[number, : number + 1] = 0
    ids = np.ones((count, 2, 8), "int32")
    return tf.data.Dataset.from_tensor_slices((ids, ids, weights.reshape(count, 2, 8)))


class Seen(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.batches = []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(dict(logs))


def test_tokens_that_count_are_counted_in_plain_fit():
    throughput, seen = Throughput(), Seen()
    history = make_model().fit(make_batches(), epochs=2, callbacks=[throughput, seen], verbose=0).history
    assert throughput.tokens == 2 * sum(16 - 1 - number for number in range(6))
    assert "tokens_per_second" not in seen.batches[0]  # the compiler's time
    assert all(logs["tokens_per_second"] > 0 and "mfu" not in logs for logs in seen.batches[1:])
    assert len(history["tokens_per_second"]) == 2 and throughput.mfu is None


def test_time_between_steps_is_none_of_the_trainings(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    throughput = Throughput(tokens_per_step=100, flops_per_step=5e3, peak_flops=1e5)
    throughput.set_model(make_model())
    throughput.on_train_begin()
    throughput.on_epoch_begin(0)
    logs = {}
    for batch, seconds in enumerate((60.0, 0.5, 0.3)):
        throughput.on_train_batch_begin(batch)
        now[0] += seconds
        throughput.on_train_batch_end(batch, logs)
        now[0] += 7.0  # a validation, say
    assert throughput.tokens_per_second == pytest.approx(200 / 0.8)
    assert throughput.seconds_per_step == pytest.approx(0.4)
    assert logs["mfu"] == throughput.mfu == pytest.approx(2 * 5e3 / 0.8 / 1e5)
    epoch = {}
    throughput.on_epoch_end(0, epoch)
    assert epoch == logs


def test_matrices_and_attention_make_the_flops_of_gpt2():
    config = GPT2Config(vocabulary_size=50, context_length=16, num_layers=3, num_heads=2, dim=12)
    weights = 3 * 12 * 12 * 12 + 50 * 12  # 12 squares of the width per block, and the tied head
    assert training_flops(GPT2(config), 10) == 10 * (6 * weights + 12 * 3 * 12 * 10)
    # It is linear in the rest, but for the attention.
    assert training_flops(GPT2(config, head=None), 10) == 10 * (6 * (weights - 600) + 12 * 3 * 12 * 10)


def test_flops_of_the_other_families():
    llama = Llama(
        LlamaConfig(
            vocabulary_size=50, context_length=16, num_layers=2, num_heads=4, num_kv_heads=2, dim=8,
            head_dim=6, intermediate_dim=20,
        )
    )  # fmt: skip
    block = 8 * 24 * 2 + 8 * 12 * 2 + 3 * 8 * 20  # queries and output, keys and values, the gated network
    assert training_flops(llama, 4) == 4 * (6 * (2 * block + 50 * 8) + 12 * 2 * 24 * 4)
    bert = Bert(
        BertConfig(
            vocabulary_size=50, context_length=16, num_layers=2, num_heads=2, dim=8, intermediate_dim=20
        )
    )
    weights = 2 * (4 * 64 + 2 * 160) + 64 + 400  # the head has a matrix of its own
    assert training_flops(bert, 16) == 16 * (6 * weights + 12 * 2 * 8 * 16)
    t5 = T5(
        T5Config(
            vocabulary_size=50, num_layers=2, num_decoder_layers=1, num_heads=2, dim=8, head_dim=3,
            intermediate_dim=20, tie_embeddings=False,
        )
    )  # fmt: skip
    source = 2 * (4 * 8 * 6 + 2 * 160) + 2 * 8 * 6  # keys and values of the memory are made of the source
    target = (4 + 2) * 8 * 6 + 2 * 160 + 50 * 8
    expected = 7 * (6 * source + 12 * 2 * 6 * 7) + 4 * (6 * target + 12 * 1 * 6 * (4 + 7))
    assert training_flops(t5, 4, 7) == expected
    with pytest.raises(ValueError, match="needed there. Received: source_length=None"):
        training_flops(t5, 4)
    with pytest.raises(ValueError, match="Received: source_length=3 for a model with the head 'masked_lm'"):
        training_flops(bert, 4, 3)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="Received: tokens_per_step=0"):
        Throughput(tokens_per_step=0)
    with pytest.raises(ValueError, match="needs `flops_per_step`"):
        Throughput(tokens_per_step=3, peak_flops=1e12)
    with pytest.raises(ValueError, match="needs `flops_per_step`"):
        TrainingProgress(3, 3, peak_flops=1e12)
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="must be given for a model whose loss counts no tokens"):
        model.fit(np.ones((2, 1)), np.ones((2, 1)), callbacks=[Throughput()], verbose=0)
    history = model.fit(
        np.ones((6, 1)), np.ones((6, 1)), batch_size=2, callbacks=[Throughput(5)], verbose=0
    ).history
    assert history["tokens_per_second"][0] > 0
