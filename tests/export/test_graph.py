"""A saved graph that was made smaller does what it did."""

import tensorflow as tf
from tensorflow.core.framework import function_pb2

from kerasllm.export.graph import finish_graph, make_smaller


def plain_body(x):
    rows = tf.shape(x)[0]
    tf.reduce_sum(x)  # nothing depends on it
    with tf.control_dependencies([tf.debugging.Assert(rows < 4, ["too many rows"])]):
        x = x + 2.0
    for _ in range(3):
        x = tf.while_loop(lambda n, _: n < 2, lambda n, x: (n + 1, x * 2.0 + 2.0), [0, x])[1]
    return {"y": tf.reshape(x, [rows, 1]) + tf.cast(tf.constant(2), tf.float32)}


def test_a_smaller_graph_is_as_good(tmp_path):
    module = tf.Module()
    module.calls = tf.Variable(0)

    def body(x):
        module.calls.assign_add(1)  # no output needs it
        return plain_body(x)

    @tf.function(input_signature=[], autograph=False)
    def reset():
        module.calls.assign(0)

    module.reset = reset
    module.f = tf.function(body, input_signature=[tf.TensorSpec([None], tf.float32)], autograph=False)
    tf.saved_model.save(module, str(tmp_path), signatures=module.f)
    before = (tmp_path / "saved_model.pb").stat().st_size
    finish_graph(tmp_path, {"serving_default": "tensorflow/serving/regress"})
    assert (tmp_path / "saved_model.pb").stat().st_size < before
    loaded = tf.saved_model.load(str(tmp_path))
    x = tf.range(4.0)
    for function in (module.f, loaded.f, loaded.signatures["serving_default"]):
        try:
            function(x)
        except tf.errors.InvalidArgumentError as error:
            assert "too many rows" in error.message
        else:
            raise AssertionError("The check is gone.")
    fewer = tf.constant([1.0, 5.0])
    wanted = module.f(fewer)["y"].numpy().tolist()
    assert loaded.f(fewer)["y"].numpy().tolist() == wanted
    assert loaded.calls.numpy() == 3  # two were refused
    loaded.reset()
    assert loaded.calls.numpy() == 0
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        meta_graph = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(tmp_path))
        signature = meta_graph.signature_def["serving_default"]
        assert signature.method_name == "tensorflow/serving/regress"
        (feed,), (fetch,) = signature.inputs.values(), signature.outputs.values()
        assert session.run(fetch.name, {feed.name: [1.0, 5.0]}).tolist() == wanted


def test_what_is_left():
    """One of equal constants, of another type another; what the checks need, and nothing besides."""
    concrete = tf.function(plain_body, autograph=False).get_concrete_function(
        tf.TensorSpec([None], tf.float32)
    )
    function = function_pb2.FunctionDef()
    function.CopyFrom(concrete.function_def)
    constants = [node for node in function.node_def if node.op == "Const"]
    make_smaller(function)
    left = [node.attr["value"].SerializeToString() for node in function.node_def if node.op == "Const"]
    assert set(left) <= {node.attr["value"].SerializeToString() for node in constants}
    assert len(left) == len(set(left)) < len(constants)
    kinds = [node.op for node in function.node_def]
    assert "Sum" not in kinds and "Assert" in kinds and kinds.count("StatelessWhile") == 3
