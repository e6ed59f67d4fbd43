"""Converts a SavedModel to a `.tflite` and quantises it: a program of its own, for it needs much memory.

TensorFlow's converter needs many times the model's size and keeps it, so `export_litert` runs this file as
a process. It says what it did in lines of JSON on its standard output: `step`, `seconds`, `peak_bytes`.
"""

import contextlib
import json
import re
import resource
import sys
import time


@contextlib.contextmanager
def _step(name: str):
    begin = time.monotonic()
    yield
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = {"step": name, "seconds": time.monotonic() - begin, "peak_bytes": peak}
    print("\n" + json.dumps(line), flush=True)


def convert(source: str, signatures: list[str]) -> bytes:
    """Converts the signatures of a SavedModel to one model of builtin operations."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(source, signature_keys=signatures)
    return converter.convert()


def score_names(model: bytes, rows: int) -> list[str]:
    """Finds what the head computes: outputs of a matrix product with a row for each token.

    Args:
        model: A `.tflite`.
        rows: Number of tokens.

    Returns:
        Names of tensors.
    """
    from ai_edge_litert import schema_py_generated as schema

    content = schema.ModelT.InitFromObj(schema.Model.GetRootAs(model))
    code = schema.BuiltinOperator.FULLY_CONNECTED
    names = []
    for graph in content.subgraphs:
        for operator in graph.operators:
            if content.operatorCodes[operator.opcodeIndex].builtinCode != code:
                continue
            if graph.tensors[operator.inputs[1]].shape[0] == rows:
                names.append(graph.tensors[operator.outputs[0]].name.decode())
    return names


def recipe(kind: str, heads: list[str]) -> list[dict]:
    """The quantiser's recipe for a kind: int8, int4, int8_weights or fp16.

    Matrices and the token table only. One scale per row, and the same rule for every use of the tied
    table, or it would be stored twice.

    Args:
        kind: `"int8"`: weights of 8 bits, multiplied with activations that are quantised as they come, but
            not in the attention, whose inputs are widest apart: there the weights are widened.
            `"int4"`: the same with weights of 4 bits in blocks of 32, but 8 bits for table and head.
            `"int8_weights"`: weights of 8 bits, which are widened when they are used.
            `"fp16"`: weights of 16 bits, which are widened when the model is loaded.
        heads: What `score_names` returns.
    """
    from litert_quantizer import qtyping, recipe_manager

    rules = recipe_manager.RecipeManager()
    matrix, table = qtyping.TFLOperationName.FULLY_CONNECTED, qtyping.TFLOperationName.EMBEDDING_LOOKUP
    if kind == "fp16":
        for operation in (matrix, table):
            rules.add_weight_only_config(
                regex=".*", operation_name=operation, num_bits=16, algorithm_key="float_casting"
            )
        return rules.get_quantization_recipe()
    if kind == "int8_weights":
        for operation in (matrix, table):
            rules.add_weight_only_config(regex=".*", operation_name=operation, num_bits=8)
        return rules.get_quantization_recipe()
    bits = {"int8": 8, "int4": 4}[kind]
    blocks = {"granularity": qtyping.QuantGranularity.BLOCKWISE_32} if bits == 4 else {}
    rules.add_dynamic_config(regex=".*", operation_name=matrix, num_bits=bits, **blocks)
    rules.add_dynamic_config(regex=".*", operation_name=table, num_bits=8)
    if bits == 8:  # a later rule goes before an earlier one
        rules.add_weight_only_config(regex="attention", operation_name=matrix, num_bits=8)
    if bits != 8 and heads:
        regex = "|".join(sorted({f"^{re.escape(name)}" for name in heads}))
        rules.add_dynamic_config(regex=regex, operation_name=matrix, num_bits=8)
    return rules.get_quantization_recipe()


def quantize(path: str, kind: str, rows: int) -> None:
    """Quantises a `.tflite` in its place."""
    from litert_quantizer import quantizer

    with open(path, "rb") as file:
        heads = score_names(file.read(), rows)
    work = quantizer.Quantizer(path)
    work.load_quantization_recipe(recipe(kind, heads))
    work.quantize().export_model(path, overwrite=True)


def main(source: str, target: str, kind: str, rows: str, *signatures: str) -> None:
    """Runs the program; arguments as the process gets them."""
    with _step("converted"):
        model = convert(source, list(signatures))
        with open(target, "wb") as file:
            file.write(model)
        del model
    if kind != "none":
        with _step(f"quantised to {kind}"):
            quantize(target, kind, int(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
