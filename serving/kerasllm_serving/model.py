"""Finds and loads one version of a SavedModel and runs its signatures."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2

from kerasllm_serving.errors import StartupError, clean_message, from_tensorflow
from kerasllm_serving.tensor_proto import as_array

SAVED_MODEL_FILE = "saved_model.pb"
_SERVE_TAG = "serve"


def find_versions(base_path: Path) -> list[Path]:
    """Returns the version folders, the highest number last.

    Args:
        base_path: Folder that holds numeric version folders, as in `model/1`, `model/2`; whatever
            else lies there is ignored, so that an export may be written beside them first.

    Returns:
        The paths of the version folders, at least one.

    Raises:
        StartupError: If `base_path` is no folder, or holds no version.
    """
    if not base_path.is_dir():
        raise StartupError(f"`--model_base_path` must be an existing folder. Received: {base_path}")
    if (base_path / SAVED_MODEL_FILE).exists():
        if base_path.name.isdecimal():
            advice = f"pass its parent: --model_base_path={base_path.absolute().parent}"
        else:
            advice = f"move its contents to {base_path / '1'}"
        raise StartupError(
            "`--model_base_path` must be the folder that holds the numeric version folders. "
            f"Received: {base_path}, which is itself a SavedModel; {advice}"
        )
    versions = [
        entry
        for entry in base_path.iterdir()
        if entry.is_dir() and entry.name.isascii() and entry.name.isdecimal()
    ]
    if not versions:
        found = ", ".join(sorted(entry.name for entry in base_path.iterdir())) or "nothing"
        raise StartupError(
            "`--model_base_path` must hold a numeric version folder such as 1. "
            f"Received: {base_path}, which holds: {found}"
        )
    return sorted(versions, key=lambda entry: int(entry.name))


class Servable:
    """One loaded SavedModel in a graph-mode session, which is how TensorFlow Serving runs it.

    Args:
        path: The version folder; its name is the version number.

    Raises:
        StartupError: If the folder is no complete SavedModel.
    """

    def __init__(self, path: Path) -> None:
        self.version = int(path.name)
        meta_graph = _read_meta_graph(path)
        self.signatures: Mapping[str, meta_graph_pb2.SignatureDef] = meta_graph.signature_def
        try:
            self._session, self._feeds = _load_session(path, self.signatures)
        except StartupError:
            raise
        except Exception as error:  # a broken artifact raises many types; its reader gets one
            reason = clean_message(getattr(error, "message", None) or str(error))
            raise StartupError(
                "A version folder must hold a complete SavedModel that loads. "
                f"Received: {path}: {type(error).__name__}: {reason}"
            ) from error

    def run(
        self,
        feeds: Mapping[str, np.ndarray],
        fetches: Sequence[str],
        timeout_in_ms: int = 0,
    ) -> list[np.ndarray]:
        """Runs the graph once; safe to call from several threads.

        Args:
            feeds: Values by tensor name, for inputs of signatures.
            fetches: Tensor names.
            timeout_in_ms: Milliseconds after which the run is cancelled; 0 for no limit.

        Returns:
            The fetched arrays, in the order of `fetches`.

        Raises:
            ServingError: If the graph fails, with the graph's own code and message.
        """
        options = tf.compat.v1.RunOptions(timeout_in_ms=timeout_in_ms)
        try:
            results = self._session.run(
                # An output that is an input passed through is fetched where it is fed.
                [self._feeds.get(name, name) for name in fetches],
                {self._feeds[name]: value for name, value in feeds.items()},
                options=options,
            )
        except tf.errors.OpError as error:
            raise from_tensorflow(error) from error
        return [as_array(result) for result in results]

    def call(self, signature_name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs a signature; safe to call from several threads.

        Args:
            signature_name: A name in `signatures`.
            inputs: Arrays by the names of the inputs.

        Returns:
            Arrays by the names of the outputs.

        Raises:
            ServingError: If the graph fails, with the graph's own code and message.
        """
        signature = self.signatures[signature_name]
        feeds = {signature.inputs[name].name: value for name, value in inputs.items()}
        names = list(signature.outputs)
        arrays = self.run(feeds, [signature.outputs[name].name for name in names])
        return dict(zip(names, arrays, strict=True))

    def close(self) -> None:
        """Cancels what still runs and frees the session."""
        self._session.close()


def _read_meta_graph(path: Path) -> meta_graph_pb2.MetaGraphDef:
    """Reads the graph tagged for serving, for its signatures."""
    file = path / SAVED_MODEL_FILE
    saved_model = saved_model_pb2.SavedModel()
    try:
        saved_model.ParseFromString(file.read_bytes())
    except FileNotFoundError as error:
        raise StartupError(
            f"A version folder must hold {SAVED_MODEL_FILE}. Received: {path}, which does not; "
            "was its export interrupted?"
        ) from error
    except DecodeError as error:
        raise StartupError(
            f"{SAVED_MODEL_FILE} must be a complete SavedModel. Received: {file}, "
            f"{file.stat().st_size} bytes that cannot be parsed; export it again"
        ) from error
    for meta_graph in saved_model.meta_graphs:
        if set(meta_graph.meta_info_def.tags) == {_SERVE_TAG}:
            return meta_graph
    tags = [sorted(meta_graph.meta_info_def.tags) for meta_graph in saved_model.meta_graphs]
    raise StartupError(
        f"A SavedModel must hold a graph tagged '{_SERVE_TAG}'. Received: {file}, tags {tags}"
    )


def _load_session(
    path: Path, signatures: Mapping[str, meta_graph_pb2.SignatureDef]
) -> tuple[tf.compat.v1.Session, dict[str, tf.Tensor]]:
    """Restores a SavedModel, with the tokenization ops of tensorflow-text where it needs them."""
    try:
        return _restore(path, signatures)
    except (tf.errors.NotFoundError, ValueError, RuntimeError) as error:
        if "Op type not registered" not in str(error):
            raise
        _register_text_ops(path, error)
    return _restore(path, signatures)


def _restore(
    path: Path, signatures: Mapping[str, meta_graph_pb2.SignatureDef]
) -> tuple[tf.compat.v1.Session, dict[str, tf.Tensor]]:
    """Returns a session with the graph and its variables, and the placeholder of every input."""
    # The loader announces that it belongs to TensorFlow 1. It is the one that TensorFlow Serving
    # uses, so it is used on purpose.
    tf.get_logger().setLevel(logging.ERROR)
    graph = tf.Graph()
    session = tf.compat.v1.Session(graph=graph)
    # Every input is fed through a placeholder of unknown shape, because Python's session refuses
    # shapes that differ from the signature's and TensorFlow Serving does not.
    feeds = {}
    with graph.as_default():
        for signature in signatures.values():
            for info in signature.inputs.values():
                if info.name and info.name not in feeds:
                    feeds[info.name] = tf.compat.v1.placeholder(
                        tf.as_dtype(info.dtype).base_dtype,
                        name=f"kerasllm_serving_input_{len(feeds)}",
                    )
        tf.compat.v1.saved_model.load(session, [_SERVE_TAG], str(path), input_map=feeds)
    return session, feeds


def _register_text_ops(path: Path, missing: Exception) -> None:
    """Loads the op library of tensorflow-text, which TensorFlow Serving has linked in."""
    try:
        import tensorflow_text  # noqa: F401
    except ImportError as error:
        raise StartupError(
            "The ops of a SavedModel must be known to this process. "
            f"Received: {path}: {str(missing).partition(' in binary')[0]}. "
            f"Install the tensorflow-text release that matches tensorflow {tf.__version__}"
        ) from error
