import contextlib
import math
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from kerasllm import GPT2, CausalLM, GPT2Config
from kerasllm.training.optimizer import Adafactor, AdamW, Lion, Muon, make_optimizer
from kerasllm.training.schedules import make_schedule

NAMES = ("adamw", "lion", "adafactor", "muon")
SHAPES = {
    "token_embedding/embeddings": (6, 4),
    "block_0/attention/query/kernel": (4, 4),
    "block_0/attention/query/bias": (4,),
    "block_0/feed_forward/up/kernel": (4, 7),
    "block_0/feed_forward/down/kernel": (7, 4),
    "block_0/norm/scale": (4,),
    "position_bias/embeddings": (3, 2),
    "experts": (2, 3, 4),
    "head_dense/kernel": (4, 4),
    "head_bias": (6,),
    "head/embeddings": (6, 4),
}
UNDECAYED = ("block_0/attention/query/bias", "block_0/norm/scale", "head_bias")
BY_MUON = [path for path in SHAPES if path.startswith("block_0") and path.endswith("kernel")]
# Powers of 2, which are the same in float32 and float64.
RATE, DECAY, CLIP = 2.0**-6, 0.5, 2.0


def make_variables(dtype="float32"):
    rng = np.random.default_rng(0)
    variables = []
    for path, shape in SHAPES.items():
        *scopes, name = path.split("/")
        with contextlib.ExitStack() as stack:
            for scope in scopes:
                stack.enter_context(keras.name_scope(scope))
            variables.append(keras.Variable(rng.normal(size=shape), dtype=dtype, name=name))
    return variables


def make_gradients(steps=6):
    rng = np.random.default_rng(1)
    return [
        [rng.normal(size=shape) * 10.0 ** rng.integers(-3, 1) for shape in SHAPES.values()]
        for _ in range(steps)
    ]


class Reference:
    """The papers in NumPy: one object for each weight."""

    def __init__(self, name, path, value):
        self.name, self.value = name, value
        if name == "muon" and path not in BY_MUON:
            self.name = "adamw"
        self.decay = 0.0 if path in UNDECAYED else DECAY
        self.step = 0
        self.mean, self.square = np.zeros_like(value), np.zeros_like(value)

    def update(self, gradient):
        self.step += 1
        kept = self.value * (1 - RATE * self.decay)
        self.value = kept - getattr(self, f"_{self.name}")(gradient, kept)

    def _adamw(self, g, _):
        self.mean = 0.9 * self.mean + 0.1 * g
        self.square = 0.95 * self.square + 0.05 * g**2
        root = np.sqrt(1 - 0.95**self.step)  # the epsilon is added to the root before it is corrected
        return RATE * root / (1 - 0.9**self.step) * self.mean / (np.sqrt(self.square) + 1e-8)

    def _lion(self, g, _):
        direction = np.sign(0.95 * self.mean + 0.05 * g)
        self.mean = 0.98 * self.mean + 0.02 * g
        return RATE * direction

    def _adafactor(self, g, value):
        beta = 1 - self.step**-0.8
        # The whole of it, of which the rows and columns are summed up afterwards: they are linear.
        self.square = beta * self.square + (1 - beta) * (g**2 + 1e-30)
        estimate = self.square
        if g.ndim > 1:
            rows, columns = estimate.sum(-1, keepdims=True), estimate.sum(-2, keepdims=True)
            estimate = rows * columns / estimate.sum((-2, -1), keepdims=True)
        update = g / np.sqrt(estimate)
        update /= max(1.0, np.sqrt((update**2).mean()))
        return min(RATE, self.step**-0.5) * max(1e-3, np.sqrt((value**2).mean())) * update

    def _muon(self, g, _):
        self.mean = 0.95 * self.mean + g
        x = g + 0.95 * self.mean
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):  # of the smaller side or the larger one: x x^T x is the same
            square = x.T @ x
            x = 3.4445 * x - 4.7750 * x @ square + 2.0315 * x @ square @ square
        return RATE * 0.2 * math.sqrt(max(g.shape)) * x


# Eager, in a graph, and compiled by XLA; float64 has the sharper bounds.
@pytest.mark.parametrize(
    ("jit_compile", "dtype"),
    [
        (None, "float64"),
        (True, "float32"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((None, "float32"), (False, "float32"), (False, "float64"), (True, "float64"))
        ),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_several_steps_are_as_in_numpy(name, jit_compile, dtype):
    variables = make_variables(dtype)
    optimizer = make_optimizer(name, RATE, DECAY, global_clipnorm=CLIP)
    optimizer.build(variables)
    references = [
        Reference(name, path, ops.convert_to_numpy(variable).astype("float64"))
        for path, variable in zip(SHAPES, variables, strict=True)
    ]

    def apply(*gradients):
        optimizer.apply(gradients, variables)

    if jit_compile is not None:
        apply = tf.function(apply, jit_compile=jit_compile, autograph=False)
    for gradients in make_gradients():
        apply(*[tf.constant(g, dtype) for g in gradients])
        norm = math.sqrt(sum((g**2).sum() for g in gradients))
        for reference, g in zip(references, gradients, strict=True):
            reference.update(g * min(1.0, CLIP / norm))
    # Keras rounds the decays of the means to float32, whatever the weights are.
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if dtype == "float32" else {"rtol": 1e-6, "atol": 2e-8}
    for path, variable, reference in zip(SHAPES, variables, references, strict=True):
        np.testing.assert_allclose(variable, reference.value, err_msg=path, **tolerance)


@pytest.mark.parametrize("kind", [AdamW, Lion, Adafactor, Muon])
def test_settings_survive_saving(kind):
    optimizer = kind(0.5, not_decayed=["^x$"], global_clipnorm=3.0, skip_above=7.0, skip_window=5)
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(copy) is kind
    assert copy.get_config() == optimizer.get_config()
    assert copy.not_decayed == ("^x$",)
    assert (copy.global_clipnorm, copy.skip_above, copy.skip_window) == (3.0, 7.0, 5)
    copy.build([keras.Variable([1.0], name="x"), keras.Variable([1.0], name="y")])
    assert [copy._use_weight_decay(v) for v in copy._trainable_variables] == [False, True]


def test_muon_is_for_the_matrices_inside_of_the_blocks():
    config = GPT2Config(vocabulary_size=9, num_layers=2, num_heads=2, dim=8, tie_embeddings=False)
    weights = CausalLM(GPT2(config)).trainable_weights
    optimizer = Muon()
    optimizer.build(weights)
    is_muon = [velocity is None for velocity in optimizer.adam_velocities]
    # Keras numbers the models of a process, so not the first part of a path.
    paths = [weight.path.partition("/")[2] for weight, muon in zip(weights, is_muon, strict=True) if muon]
    kernels = ("attention/query", "attention/key", "attention/value", "attention/output")
    kernels += ("feed_forward/up", "feed_forward/down")
    assert paths == [f"block_{i}/{kernel}/kernel" for i in range(2) for kernel in kernels]
    assert all(Muon(exclude_layers=["block_[01]/"])._should_use_adamw(weight) for weight in weights)


def test_adafactor_keeps_rows_and_columns():
    optimizer = Adafactor()
    optimizer.build([keras.Variable(np.zeros((50, 40))), keras.Variable(np.zeros(30))])
    assert sum(math.prod(variable.shape) for variable in optimizer.variables) == 50 + 40 + 30 + 3


def test_adafactor_survives_dead_units():
    # Keras's own makes such a matrix NaN.
    variable = keras.Variable(np.ones((3, 3)), dtype="float32")
    gradient = np.full((3, 3), 1e-2, "float32")
    gradient[0] = gradient[:, 0] = 0
    Adafactor().apply([tf.constant(gradient)], [variable])
    np.testing.assert_array_equal(ops.convert_to_numpy(variable)[0], 1)
    assert (ops.convert_to_numpy(variable)[1:, 1:] < 1).all()


def test_adafactor_takes_the_rate_of_a_schedule_as_it_is():
    moves = []
    for rate in (make_schedule("constant", 0.5, 10), 0.5):
        variable = keras.Variable([1.0])
        optimizer = Adafactor(rate)
        optimizer.build([variable])
        optimizer.iterations.assign(99)
        optimizer.apply([tf.constant([1.0])], [variable])
        moves.append(1 - float(variable[0]))
    np.testing.assert_allclose(moves, [0.5, 0.1], rtol=1e-5)


def test_make_optimizer_leaves_the_defaults():
    kinds = [type(make_optimizer(name)) for name in NAMES]
    assert kinds == [AdamW, Lion, Adafactor, Muon]
    for name, kind in zip(NAMES, kinds, strict=True):
        wanted = {**kind().get_config(), "name": None}
        assert {**make_optimizer(name).get_config(), "name": None} == wanted
    assert make_optimizer("adamw", weight_decay=0.0).weight_decay == 0.0
    assert make_optimizer("adamw", beta_2=0.5).beta_2 == 0.5
    with pytest.raises(ValueError, match=r"must be one of .*Received: name='adam'"):
        make_optimizer("adam")


def make_model():
    keras.utils.set_random_seed(0)
    return CausalLM(
        GPT2(GPT2Config(vocabulary_size=20, context_length=8, num_layers=1, num_heads=2, dim=8))
    )


def make_batches():
    ids = np.random.default_rng(0).integers(0, 20, (16, 9)).astype("int32")
    weights = np.ones((16, 8), "float32")
    return tf.data.Dataset.from_tensor_slices((ids[:, :-1], ids[:, 1:], weights)).batch(4)


# Those that keep one array for a weight go the way of AdamW, which is saved in other tests.
@pytest.mark.parametrize(
    "name",
    ["adafactor", "muon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "lion"))],
)
def test_a_model_learns_and_is_saved(name, tmp_path):
    model = make_model()
    peak = 0.2 if name == "adafactor" else 1e-2  # Adafactor's is relative to the weights, which are small
    model.compile(make_optimizer(name, make_schedule("constant", peak, 16, 2)), jit_compile=False)
    losses = model.fit(make_batches(), epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.1
    model.save(tmp_path / "model.keras")
    loaded = CausalLM.load(tmp_path / "model.keras").optimizer
    assert loaded.get_config() == model.optimizer.get_config()
    for one, two in zip(loaded.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one, two)


class Weights(keras.callbacks.Callback):
    """The weights after each batch."""

    def on_train_begin(self, logs=None):
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append([ops.convert_to_numpy(weight) for weight in self.model.trainable_weights])


def test_fit_leaves_the_moving_average_of_the_weights(tmp_path):
    model, weights = make_model(), Weights()
    optimizer = AdamW(1e-2, use_ema=True, ema_momentum=0.7)
    model.compile(optimizer, jit_compile=False)
    model.fit(make_batches(), verbose=0, callbacks=[weights])
    assert len(weights.values) == 4
    averages = [values.astype("float64") for values in weights.values[0]]
    for step in weights.values[1:]:
        averages = [0.7 * old + 0.3 * new for old, new in zip(averages, step, strict=True)]
    for final, average in zip(model.trainable_weights, averages, strict=True):
        np.testing.assert_allclose(final, average, rtol=1e-5, atol=1e-7)
    model.save(tmp_path / "model.keras")
    loaded = CausalLM.load(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == optimizer.get_config()
    for one, two in zip(
        [*loaded.trainable_weights, *loaded.optimizer.variables],
        [*model.trainable_weights, *optimizer.variables],
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)


def test_the_moving_average_replaces_the_weights_every_other_update():
    variables = make_variables("float64")
    optimizer = AdamW(
        RATE, DECAY, global_clipnorm=None, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=2
    )
    optimizer.build(variables)
    references = [
        Reference("adamw", path, ops.convert_to_numpy(variable))
        for path, variable in zip(SHAPES, variables, strict=True)
    ]
    averages = [0.0] * len(references)
    apply = tf.function(lambda *gradients: optimizer.apply(gradients, variables), jit_compile=True)
    for step, gradients in enumerate(make_gradients()):
        apply(*[tf.constant(g) for g in gradients])
        for i, (reference, g) in enumerate(zip(references, gradients, strict=True)):
            reference.update(g)
            averages[i] = reference.value if not step else 0.75 * averages[i] + 0.25 * reference.value
            if step % 2:
                reference.value = averages[i]
    for variable, average, reference in zip(
        variables, optimizer._model_variables_moving_average, references, strict=True
    ):
        np.testing.assert_allclose(variable, reference.value, rtol=1e-6, atol=2e-8)
        np.testing.assert_allclose(average, reference.value, rtol=1e-6, atol=2e-8)


def test_several_replicas_update_as_one():
    """In a process of its own, for devices can be split only before the first use of TensorFlow."""
    code = """
import sys
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
sys.path.insert(0, "tests/training")
from test_optimizer import NAMES, make_gradients, make_optimizer, make_variables

mirrored = tf.distribute.MirroredStrategy(
    ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
)
for name in NAMES:
    finals = []
    for strategy in (tf.distribute.get_strategy(), mirrored):
        with strategy.scope():
            variables = make_variables()[:4]
            optimizer = make_optimizer(name, 0.01, 0.5, use_ema=True)
            optimizer.build(variables)
        optimizer._all_reduce_sum_gradients = list  # they are the same everywhere, as in the training step
        step = lambda *gradients: optimizer.apply(gradients, variables)
        step = tf.function(lambda *gradients, step=step: strategy.run(step, gradients), autograph=False)
        for gradients in make_gradients():
            step(*[tf.constant(g, "float32") for g in gradients[:4]])
        state = [*variables, *optimizer.variables]
        copies = [strategy.experimental_local_results(v.value) for v in state]
        for copy in copies:
            np.testing.assert_array_equal(copy[0], copy[-1])
        finals.append([copy[0].numpy() for copy in copies])
    for one, two in zip(*finals, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    print(name)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == list(NAMES), result.stderr[-2000:]
