"""What tests/training/test_layouts.py runs with KERAS_BACKEND=jax and 8 devices: prints JSON."""

import json
import pathlib
import sys
import tempfile

import keras
import numpy as np
import tensorflow as tf

import kerasllm
from kerasllm.models import GPT2, T5, Bert, Llama
from kerasllm.tokenizers import train_tokenizer
from kerasllm.training import AdamW, Checkpoints, bytes_per_device, make_distribution

SIZES = {"vocabulary_size": 128, "context_length": 16, "num_layers": 1, "num_heads": 8, "dim": 64}
WIDE = {**SIZES, "intermediate_dim": 104}
TEXTS = ["the cat sat on the mat and the dog sat on the log"] * 30
PAIRS = [("the cat sat", "on the mat"), ("and the dog", "sat on the log"), ("the cat", "the dog")] * 6


def make(task, network, head, sizes):
    return task(network(network.config_class(**sizes), head))


def gpt2(**changes):
    return make(kerasllm.CausalLM, GPT2, "causal_lm", {**SIZES, "dropout": 0.1, **changes})


def shares():
    """By model and layout, the parts of the weights and of the optimizer that the fullest device holds."""
    causal, classifier = (kerasllm.CausalLM, "causal_lm"), (kerasllm.SequenceClassifier, "classifier")
    masked, seq2seq = (kerasllm.MaskedLM, "masked_lm"), (kerasllm.Seq2SeqLM, "seq2seq")
    biases = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "qk_norm": True}
    models = {
        "gpt2": (GPT2, causal, {}),
        "gpt2, untied": (GPT2, causal, {"tie_embeddings": False}),
        "gpt2, classifier": (GPT2, classifier, {}),
        "llama": (Llama, causal, {"num_kv_heads": 2, "tie_embeddings": False}),
        "llama, biases": (Llama, causal, biases),
        "llama, classifier": (Llama, classifier, {}),
        "bert": (Bert, masked, {}),
        "bert, untied": (Bert, masked, {"tie_embeddings": False}),
        "bert, classifier": (Bert, classifier, {"token_types": 2}),
        "t5": (T5, seq2seq, {"head_dim": 16}),
        "t5, gated, untied": (T5, seq2seq, {"gated": True, "tie_embeddings": False, "head_dim": 16}),
    }
    found = {name: {} for name in models}
    for shard in ("weights", "optimizer"):
        keras.distribution.set_distribution(make_distribution(shard=shard))
        for name, (network, (task, head), changes) in models.items():
            model = make(task, network, head, {**SIZES, "dim": 128, "intermediate_dim": 256, **changes})
            model.compile()
            whole = {"weights": model.variables, "optimizer": model.optimizer.variables}
            held = bytes_per_device(model)
            found[name][shard] = {
                part: held[part] / sum(variable.value.nbytes for variable in variables)
                for part, variables in whole.items()
            }
    return found


def errors():
    """By what is wrong, the text of the error."""
    found = {}

    def note(name, function):
        try:
            function()
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)

    def under(call, **layout):
        def function():
            with make_distribution(**layout).scope():
                call()

        return function

    llama = (kerasllm.CausalLM, Llama, "causal_lm")
    columns = {"data": 2, "tensor": 4}
    note("vocabulary", under(lambda: gpt2(vocabulary_size=130), **columns))
    note("wide layer", under(lambda: make(*llama, {**WIDE, "intermediate_dim": 102}), **columns))
    narrow = {**WIDE, "dim": 60, "head_dim": 8}
    note("width", under(lambda: make(*llama, narrow), shard="weights"))
    few = {**WIDE, "num_kv_heads": 2}
    note("heads", under(lambda: make(*llama, few).compile(), **columns))
    note("devices", lambda: make_distribution(data=3, tensor=2))
    note("columns", lambda: make_distribution(tensor=3))
    note("shard", lambda: make_distribution(shard="all"))
    note("unknown weight", under(lambda: keras.layers.Dense(8, name="new").build((8, 8)), data=8))

    alone = gpt2()
    note("model of no distribution", under(alone.compile, data=8))
    with make_distribution(data=8).scope():
        model = gpt2()
        model.compile()
    ids = np.ones((16, 16), "int32")
    batches = tf.data.Dataset.from_tensors((ids, ids, np.ones((16, 16), "float32")))
    note("model of another distribution", under(lambda: model.fit(batches, verbose=0), data=8))
    note("rounded weights", lambda: alone.compile(quantization_aware="int8"))
    note("rows", under(lambda: classify(ids), data=8))

    note("shared state", lambda: AdamW(shard_state=True))
    alone.compile()
    note("generate", lambda: alone.generate([[1, 2]], 3))
    tokenizer = train_tokenizer("word", TEXTS)
    note("export", lambda: kerasllm.CausalLM(alone.model, tokenizer).export("nowhere"))
    embedder = kerasllm.TextEmbedder(GPT2(GPT2.config_class(**SIZES), None), tokenizer)
    note("embed", lambda: embedder.encode(["the cat"]))
    return found


def classify(ids):
    model = make(kerasllm.SequenceClassifier, GPT2, "classifier", SIZES)
    model.fit(tf.data.Dataset.from_tensors((ids[:12], ids[:12, 0] % 2)), verbose=0)


def texts():
    """What training on texts gives, divided among all devices."""
    keras.distribution.set_distribution(make_distribution(data=4, tensor=2, shard="weights"))
    tokenizer = train_tokenizer("word", TEXTS)

    def train(epochs, seed=1, model=None):
        if model is None:
            keras.utils.set_random_seed(0)
            network = GPT2(GPT2.config_class(**{**SIZES, "dropout": 0.2}))
            model = kerasllm.CausalLM(network, tokenizer)
            model.compile(AdamW(1e-2), seed=seed)
        # Batches of 12 rows, of which the last has 4.
        history = model.fit(TEXTS, batch_size=12, epochs=epochs, shuffle=False, verbose=0).history
        return model, history["loss"]

    model, losses = train(2)
    values = model.evaluate(TEXTS, batch_size=12, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.keras")
        half, first = train(1)
        half.save(path)
        _, second = train(1, model=kerasllm.CausalLM.load(path))
    _, others = train(1, seed=2)

    network = T5(T5.config_class(**{**WIDE, "head_dim": 8}))
    seq2seq = kerasllm.Seq2SeqLM(network, tokenizer)
    seq2seq.compile(AdamW(3e-3))
    history = seq2seq.fit(PAIRS, batch_size=10, epochs=2, verbose=0).history["loss"]
    return {
        "causal_lm": {
            "first": losses[0],
            "last": losses[-1],
            "perplexity_error": abs(values["perplexity"] / np.exp(values["loss"]) - 1),
        },
        "seq2seq_lm": {"first": history[0], "last": history[-1]},
        "resumed_error": abs(first[0] - losses[0]) + abs(second[0] - losses[1]),
        "seed_difference": abs(others[0] - losses[0]),
    }


class StopAfter(keras.callbacks.Callback):
    """Ends a training as a kill would: nothing is called after it."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_train_batch_end(self, batch, logs=None):
        self.batches -= 1
        if not self.batches:
            raise KeyboardInterrupt


def checkpoints():
    """How far trainings that were interrupted are from one that was not, by layout before and after."""
    tokenizer = train_tokenizer("word", TEXTS)

    def train(layout, folder=None, stop=None):
        keras.utils.set_random_seed(0)
        keras.distribution.set_distribution(None if layout is None else make_distribution(**layout))
        model = kerasllm.CausalLM(GPT2(GPT2.config_class(**{**SIZES, "dropout": 0.2})), tokenizer)
        model.compile(AdamW(1e-2, epsilon=1e-3, skip_above=1.5, skip_window=2), microbatches=2)
        callbacks = [] if folder is None else [Checkpoints(folder, every_steps=1)]
        callbacks += [StopAfter(stop)] if stop else []
        try:
            losses = model.fit(
                TEXTS, batch_size=8, sequence_length=8, epochs=2, callbacks=callbacks, verbose=0
            ).history["loss"]
        except KeyboardInterrupt:
            losses = None
        return [each.numpy() for each in (*model.variables, *model.optimizer.variables)], losses

    layouts = {"one": None, "divided": {"data": 4, "tensor": 2, "shard": "weights"}}
    found = {}
    for before, after, stop in (("one", "one", 3), ("divided", "divided", 7), ("divided", "one", 7)):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
            train(layouts[before], folder, stop)
            got, losses = train(layouts[after], folder)
            want, all_losses = train(layouts[after], other)
        errors = [np.abs(a.astype("float64") - b).max() for a, b in zip(got, want, strict=True)]
        found[f"{before}, {after}"] = float(max(*errors, abs(losses[-1] - all_losses[-1])))
    return found


if __name__ == "__main__":
    print(
        json.dumps(
            {"shares": shares, "errors": errors, "texts": texts, "checkpoints": checkpoints}[sys.argv[1]]()
        )
    )
