"""Finds and loads one version of a SavedModel and runs its signatures."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2, saved_model_pb2
from tensorflow.python.client import pywrap_tf_session

from kerasllm_serving.errors import StartupError, clean_message, from_tensorflow
from kerasllm_serving.tensor_proto import as_array

SAVED_MODEL_FILE = "saved_model.pb"
DEFAULT_SIGNATURE = "serving_default"
# What each folder that kerasllm has written holds, and no other does.
MANIFEST = Path("assets.extra", "kerasllm_manifest.json")
_HIDDEN_SIGNATURES = "kerasllm_signatures"
# Files for devices, which `kerasllm_serving.litert_model` serves.
LITERT_SUFFIXES = (".tflite", ".litertlm")


def find_versions(base_path: Path) -> dict[int, Path]:
    """Returns the version folders by their numbers, the highest last.

    Args:
        base_path: Folder that holds numeric version folders, as in `model/1`, `model/2`; whatever
            else lies there is ignored, so that an export may be written beside them first. Or a file
            for devices, which is version 1.

    Returns:
        The paths of the version folders, at least one.

    Raises:
        StartupError: If `base_path` is no folder, or holds no version.
    """
    if base_path.is_file() and base_path.suffix in LITERT_SUFFIXES:
        return {1: base_path}
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
    versions = {
        int(entry.name): entry
        for entry in base_path.iterdir()
        if entry.is_dir() and entry.name.isascii() and entry.name.isdecimal()
    }
    if not versions:
        found = ", ".join(sorted(entry.name for entry in base_path.iterdir())) or "nothing"
        raise StartupError(
            "`--model_base_path` must hold a numeric version folder such as 1. "
            f"Received: {base_path}, which holds: {found}"
        )
    return dict(sorted(versions.items()))


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How SavedModels are loaded and run.

    Args:
        tags: The tags of the graph to load.
        session_config: Threads and memory of the runtime, see `session_config_of`.
        checks_method_names: Whether a signature must be declared for the call that asks for it.
    """

    tags: tuple[str, ...] = ("serve",)
    session_config: config_pb2.ConfigProto | None = None
    checks_method_names: bool = False


class Servable:
    """One loaded SavedModel in a graph-mode session, which is how TensorFlow Serving runs it.

    Args:
        path: The version folder; its name is the version number.
        options: How it is loaded and run.

    Raises:
        StartupError: If the folder is no complete SavedModel.
    """

    def __init__(self, path: Path, options: ModelOptions | None = None) -> None:
        self.version = int(path.name)
        self.options = options or ModelOptions()
        meta_graph = _read_meta_graph(path, self.options.tags)
        self.signatures = _copy_signatures(meta_graph)
        # Those that no request reaches, of exports with slots.
        self.hidden: dict[str, meta_graph_pb2.SignatureDef] = {}
        for content in meta_graph.collection_def[_HIDDEN_SIGNATURES].bytes_list.value:
            self.hidden |= _copy_signatures(meta_graph_pb2.MetaGraphDef.FromString(content))
        try:
            self._session, feeds = _load_session(path, self.signatures | self.hidden, self.options)
        except StartupError:
            raise
        except Exception as error:  # a broken artifact raises many types; its reader gets one
            reason = clean_message(getattr(error, "message", None) or str(error))
            raise StartupError(
                "A version folder must hold a complete SavedModel that loads. "
                f"Received: {path}: {type(error).__name__}: {reason}"
            ) from error
        # Where tensors are, by their names, as the runtime numbers them; inputs are placeholders of ours.
        self._outputs = {name: tensor._as_tf_output() for name, tensor in feeds.items()}

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
        options = None
        if timeout_in_ms:
            run_options = config_pb2.RunOptions(timeout_in_ms=timeout_in_ms)
            options = pywrap_tf_session.TF_NewBufferFromString(run_options.SerializeToString())
        try:
            # What `Session.run` calls in the end; the rest of it, which looks up and checks names and
            # nests results, takes four times as long as a small graph.
            results = self._session._call_tf_sessionrun(
                options,
                {self._outputs[name]: value for name, value in feeds.items()},
                [self._find(name) for name in fetches if name not in feeds],
                [],
                None,
            )
        except tf.errors.OpError as error:
            raise from_tensorflow(error) from error
        finally:
            if options is not None:
                pywrap_tf_session.TF_DeleteBuffer(options)
        fetched = iter(results)
        # An output that is an input passed through is what was fed.
        return [as_array(feeds[name] if name in feeds else next(fetched)) for name in fetches]

    def _find(self, name: str) -> pywrap_tf_session.TF_Output:
        if name not in self._outputs:
            self._outputs[name] = self._session.graph.get_tensor_by_name(name)._as_tf_output()
        return self._outputs[name]

    def call(self, signature_name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs a signature; safe to call from several threads.

        Args:
            signature_name: A name in `signatures` or `hidden`.
            inputs: Arrays by the names of the inputs.

        Returns:
            Arrays by the names of the outputs.

        Raises:
            ServingError: If the graph fails, with the graph's own code and message.
        """
        signature = (self.signatures | self.hidden)[signature_name]
        feeds = {signature.inputs[name].name: value for name, value in inputs.items()}
        names = list(signature.outputs)
        arrays = self.run(feeds, [signature.outputs[name].name for name in names])
        return dict(zip(names, arrays, strict=True))

    def close(self) -> None:
        """Cancels what still runs and frees the session."""
        self._session.close()


def _copy_signatures(meta_graph: meta_graph_pb2.MetaGraphDef) -> dict[str, meta_graph_pb2.SignatureDef]:
    """Returns the signatures as copies, so that the graph around them goes."""
    signatures = {}
    for name, signature in meta_graph.signature_def.items():
        signatures[name] = meta_graph_pb2.SignatureDef()
        signatures[name].CopyFrom(signature)
    return signatures


def _read_meta_graph(path: Path, tags: Sequence[str]) -> meta_graph_pb2.MetaGraphDef:
    """Reads the graph with these tags, for its signatures."""
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
        if set(meta_graph.meta_info_def.tags) == set(tags):
            return meta_graph
    found = [sorted(meta_graph.meta_info_def.tags) for meta_graph in saved_model.meta_graphs]
    raise StartupError(
        f"A SavedModel must hold a graph tagged {', '.join(map(repr, tags))}. "
        f"Received: {file}, tags {found}"
    )


def _load_session(
    path: Path, signatures: Mapping[str, meta_graph_pb2.SignatureDef], options: ModelOptions
) -> tuple[tf.compat.v1.Session, dict[str, tf.Tensor]]:
    """Restores a SavedModel, with the tokenization ops of tensorflow-text where it needs them."""
    try:
        return _restore(path, signatures, options)
    except (tf.errors.NotFoundError, ValueError, RuntimeError) as error:
        if "Op type not registered" not in str(error):
            raise
        _register_text_ops(path, error)
    return _restore(path, signatures, options)


def _restore(
    path: Path, signatures: Mapping[str, meta_graph_pb2.SignatureDef], options: ModelOptions
) -> tuple[tf.compat.v1.Session, dict[str, tf.Tensor]]:
    """Returns a session with the graph and its variables, and the placeholder of every input."""
    # The loader announces that it belongs to TensorFlow 1. It is the one that TensorFlow Serving
    # uses, so it is used on purpose.
    tf.get_logger().setLevel(logging.ERROR)
    graph = tf.Graph()
    session = tf.compat.v1.Session(graph=graph, config=session_config_of(path, options))
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
        tf.compat.v1.saved_model.load(session, list(options.tags), str(path), input_map=feeds)
    # Before threads ask for runs.
    session._extend_graph()
    return session, feeds


def session_config_of(path: Path, options: ModelOptions) -> config_pb2.ConfigProto:
    """Returns how the runtime treats a folder: as the options say, exports of kerasllm without Grappler.

    To optimize their graphs before the first call of each signature takes a fifth to two fifths of the time
    in which a server of such a folder starts, and calls are no quicker for it: XLA optimizes itself what it
    compiles, and the rest is mostly products of matrices. Of other folders nothing is known, so they are
    optimized, as TensorFlow Serving does; and so is any if the options say something about it.

    Args:
        path: The version folder.
        options: How it is loaded.

    Returns:
        The configuration of its session.
    """
    config = config_pb2.ConfigProto()
    if options.session_config is not None:
        config.CopyFrom(options.session_config)
    if (path / MANIFEST).is_file() and not config.graph_options.HasField("rewrite_options"):
        config.graph_options.rewrite_options.disable_meta_optimizer = True
    return config


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
