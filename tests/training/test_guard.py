import math
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from kerasllm import GPT2, CausalLM, GPT2Config
from kerasllm.training.optimizer import AdamW, make_optimizer

NAMES = ("adamw", "lion", "adafactor", "muon")


def state(optimizer, variables):
    """The weights and all of the optimizer but what the guard itself notes."""
    guards = ("gradient_norm", "skipped_updates", "norms", "norm_count")
    kept = [v for v in optimizer.variables if v.name not in guards]
    return [ops.convert_to_numpy(v) for v in (*variables, *kept)]


def make_model():
    keras.utils.set_random_seed(0)
    return CausalLM(
        GPT2(GPT2Config(vocabulary_size=20, context_length=8, num_layers=1, num_heads=2, dim=8))
    )


def make_batches(rows=16, seed=0):
    ids = np.random.default_rng(seed).integers(0, 20, (rows, 9)).astype("int32")
    weights = np.ones((rows, 8), "float32")
    return tf.data.Dataset.from_tensor_slices((ids[:, :-1], ids[:, 1:], weights)).batch(4)


def values(model):
    return [ops.convert_to_numpy(weight) for weight in model.trainable_weights]


def make_variables(dtype="float32"):
    return [keras.Variable([[1.0, 2.0], [3.0, 4.0]], dtype=dtype), keras.Variable([5.0], dtype=dtype)]


def compile_apply(optimizer, variables, jit_compile):
    """A function that takes the norm that the gradients are to have."""

    def apply(norm):
        part = tf.cast(norm, variables[0].dtype) / math.sqrt(5)
        optimizer.apply([tf.fill(v.shape, part) for v in variables], variables)

    if jit_compile is None:
        return apply
    return tf.function(apply, jit_compile=jit_compile, autograph=False)


@pytest.mark.parametrize(
    ("name", "jit_compile", "dtype"),
    [
        *[(name, True, "float32") for name in NAMES],
        ("adamw", False, "float32"),
        ("adamw", None, "float32"),
        ("adamw", True, "float64"),
    ],
)
def test_spikes_and_what_is_not_finite_leave_everything_as_it_was(name, jit_compile, dtype):
    variables = make_variables(dtype)
    optimizer = make_optimizer(name, 0.1, skip_above=4.0, skip_window=3, use_ema=True, global_clipnorm=1.0)
    optimizer.build(variables)
    apply = compile_apply(optimizer, variables, jit_compile)
    # The norm, and whether it updates; the median is that of the three finite ones before.
    steps = [(100.0, True), (math.nan, False), (1.0, True), (math.inf, False), (900.0, True)]
    steps += [(399.0, True), (1600.0, False), (3601.0, False), (6402.0, False), (3605.0, True)]
    updates = 0
    for number, (norm, is_good) in enumerate(steps):
        before = state(optimizer, variables)
        apply(tf.constant(norm))
        updates += is_good
        after = state(optimizer, variables)
        if not is_good:
            for old, new in zip(before, after, strict=True):
                np.testing.assert_array_equal(old, new)
        else:
            assert (before[0] != after[0]).all()
        np.testing.assert_allclose(optimizer.gradient_norm, norm, rtol=1e-5)
        assert int(optimizer.iterations) == updates
        assert int(optimizer.skipped_updates) == number + 1 - updates


def test_what_is_left_out_might_as_well_not_have_been():
    finals = []
    for norms, settings in (
        ([1.0, 2.0, math.nan, 3.0, math.inf, 2.0], {"skip_above": math.inf}),
        ([1.0, 2.0, 3.0, 2.0], {}),
    ):
        variables = make_variables()
        optimizer = AdamW(0.1, **settings)
        apply = compile_apply(optimizer, variables, None)
        for norm in norms:
            apply(norm)
        finals.append([ops.convert_to_numpy(v) for v in variables])
    for one, two in zip(*finals, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_inside_of_a_loss_scale_the_norm_is_that_of_the_loss(jit_compile):
    variables = make_variables()
    inner = AdamW(0.1, skip_above=4.0, skip_window=1)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    optimizer.build(variables)
    apply = compile_apply(optimizer, variables, jit_compile)
    for norm, seen, updates, skipped, scale in (
        (80.0, 10.0, 1, 0, 8.0),
        (math.inf, 10.0, 1, 0, 4.0),  # the loss scale's own matter
        (159.0, 39.75, 2, 0, 4.0),
        (800.0, 200.0, 2, 1, 4.0),
    ):
        apply(tf.constant(norm))
        np.testing.assert_allclose(inner.gradient_norm, seen, rtol=1e-5)
        assert (int(optimizer.iterations), int(inner.skipped_updates)) == (updates, skipped)
        np.testing.assert_allclose(optimizer.dynamic_scale, scale)


def test_a_fixed_loss_scale_is_taken_off():
    variables = make_variables()
    optimizer = AdamW(0.1, skip_above=4.0, loss_scale_factor=16.0)
    compile_apply(optimizer, variables, None)(32.0)
    np.testing.assert_allclose(optimizer.gradient_norm, 2.0, rtol=1e-5)


def test_the_guard_goes_on_from_a_keras_file(tmp_path):
    model = make_model()
    model.compile(AdamW(1e-2, skip_above=1.5, skip_window=2), jit_compile=False)
    model.fit(make_batches(), verbose=0)
    assert int(model.optimizer._norm_count) == 4
    model.save(tmp_path / "model.keras")
    resumed = CausalLM.load(tmp_path / "model.keras")
    for each in (model, resumed):
        each.fit(make_batches(seed=1), verbose=0)
    for one, two in zip(model.optimizer.variables, resumed.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one, two)
    for one, two in zip(values(model), values(resumed), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_batch_that_is_not_finite_leaves_the_model_as_it_was():
    model = make_model()
    model.compile(AdamW(1e-2, skip_above=math.inf), jit_compile=True)
    before = values(model)
    model.fit(make_batches(rows=4).map(lambda x, y, weights: (x, y, weights * math.nan)), verbose=0)
    for old, new in zip(before, values(model), strict=True):
        np.testing.assert_array_equal(old, new)
    assert int(model.optimizer.skipped_updates) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("jit_compile", [None, True])
def test_without_a_guard_the_norm_is_kept_and_nothing_else(name, jit_compile):
    """Beside Keras's update, which knows of no norm."""
    finals = []
    for knows_norm in (True, False):
        variables = make_variables()
        optimizer = make_optimizer(name, 0.1, global_clipnorm=1.0)
        if not knows_norm:
            optimizer._clip_gradients = lambda gradients, optimizer=optimizer: (
                keras.optimizers.Optimizer._clip_gradients(optimizer, gradients)
            )
        optimizer.build(variables)
        apply = compile_apply(optimizer, variables, jit_compile)
        for norm in (3.0, 5.0):
            apply(tf.constant(norm))
        np.testing.assert_allclose(optimizer.gradient_norm, 5.0 if knows_norm else 0.0, rtol=1e-6)
        assert not hasattr(optimizer, "skipped_updates")
        finals.append(state(optimizer, variables))
    for one, two in zip(*finals, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_the_norm_of_rows_that_repeat_is_that_of_their_sum():
    variable = keras.Variable([[1.0, 2.0], [3.0, 4.0]])
    rows = tf.IndexedSlices(tf.ones([2, 2]), tf.constant([1, 1]), tf.constant([2, 2]))
    optimizer = AdamW(0.1)
    optimizer.apply([rows], [variable])
    np.testing.assert_allclose(optimizer.gradient_norm, math.sqrt(8), rtol=1e-6)


def test_nothing_to_apply_is_keras_affair():
    AdamW().apply([], [])
    with pytest.raises(ValueError, match="must already be built"):
        AdamW().apply([tf.ones([])])


def test_the_jax_backend_leaves_out_the_same():
    """In a process of its own, for the backend is chosen when Keras is imported."""
    pytest.importorskip("jax")
    code = """
import jax, numpy as np, keras
from kerasllm.training.optimizer import AdamW, make_optimizer

def run(optimizer, norms):
    variables = [keras.Variable([[1.0, 2.0], [3.0, 4.0]]), keras.Variable([5.0])]
    optimizer.build(variables)
    values, state = [v.value for v in variables], [v.value for v in optimizer.variables]
    step = jax.jit(lambda state, g, values: optimizer.stateless_apply(state, g, values))
    for norm in norms:
        values, state = step(state, [v * 0 + norm / 5**0.5 for v in values], values)
    for variable, value in zip(optimizer.variables, state):
        variable.assign(value)
    return values

nan = float("nan")
for name in ("adamw", "lion", "adafactor", "muon"):
    guarded = make_optimizer(name, 0.1, skip_above=4.0, skip_window=2)
    one = run(guarded, [1.0, 2.0, nan, 3.0, 40.0, 2.0])
    plain = make_optimizer(name, 0.1)
    two = run(plain, [1.0, 2.0, 3.0, 2.0])
    for a, b in zip(one, two):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    print(int(guarded.skipped_updates), int(guarded.iterations), round(float(plain.gradient_norm), 5))
"""
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.split() == ["2", "4", "2.0"] * 4, result.stderr[-2000:]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"above 1. Received: skip_above=0.5"):
        AdamW(skip_above=0.5)
    with pytest.raises(ValueError, match="Received: skip_window=0"):
        AdamW(skip_above=2.0, skip_window=0)
    with pytest.raises(ValueError, match="Received: gradient_accumulation_steps=2"):
        AdamW(skip_above=2.0, gradient_accumulation_steps=2)


def test_several_replicas_leave_out_the_same():
    """In a process of its own, for devices can be split only before the first use of TensorFlow."""
    code = """
import sys
import keras, numpy as np, tensorflow as tf
from keras import ops
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
sys.path.insert(0, "tests/training")
from test_guard import AdamW, compile_apply, make_variables

mirrored = tf.distribute.MirroredStrategy(
    ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
)
for is_scaled in (False, True):
    finals = []
    for strategy in (tf.distribute.get_strategy(), mirrored):
        with strategy.scope():
            variables = make_variables()
            inner = optimizer = AdamW(0.1, skip_above=4.0, skip_window=2)
            if is_scaled:
                optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0)
            optimizer.build(variables)
        # The gradients are the same everywhere, as in the training step.
        inner._all_reduce_sum_gradients = optimizer._all_reduce_sum_gradients = list
        apply = compile_apply(optimizer, variables, None)
        step = tf.function(lambda norm: strategy.run(apply, (norm,)), autograph=False)
        for norm in (1.0, 2.0, float("nan"), 3.0, 40.0, 2.0):
            step(tf.constant(norm))
        everything = [*variables, *optimizer.variables]
        copies = [strategy.experimental_local_results(v.value) for v in everything]
        for copy in copies:
            np.testing.assert_array_equal(copy[0], copy[-1])
        finals.append([copy[0].numpy() for copy in copies])
        counts = (inner.skipped_updates, optimizer.iterations)
        print(*[ops.convert_to_numpy(count) for count in counts])
    for one, two in zip(*finals, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)

with mirrored.scope():  # without a guard
    variables = make_variables()
    optimizer = AdamW(0.1)
    optimizer.build(variables)
optimizer._all_reduce_sum_gradients = list
step = tf.function(lambda norm: mirrored.run(compile_apply(optimizer, variables, None), (norm,)))
step(tf.constant(3.0))
print(*[round(float(c), 4) for c in mirrored.experimental_local_results(optimizer.gradient_norm.value)])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["2", "4"] * 2 + ["1", "4"] * 2 + ["3.0"] * 2, result.stderr[-2000:]
