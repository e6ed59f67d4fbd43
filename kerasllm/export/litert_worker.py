"""Converts a SavedModel to a `.tflite` and quantises it: a program of its own, for it needs much memory.

TensorFlow's converter needs many times the model's size and keeps it, so `export_litert` runs this file as
a process. It says what it did in lines of JSON on its standard output: `step`, `seconds`, `peak_bytes`.
"""

import contextlib
import functools
import json
import re
import resource
import sys
import time

import ml_dtypes
import numpy as np

# So many weights of 4 bits share a scale.
BLOCK = 32
# The largest weight of a block is so many times the scale: the last ones cut it off. With the integers, a
# block that already is a few integers times a scale stays what it is.
_DIVISORS = (1, 2, 3, 4, 5, *np.arange(6, 11.25, 0.25))
# Recipes know the quantiser's own algorithms only: this one, which rounds worse, gives its place to ours.
_OUR_PLACE = "OCTAV"


def round_to_integers(weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Rounds weights to integers of 4 bits, int8 from -8 to 7, that stand for so many scales."""
    return np.clip(np.rint(weights / scales), -8, 7).astype("int8")


def block_scales(matrix: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Chooses the scales of blocks with which rounding to 4 bits loses least.

    Args:
        matrix: Floats `[rows, columns]`.
        importance: Floats `[columns]` that the squared errors are weighted with; None: all the same.

    Returns:
        Float32 `[rows, columns / 32]` that are bfloat16 and float16 numbers as well: kernels use the one,
        files hold the other.
    """
    blocks = matrix.reshape(len(matrix), -1, BLOCK)
    importance = np.ones(matrix.shape[1], "float32") if importance is None else importance
    importance = importance.reshape(1, -1, BLOCK)
    bound = np.abs(blocks).max(-1)
    least = np.full(bound.shape, np.inf, "float32")
    best = np.ones_like(bound)
    for divisor in _DIVISORS:
        scales = (
            (bound / np.float32(divisor)).astype(ml_dtypes.bfloat16).astype("float16").astype("float32")
        )
        scales = np.maximum(scales, np.finfo("float16").tiny)
        loss = (
            importance * (blocks - round_to_integers(blocks, scales[..., None]) * scales[..., None]) ** 2
        ).sum(-1)
        best, least = np.where(loss < least, scales, best), np.minimum(loss, least)
    return best


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
    """The quantiser's recipe for a kind.

    Matrices and the token table only. One scale per row, and the same rule for every use of the tied
    table, or it would be stored twice.

    Args:
        kind: `"int8"`: weights of 8 bits, multiplied with activations that are quantised as they come, but
            not in the attention, whose inputs are widest apart: there the weights are widened.
            `"int8_smoothed"`: the same, in the attention too, for a model whose inputs are no longer so.
            `"int4"`: weights of 4 bits in blocks of 32, but 8 bits for table and head, and activations
            quantised as they come.
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
    bits = {"int8": 8, "int8_smoothed": 8, "int4": 4}[kind]
    blocks = {}
    if bits == 4:
        blocks = {"granularity": qtyping.QuantGranularity.BLOCKWISE_32, "algorithm_key": _OUR_PLACE}
    rules.add_dynamic_config(regex=".*", operation_name=matrix, num_bits=bits, **blocks)
    rules.add_dynamic_config(regex=".*", operation_name=table, num_bits=8)
    if kind == "int8":  # a later rule goes before an earlier one
        rules.add_weight_only_config(regex="attention", operation_name=matrix, num_bits=8)
    if bits != 8 and heads:
        regex = "|".join(sorted({f"^{re.escape(name)}" for name in heads}))
        rules.add_dynamic_config(regex=regex, operation_name=matrix, num_bits=8)
    return rules.get_quantization_recipe()


def use_block_scales() -> None:
    """Makes the quantiser, in this process, choose the scales of blocks with `block_scales`."""
    from litert_quantizer import algorithm_manager, qtyping
    from litert_quantizer.algorithms.uniform_quantize import common_quantize, naive_min_max_quantize

    def parameters(operation, config, content, statistics):
        scales = block_scales(content)
        return qtyping.UniformQuantParams(
            num_bits=4,
            quantized_dimension=1,
            scale=scales,
            zero_point=np.zeros(scales.shape, "int8"),
            quantized_data=round_to_integers(content, np.repeat(scales, BLOCK, axis=1)),
            block_size=BLOCK,
        )

    algorithm_manager.register_quantized_op(
        _OUR_PLACE,
        qtyping.TFLOperationName.FULLY_CONNECTED,
        naive_min_max_quantize.init_qsvs,
        naive_min_max_quantize.min_max_calibrate,
        functools.partial(common_quantize.materialize_fc_conv, parameters),
    )


def share_scales() -> None:
    """Makes the quantiser, in this process, write equal scales once and not for each signature."""
    from ai_edge_litert import schema_py_generated as schema

    pack, last, places = schema.QuantizationParametersT.Pack, None, {}

    def pack_once(parameters, builder):
        nonlocal last
        if builder is not last:  # another file
            last = builder
            places.clear()
        numbers = (parameters.min, parameters.max, parameters.scale, parameters.zeroPoint)
        content = [None if part is None else np.asarray(part).tobytes() for part in numbers]
        details = None if parameters.details is None else tuple(vars(parameters.details).items())
        key = (*content, parameters.detailsType, details, parameters.quantizedDimension)
        if key not in places:
            places[key] = pack(parameters, builder)
        return places[key]

    schema.QuantizationParametersT.Pack = pack_once


def quantize(path: str, kind: str, rows: int) -> None:
    """Quantises a `.tflite` in its place."""
    from litert_quantizer import quantizer

    use_block_scales()
    share_scales()
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
