"""What is computed again for the gradient: it changes nothing but what is kept."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from kerasllm import T5, Bert, BertConfig, CausalLM, Llama, LlamaConfig, MaskedLM, Seq2SeqLM, T5Config
from kerasllm.layers.gradient import forget_inside, is_traced_for_gradient, traced_for_gradient

SIZES = {"vocabulary_size": 30, "context_length": 10, "num_layers": 2, "num_heads": 4, "dim": 16}
ROWS, LENGTH = 3, 10


def make_task(family, dropout=0.2):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    ids, labels = (rng.integers(1, 30, (ROWS, LENGTH)).astype("int32") for _ in range(2))
    mask = (np.arange(LENGTH) < [[10], [4], [7]]).astype("int32")
    if family == "llama":
        sizes = {**SIZES, "num_kv_heads": 2, "intermediate_dim": 24, "attention_dropout": dropout}
        sizes |= {"qk_norm": True, "score_cap": 20.0, "logit_cap": 10.0}
        task, x = CausalLM(Llama(LlamaConfig(**sizes), dtype="float64")), ids
    elif family == "bert":
        sizes = {**SIZES, "intermediate_dim": 24, "dropout": dropout, "attention_dropout": dropout}
        task = MaskedLM(Bert(BertConfig(**sizes), dtype="float64"))
        x = {"token_ids": ids, "attention_mask": mask}
    else:
        sizes = {**SIZES, "intermediate_dim": 24, "head_dim": 4, "dropout": dropout}
        task = Seq2SeqLM(T5(T5Config(**sizes), dtype="float64"))
        x = {"source_ids": ids, "memory_mask": mask, "token_ids": labels}
    for weight in task.weights:
        weight.assign(weight + 0.3 * keras.random.normal(weight.shape, dtype="float64"))
    return task, (x, labels, mask.astype("float32"))


@pytest.mark.grappler
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_nothing_changes(family):
    results = {}
    for remat in (None, "cheap", "blocks"):
        task, batch = make_task(family)
        task.compile(keras.optimizers.SGD(0.1), remat=remat, jit_compile=False)
        batches = tf.data.Dataset.from_tensors(batch).repeat(2)
        losses = task.fit(batches, verbose=0).history["loss"]
        results[remat] = [losses, *(ops.convert_to_numpy(weight) for weight in task.weights)]
    for remat in ("cheap", "blocks"):
        for got, want in zip(results[remat], results[None], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("remat", "softmaxes", "products"),
    # Two blocks with four matrices of the attention and three of the feed-forward network. Nobody reads
    # what comes out of the last when it is computed again, so TensorFlow leaves that product out.
    [(None, 2, 14), ("cheap", 4, 14), ("blocks", 4, 26)],
)
def test_what_is_computed_again(remat, softmaxes, products):
    task, (ids, labels, weights) = make_task("llama", dropout=0.0)
    variables = [weight.value for weight in task.trainable_weights]

    @tf.function(autograph=False)
    def differentiate():
        with traced_for_gradient(remat), tf.GradientTape() as tape:
            total = tf.reduce_sum(task.model(ids, with_head=False, training=True) ** 2)
        return tape.gradient(total, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    graph = differentiate.get_concrete_function().graph
    needed = _needed([tensor.op for tensor in graph.outputs])
    assert sum(op.type == "Softmax" for op in needed) == softmaxes
    forward = [op for op in needed if op.type == "MatMul" and "gradient_tape" not in op.name]
    assert len(forward) == products


def _needed(ops_):
    """What a graph computes for these operations."""
    found, left = set(), list(ops_)
    while left:
        op = left.pop()
        if op not in found:
            found.add(op)
            left += [tensor.op for tensor in op.inputs] + list(op.control_inputs)
    return found


def test_outside_of_a_step_nothing_is_forgotten():
    assert not is_traced_for_gradient()
    with traced_for_gradient():
        assert is_traced_for_gradient()
        calls = []
        assert forget_inside(lambda x, nothing: calls.append(nothing) or x, 3, None) == 3
        assert calls == [None]
    assert not is_traced_for_gradient()


def test_an_unknown_name_is_refused():
    task, _ = make_task("llama")
    with pytest.raises(ValueError, match="`remat` must be one of"):
        task.compile(remat="all")
