"""Classify, Regress and MultiInference: serialized tf.Examples in, classes or numbers out.

The names of its inputs and outputs tell what a signature can do: from `inputs` to `classes` and `scores` it
classifies, from `inputs` to `outputs` it regresses. Its method name is checked only where the server is
told to, because SavedModels of TensorFlow 2 have the same one everywhere.
"""

from collections.abc import Callable, Mapping, Sequence

import grpc
import numpy as np
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    inference_pb2,
    input_pb2,
    regression_pb2,
)

from kerasllm_serving.errors import ServingError, invalid_argument, unimplemented
from kerasllm_serving.model import DEFAULT_SIGNATURE, Servable
from kerasllm_serving.tensor_proto import dtype_name

CLASSIFY = "tensorflow/serving/classify"
REGRESS = "tensorflow/serving/regress"

# From the values to feed by tensor name and the names to fetch to the fetched arrays.
Run = Callable[[Mapping[str, np.ndarray], Sequence[str]], list[np.ndarray]]


def run_classify(
    servable: Servable, request: classification_pb2.ClassificationRequest, run: Run
) -> classification_pb2.ClassificationResponse:
    """Classifies the examples of a request.

    Args:
        servable: The loaded version.
        request: The model, the signature and the examples.
        run: Runs its graph.

    Returns:
        The classes of each example, and the name, version and signature that made them.

    Raises:
        ServingError: With TensorFlow Serving's code and message.
    """
    signature = _find(servable, request.model_spec.signature_name)
    _check_classification(signature, servable.options.checks_method_names)
    fetched = _run_examples(signature, request.input, _outputs(signature), run)
    response = classification_pb2.ClassificationResponse()
    _fill_spec(response.model_spec, request.model_spec, servable.version)
    _fill_classifications(signature, count_examples(request.input), fetched, response.result)
    return response


def run_regress(
    servable: Servable, request: regression_pb2.RegressionRequest, run: Run
) -> regression_pb2.RegressionResponse:
    """Gives a number to each example of a request; otherwise as `run_classify`."""
    signature = _find(servable, request.model_spec.signature_name)
    _check_regression(signature, servable.options.checks_method_names)
    fetched = _run_examples(signature, request.input, _outputs(signature), run)
    response = regression_pb2.RegressionResponse()
    _fill_spec(response.model_spec, request.model_spec, servable.version)
    _fill_regressions(signature, count_examples(request.input), fetched, response.result)
    return response


def run_multi_inference(
    servable: Servable, request: inference_pb2.MultiInferenceRequest, run: Run
) -> inference_pb2.MultiInferenceResponse:
    """Runs the graph once for several signatures that share their input; otherwise as `run_classify`."""
    checks = {CLASSIFY: _check_classification, REGRESS: _check_regression}
    fills = {CLASSIFY: _fill_classifications, REGRESS: _fill_regressions}
    chosen: dict[str, meta_graph_pb2.SignatureDef] = {}
    for task in request.tasks:
        if not task.model_spec.name:
            raise invalid_argument("Found ModelSpec with an empty model name.")
        if task.model_spec.name != request.tasks[0].model_spec.name:
            raise invalid_argument(
                "All ModelSpecs in a MultiInferenceRequest must access the same model name."
            )
        name = task.model_spec.signature_name or DEFAULT_SIGNATURE
        if name in chosen:
            raise invalid_argument(f"Duplicate evaluation of signature: {name}")
        if name not in servable.signatures:
            raise invalid_argument(f"Requested signature not found in model graph: {name}")
        if task.method_name not in checks:
            raise unimplemented(f"Unsupported signature method_name: {task.method_name}")
        checks[task.method_name](servable.signatures[name], servable.options.checks_method_names)
        chosen[name] = servable.signatures[name]
    if len({signature.inputs["inputs"].name for signature in chosen.values()}) > 1:
        raise invalid_argument("Input tensor must be the same for all Signatures.")

    fetches = sorted({name for signature in chosen.values() for name in _outputs(signature)})
    fetched = _run_examples(next(iter(chosen.values())), request.input, fetches, run)
    response = inference_pb2.MultiInferenceResponse()
    for task, signature in zip(request.tasks, chosen.values(), strict=True):
        result = response.results.add()
        _fill_spec(result.model_spec, task.model_spec, servable.version)
        is_classification = task.method_name == CLASSIFY
        field = result.classification_result if is_classification else result.regression_result
        fills[task.method_name](signature, count_examples(request.input), fetched, field)
    return response


def count_examples(examples: input_pb2.Input) -> int:
    """Returns how many examples an input has.

    Args:
        examples: The input.
    """
    kind = examples.WhichOneof("kind")
    return len(getattr(examples, kind).examples) if kind else 0


def _find(servable: Servable, name: str) -> meta_graph_pb2.SignatureDef:
    name = name or DEFAULT_SIGNATURE
    if name not in servable.signatures:
        raise invalid_argument(f"No signature was found with the name: {name}")
    return servable.signatures[name]


def _check_method(signature: meta_graph_pb2.SignatureDef, kind: str, method: str) -> None:
    if signature.method_name != method:
        raise invalid_argument(
            f"Expected {kind} signature method_name to be {method}. Was: {signature.method_name}"
        )


def _check_input(signature: meta_graph_pb2.SignatureDef, kind: str) -> None:
    if "inputs" not in signature.inputs:
        raise _unfit(f"No {kind} inputs found in SignatureDef: {signature}")


def _check_classification(signature: meta_graph_pb2.SignatureDef, checks_method: bool) -> None:
    if checks_method:
        _check_method(signature, "classification", CLASSIFY)
    if len(signature.inputs) != 1:
        raise invalid_argument("Expected one input Tensor.")
    if len(signature.outputs) not in (1, 2):
        raise invalid_argument(f"Expected one or two output Tensors, found {len(signature.outputs)}")
    _check_input(signature, "classification")
    if not {"classes", "scores"} & set(signature.outputs):
        raise _unfit(
            'Expected classification signature outputs to contain at least one of "classes" or "scores". '
            f"Signature was: {signature}"
        )


def _check_regression(signature: meta_graph_pb2.SignatureDef, checks_method: bool) -> None:
    if checks_method:
        _check_method(signature, "regression", REGRESS)
    if len(signature.inputs) != 1:
        raise invalid_argument("Expected one input Tensor.")
    if len(signature.outputs) != 1:
        raise invalid_argument("Expected one output Tensor.")
    _check_input(signature, "regression")
    if "outputs" not in signature.outputs:
        raise _unfit(f"No regression outputs found in SignatureDef: {signature}")


def _unfit(message: str) -> ServingError:
    return ServingError(grpc.StatusCode.FAILED_PRECONDITION, message)


def _outputs(signature: meta_graph_pb2.SignatureDef) -> list[str]:
    """Returns the names of the tensors that an answer is made of."""
    known = ("classes", "scores", "outputs")
    return [signature.outputs[name].name for name in known if name in signature.outputs]


def _run_examples(
    signature: meta_graph_pb2.SignatureDef, examples: input_pb2.Input, fetches: Sequence[str], run: Run
) -> dict[str, np.ndarray]:
    info = signature.inputs["inputs"]
    if info.dtype != types_pb2.DT_STRING:
        raise invalid_argument(f"Expects arg[0] to be {dtype_name(info.dtype)} but string is provided")
    arrays = run({info.name: _serialize(examples)}, fetches)
    return dict(zip(fetches, arrays, strict=True))


def _serialize(examples: input_pb2.Input) -> np.ndarray:
    """Returns the examples as strings `[count]`, each with the context that they share."""
    if not count_examples(examples):
        raise invalid_argument("Input is empty.")
    given = getattr(examples, examples.WhichOneof("kind"))
    # Messages one after the other are, parsed, one message that has the fields of all.
    begin = given.context.SerializeToString() if hasattr(given, "context") else b""
    strings = np.empty(len(given.examples), object)
    strings[:] = [begin + example.SerializeToString() for example in given.examples]
    return strings


def _fill_spec(answered, asked, version: int) -> None:
    answered.name = asked.name
    answered.version.value = version
    answered.signature_name = asked.signature_name or DEFAULT_SIGNATURE


def _fill_classifications(
    signature: meta_graph_pb2.SignatureDef,
    count: int,
    fetched: Mapping[str, np.ndarray],
    result: classification_pb2.ClassificationResult,
) -> None:
    columns = {}
    for name, dtype in (("classes", types_pb2.DT_STRING), ("scores", types_pb2.DT_FLOAT)):
        if name not in signature.outputs:
            continue
        info = signature.outputs[name]
        array = columns[name] = fetched[info.name]
        if array.ndim != 2:
            raise invalid_argument(
                f"Expected Tensor shape: [batch_size num_classes] but got {_shape(array)}"
            )
        if info.dtype != dtype:
            raise invalid_argument(
                f"Expected {name} Tensor of {types_pb2.DataType.Name(dtype)}. "
                f"Got: {types_pb2.DataType.Name(info.dtype)}"
            )
        if len(array) != count:
            raise invalid_argument(f"Expected {name} output batch size of {count}. Got: {len(array)}")
    widths = [array.shape[1] for array in columns.values()]
    if len(set(widths)) > 1:
        raise invalid_argument(
            f"Tensors class and score should match in dim_size(1). Got {widths[0]} vs. {widths[1]}"
        )
    for row in range(count):
        classifications = result.classifications.add()
        for column in range(widths[0]):
            added = classifications.classes.add()
            if "classes" in columns:
                # The field is text: what is none would make the whole answer unreadable.
                added.label = columns["classes"][row, column].decode("utf-8", "replace")
            if "scores" in columns:
                added.score = columns["scores"][row, column]


def _fill_regressions(
    signature: meta_graph_pb2.SignatureDef,
    count: int,
    fetched: Mapping[str, np.ndarray],
    result: regression_pb2.RegressionResult,
) -> None:
    info = signature.outputs["outputs"]
    array = fetched[info.name]
    if not (array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1)):
        raise invalid_argument(
            "Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got "
            f"{_shape(array)}"
        )
    if len(array) != count:
        raise invalid_argument(
            f"Input batch size did not match output batch size: {count} vs. {len(array)}"
        )
    if info.dtype != types_pb2.DT_FLOAT:
        raise invalid_argument(
            f"Expected output Tensor of DT_FLOAT.  Got: {types_pb2.DataType.Name(info.dtype)}"
        )
    for value in array.reshape(-1):
        result.regressions.add().value = value


def _shape(array: np.ndarray) -> str:
    return "[" + ",".join(map(str, array.shape)) + "]"
