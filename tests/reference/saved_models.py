"""Requests to exported models, and what every exported folder must be like."""

import random

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from kerasllm.generation import KNOBS

PROMPTS = ["Once upon a time", "The", "Mia found a small red box in the garden and"]
SETTINGS = {
    "max_new_tokens": 9,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 3,
}
NUMBERS = {spec.name: spec.dtype for spec in KNOBS}


def inputs(prompts=tuple(PROMPTS), stop=(), **settings):
    """The inputs of `generate`: each setting is one value for all prompts, or a list."""
    values = {
        name: tf.broadcast_to(tf.constant(value, NUMBERS[name]), [len(prompts)])
        for name, value in {**SETTINGS, **settings}.items()
    }
    stops = tf.constant([[text.encode() for text in stop]] * len(prompts), tf.string)
    return {"prompt": tf.constant(list(prompts)), **values, "stop": stops}


def check_rows(outputs, live):
    """Compares outputs of a signature with completions of the live model, asked with `logprobs=0`."""
    outputs = {name: value.numpy() for name, value in outputs.items()}
    assert set(outputs) == {"text", "token_ids", "num_tokens", "finish_reason", "logprobs"}
    assert [text.decode() for text in outputs["text"]] == [row.text for row in live]
    assert [reason.decode() for reason in outputs["finish_reason"]] == [row.finish_reason for row in live]
    rows = [row.token_ids for row in live]
    assert outputs["num_tokens"].tolist() == [len(row) for row in rows]
    longest = max(map(len, rows))
    assert outputs["token_ids"].tolist() == [row + [-1] * (longest - len(row)) for row in rows]
    wanted = [row.logprobs + [0.0] * (longest - len(row.logprobs)) for row in live]
    np.testing.assert_allclose(outputs["logprobs"], wanted, rtol=1e-5, atol=1e-5)


def random_requests(count, seed):
    """Requests of unlike lengths and knobs."""
    rng = random.Random(seed)
    words = "Once the Mia small garden box é 🦊 sun was and . ,".split()
    for _ in range(count):
        is_drawn = rng.random() < 0.6
        yield {
            "prompt": " ".join(rng.choices(words, k=rng.randint(1, 9))),
            "max_new_tokens": rng.randint(1, 24),
            "temperature": rng.choice([0.3, 1.0, 2.0]) if is_drawn else 0.0,
            "top_k": rng.choice([0, 0, 3, 40]),
            "top_p": rng.choice([1.0, 0.5, 0.95]),
            "min_p": rng.choice([0.0, 0.1]),
            "repetition_penalty": rng.choice([1.0, 1.0, 1.3]),
            "seed": rng.randint(-(2**31), 2**31 - 1),
            "stop": rng.choice([[], [], ["e"], ["the", " a"], ["\ufffd", "x", "."]]),
        }


CAUSAL_SIGNATURES = {
    "chat",
    "decode",
    "detokenize",
    "generate",
    "generate_scalar",
    "prefill",
    "score",
    "serving_default",
    "tokenize",
}
# What tensorflow-text adds to TensorFlow, where a tokenizer should use it; none does.
TEXT_OPS: set[str] = set()


def read_graph(path):
    return saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs[0]


def op_types(meta_graph) -> set[str]:
    """The types of all ops, in functions too."""
    graph = meta_graph.graph_def
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    functions = {function.signature.name for function in graph.library.function}
    return {node.op for node in nodes} - functions


def check_signatures(path, names, xla_ops=frozenset()) -> None:
    """Checks names, that rows lie along the first axis, and the ops of an exported folder."""
    meta_graph = read_graph(path)
    signatures = {n: s for n, s in meta_graph.signature_def.items() if n != "__saved_model_init_op"}
    assert set(signatures) == set(names)
    for name, signature in signatures.items():
        assert signature.inputs and signature.outputs
        for alias, info in [*signature.inputs.items(), *signature.outputs.items()]:
            assert not alias.startswith(("output_", "args_", "values_")), (name, alias)
            assert not info.tensor_shape.unknown_rank, (name, alias)
        for alias, info in signature.outputs.items():
            assert info.tensor_shape.dim[0].size == -1, (name, alias)
    found = op_types(meta_graph)
    assert {op for op in found if op.startswith("Xla")} == set(xla_ops)
    found -= set(xla_ops)
    assert found - set(dir(tf.raw_ops)) - TEXT_OPS == set()
    assert not {op for op in found if "PyFunc" in op}
