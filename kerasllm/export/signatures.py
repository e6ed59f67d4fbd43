"""What an exported folder can be asked, read from its files, and requests that fit."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

CLASSIFY = "tensorflow/serving/classify"
# What a request of any model may say, for one row; of "stop" an empty string ends the list.
_VALUES = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 0,
    "stop": [""],
    "num_turns": 1,
    "index": 0,
}
# Places of a cache in an example, and candidates of a mask.
_CACHE_LENGTH, _CANDIDATES = 8, 5


@dataclasses.dataclass(frozen=True)
class Signature:
    """A function of an exported folder.

    Args:
        method: Which call of TensorFlow Serving it answers.
        inputs: What goes in, by name; `None` in a shape is any number.
        outputs: What comes out, by name.
        defaults: Values of the inputs that may be left out.
    """

    method: str
    inputs: Mapping[str, tf.TensorSpec]
    outputs: Mapping[str, tf.TensorSpec]
    defaults: Mapping[str, np.ndarray]

    @property
    def text_inputs(self) -> list[str]:
        """The inputs that take a text per row."""
        names = ("prompt", "text", "contents", "inputs")
        return [name for name in names if name in self.inputs and self.inputs[name].dtype == tf.string]

    def describe(self) -> dict[str, Any]:
        """The same as JSON."""

        def tensors(specs):
            return {
                name: {"dtype": spec.dtype.name, "shape": spec.shape.as_list()}
                for name, spec in specs.items()
            }

        described = {
            "method": self.method,
            "inputs": tensors(self.inputs),
            "outputs": tensors(self.outputs),
        }
        for name, value in self.defaults.items():
            if value.dtype == object:
                value = np.array([item.decode() for item in value.ravel()]).reshape(value.shape)
            described["inputs"][name]["default"] = value.tolist()
        return described


def read_signatures(folder: str | os.PathLike) -> dict[str, Signature]:
    """Reads the signatures of an exported folder.

    Args:
        folder: The folder with `saved_model.pb`.

    Returns:
        The signatures by name, in the order of the names.

    Raises:
        FileNotFoundError: If there is no SavedModel.
    """
    file = pathlib.Path(folder, "saved_model.pb")
    if not file.is_file():
        raise FileNotFoundError(f"An exported folder must hold saved_model.pb. Received: {folder}")
    found = saved_model_pb2.SavedModel.FromString(file.read_bytes()).meta_graphs[0].signature_def

    def specs(tensors):
        return {name: _spec(name, tensors[name]) for name in sorted(tensors)}

    return {
        name: Signature(
            found[name].method_name,
            specs(found[name].inputs),
            specs(found[name].outputs),
            {key: tf.make_ndarray(value) for key, value in sorted(found[name].defaults.items())},
        )
        for name in sorted(found)
        if found[name].method_name
    }


def _spec(name: str, info) -> tf.TensorSpec:
    return tf.TensorSpec(tf.TensorShape(info.tensor_shape), tf.as_dtype(info.dtype), name=name)


def example_inputs(
    signature: Signature,
    texts: Sequence[str],
    token_ids: Sequence[int],
    max_new_tokens: int,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray] | None:
    """Makes a request that a signature answers.

    Args:
        signature: The signature.
        texts: A text for each row; each with a mask where masks are filled.
        token_ids: Ids of a text, for the inputs that are ids.
        max_new_tokens: How many to ask for.
        settings: Values of a row that go before those of an example, by the inputs' names.

    Returns:
        Arrays by the inputs' names, strings as bytes; None if an input has a name that is not known and
        no default.
    """
    fills_masks = "num_masks" in signature.outputs
    values = {
        **_VALUES,
        "top_k": _CANDIDATES if fills_masks else 0,
        "max_new_tokens": max_new_tokens,
        "continuation": " and",
        "roles": ["user"],
        "token_ids": list(token_ids),
        "num_tokens": len(token_ids),
        "token_id": token_ids[0] if token_ids else 0,
        **(settings or {}),
    }
    inputs = {}
    for name, spec in signature.inputs.items():
        if name == "inputs" and signature.method == CLASSIFY:
            rows = [_example(text) for text in texts]
        elif name == "contents":
            rows = [[text] for text in texts]
        elif name in ("prompt", "text", "second_text") and spec.dtype == tf.string:
            rows = list(texts)
        elif name.startswith("kv_cache_"):
            shape = [len(texts), *(_CACHE_LENGTH if size is None else size for size in spec.shape[1:])]
            inputs[name] = np.zeros(shape, spec.dtype.as_numpy_dtype)
            continue
        elif name in values:
            rows = values[name]
            if spec.shape.rank == np.ndim(rows) + 1:
                rows = [rows] * len(texts)
        elif name in signature.defaults:
            rows = signature.defaults[name]
        else:
            return None
        if spec.dtype == tf.string:
            inputs[name] = _as_bytes(rows)
        else:
            inputs[name] = np.array(rows, spec.dtype.as_numpy_dtype)
    return inputs


def _as_bytes(rows) -> np.ndarray:
    array = np.array(rows, object)
    flat = [item.encode() if isinstance(item, str) else item for item in array.ravel()]
    filled = np.empty(len(flat), object)
    filled[:] = flat
    return filled.reshape(array.shape)


def _example(text: str) -> bytes:
    """A serialized tf.Example with the text, as the Classify call wraps it."""
    feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))
    return tf.train.Example(features=tf.train.Features(feature={"text": feature})).SerializeToString()
