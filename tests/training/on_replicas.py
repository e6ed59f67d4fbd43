"""What tests/training/test_replicas.py runs with replicas in one process: prints JSON."""

import json
import pathlib
import sys
import tempfile

import keras
import numpy as np
import tensorflow as tf

from kerasllm import GPT2, CausalLM, GPT2Config
from kerasllm.training import AdamW, Checkpoints

BATCHES, EPOCHS = 3, 2


def make_batches():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 20, (8 * BATCHES, 7)).astype("int32")
    weights = (rng.random((8 * BATCHES, 6)) < 0.8).astype("float32")
    return tf.data.Dataset.from_tensor_slices((ids[:, :-1], ids[:, 1:], weights)).batch(8)


class StopAt(keras.callbacks.Callback):
    """Ends a training after an update as a kill would: nothing is called after it."""

    def __init__(self, checkpoints, step):
        super().__init__()
        self.checkpoints, self.step = checkpoints, step

    def on_train_batch_end(self, batch, logs=None):
        if self.checkpoints.position.step == self.step:
            raise KeyboardInterrupt


def train(
    replicas, is_sharded, folder=None, stop=None, dtype="float64", quantization_aware=None, **options
):
    """Trains, from a save in the folder on if there is one; returns the model and the epochs' losses."""
    strategy = tf.distribute.get_strategy()
    if replicas > 1:
        devices = [f"/cpu:{number}" for number in range(replicas)]
        # Several strategies follow each other here, which collective operations do not survive.
        reduction = tf.distribute.ReductionToOneDevice()
        strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction)
    keras.config.set_floatx("float64" if dtype == "float64" else "float32")
    keras.utils.set_random_seed(0)
    sizes = {"vocabulary_size": 20, "context_length": 6, "num_layers": 1, "num_heads": 1, "dim": 6}
    with strategy.scope():
        model = CausalLM(GPT2(GPT2Config(**sizes, dropout=0.2), dtype=dtype))
        # A large epsilon, for Adam blows the rounding of a gradient of zero up.
        options = {"epsilon": 1e-3, "global_clipnorm": 0.5, "weight_decay": 0.3, **options}
        optimizer = AdamW(1e-2, shard_state=is_sharded, **options)
        # Eager, for tracing costs more than these few steps.
        quantized = {"quantization_aware": quantization_aware}
        model.compile(optimizer, microbatches=2, run_eagerly=True, **quantized)
    callbacks = []
    if folder is not None:
        callbacks = [checkpoints := Checkpoints(folder, every_steps=1)]
        callbacks += [StopAt(checkpoints, stop)] if stop else []
    try:
        history = model.fit(make_batches(), epochs=EPOCHS, callbacks=callbacks, verbose=0).history
    except KeyboardInterrupt:
        return model, None
    return model, history["loss"]


def state(model):
    """The weights and what the optimizer keeps of them."""
    slots = [variable for variable in model.optimizer.variables if len(variable.shape)]
    return [variable.numpy() for variable in [*model.weights, *slots]]


def difference(ours, theirs):
    values = zip(state(ours), state(theirs), strict=True)
    return max(float(np.abs(a.astype("float64") - b.astype("float64")).max()) for a, b in values)


def sharded():
    """By settings, how far two and four replicas that share its state are from one replica."""
    cases = {
        "usual": {},
        "amsgrad": {"amsgrad": True},
        "averages": {"use_ema": True, "ema_momentum": 0.5},
        "guarded": {"skip_above": 1.01, "skip_window": 2},
        "half": {"dtype": "mixed_float16"},
    }
    found = {}
    for name, options in cases.items():
        one, _ = train(1, False, **options)
        for replicas in (2, 4) if name == "usual" else (2,):
            found[f"{name}, {replicas}"] = difference(train(replicas, True, **options)[0], one)
        if name == "guarded":
            found["skipped"] = int(one.optimizer.skipped_updates.numpy())
    return found


def parts():
    """The bytes of what an optimizer keeps of the weights, on one replica of four and as a whole."""
    model, _ = train(4, True)
    slots = [variable for variable in model.optimizer.variables if len(variable.shape)]
    held = [sum(slot.value.values[number].numpy().nbytes for slot in slots) for number in range(4)]
    whole = sum(slot.numpy().nbytes for slot in slots)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.keras")
        model.save(path)
        loaded = CausalLM.load(path)
    return {"held": held, "whole": whole, "values": len(slots), "loaded": difference(loaded, model)}


def rounded():
    """How far two replicas that train for weights of 8 bits are from one, and from exact weights."""
    options = {"dtype": "float32", "quantization_aware": "int8"}
    one, losses = train(1, False, **options)
    two, others = train(2, False, **options)
    copies = [[copy.numpy() for copy in weight.value.values] for weight in two.model.weights]
    exact, _ = train(1, False, dtype="float32")
    for model in (one, two):
        model.round_weights()
    return {
        "weights": difference(two, one),
        "losses": max(abs(a - b) for a, b in zip(losses, others, strict=True)),
        "copies": max(float(np.abs(a - b).max()) for a, b in copies),
        "exact": difference(exact, one),
    }


def resumed():
    """How far a training that goes on with other replicas is from one that was never interrupted."""
    return go_on({"2 shared, 1, 4": [(2, True, 2), (1, False, 4), (4, False, None)]})


def resumed_otherwise():
    """The same of more trainings, and of one that goes on with the same replicas."""
    stretches = {
        "2, 4 shared, 1": [(2, False, 2), (4, True, 4), (1, False, None)],
        "1, 4, 2 shared": [(1, False, 1), (4, False, 3), (2, True, None)],
    }
    found = go_on(stretches)
    shared, _ = train(2, True)
    with tempfile.TemporaryDirectory() as folder:
        train(2, True, folder, 2)
        found["to the bit"] = difference(train(2, True, folder)[0], shared)
    return found


def go_on(trainings):
    straight, losses = train(1, False)
    found = {}
    for name, stretches in trainings.items():
        with tempfile.TemporaryDirectory() as folder:
            for replicas, is_sharded, stop in stretches:
                model, got = train(replicas, is_sharded, folder, stop)
        errors = [abs(a - b) for a, b in zip(got, losses[-len(got) :], strict=True)]
        found[name] = max(difference(model, straight), *errors)
    return found


if __name__ == "__main__":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
    print(json.dumps({name: globals()[name]() for name in sys.argv[1:]}))
