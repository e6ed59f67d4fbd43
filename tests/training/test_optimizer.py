import math

import keras
import numpy as np
import pytest

from kerasllm.training import AdamW, cosine_schedule


def test_matches_numpy_and_leaves_biases_and_gains_undecayed():
    rng = np.random.default_rng(0)
    variables = [
        keras.Variable(rng.normal(size=shape).astype("float32"), name=name)
        for name, shape in (("kernel", (3, 4)), ("bias", (4,)), ("scale", (4,)), ("bias_table", (2, 2)))
    ]
    values = [keras.ops.convert_to_numpy(v).astype("float64") for v in variables]
    optimizer = AdamW(1e-2, weight_decay=0.5, beta_1=0.9, beta_2=0.95, epsilon=1e-8, global_clipnorm=1.0)
    first, second = [np.zeros_like(v) for v in values], [np.zeros_like(v) for v in values]
    for step in range(1, 6):
        gradients = [rng.normal(size=v.shape) for v in values]
        optimizer.apply([keras.ops.convert_to_tensor(g, "float32") for g in gradients], variables)
        norm = math.sqrt(sum((g**2).sum() for g in gradients))
        for i, g in enumerate(gradients):
            g = g / max(norm, 1.0)
            if variables[i].name in ("kernel", "bias_table"):
                values[i] -= 1e-2 * 0.5 * values[i]
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.95 * second[i] + 0.05 * g**2
            values[i] -= (
                1e-2 * (first[i] / (1 - 0.9**step)) / (np.sqrt(second[i] / (1 - 0.95**step)) + 1e-8)
            )
    for variable, value in zip(variables, values, strict=True):
        np.testing.assert_allclose(variable, value, rtol=1e-4, atol=1e-6)


def test_exclusions_survive_saving():
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(AdamW(not_decayed=["^x$"])))
    assert isinstance(copy, AdamW)
    assert copy.not_decayed == ("^x$",)
    copy.build([keras.Variable([1.0], name="x"), keras.Variable([1.0], name="y")])
    assert [copy._use_weight_decay(v) for v in copy._trainable_variables] == [False, True]


def test_schedule_is_a_line_and_half_a_cosine():
    schedule = cosine_schedule(1e-3, 1000, warmup_steps=100, final_fraction=0.1)

    def wanted(step):
        if step < 100:
            return 1e-3 * (step + 1) / 101
        return 1e-4 + 0.5 * (1 + math.cos(math.pi * min(1, (step - 100) / 900))) * 9e-4

    for step in (0, 1, 50, 99, 100, 101, 500, 999, 1000, 2000):
        np.testing.assert_allclose(schedule(step), wanted(step), rtol=1e-4)


def test_schedule_without_warm_up_and_defaults():
    np.testing.assert_allclose(cosine_schedule(1.0, 10, warmup_steps=0)(0), 1.0)
    np.testing.assert_allclose(cosine_schedule(1.0, 50)(4), 5 / 6)
    with pytest.raises(ValueError, match="warmup_steps=10, total_steps=10"):
        cosine_schedule(1.0, 10, warmup_steps=10)
