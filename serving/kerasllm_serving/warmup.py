"""Requests that lie beside a model, run before it is served."""

from pathlib import Path

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import prediction_log_pb2

from kerasllm_serving.core import run_predict
from kerasllm_serving.errors import StartupError, unimplemented
from kerasllm_serving.inference import Run, run_classify, run_multi_inference, run_regress
from kerasllm_serving.model import Servable

FILE = Path("assets.extra", "tf_serving_warmup_requests")
_MOST_RECORDS = 1000  # as in TensorFlow Serving


_RUNS = {
    "predict_log": run_predict,
    "classify_log": run_classify,
    "regress_log": run_regress,
    "multi_inference_log": run_multi_inference,
}


def warm_up(servable: Servable, path: Path, run: Run, iterations: int = 1) -> int:
    """Runs the requests of a version folder.

    Args:
        servable: The loaded version.
        path: Its folder.
        run: Runs its graph.
        iterations: How often each request is run.

    Returns:
        How many requests the folder has.

    Raises:
        StartupError: If the file is damaged or has too many records.
        ServingError: If a request fails, or is for a call that is none of requests.
    """
    if not (path / FILE).is_file():
        return 0
    count = 0
    try:
        for record in tf.data.TFRecordDataset(str(path / FILE)).as_numpy_iterator():
            if count == _MOST_RECORDS:
                raise StartupError(f"Warm-up requests must be at most {_MOST_RECORDS}. Received: more")
            log = prediction_log_pb2.PredictionLog.FromString(record)
            kind = log.WhichOneof("log_type")
            if kind in _RUNS:
                for _ in range(iterations):
                    _RUNS[kind](servable, getattr(log, kind).request, run)
            elif kind is not None:
                raise unimplemented(f"Unsupported log_type for warmup: {kind}")
            count += 1
    except (tf.errors.DataLossError, DecodeError) as error:
        raise StartupError(
            f"Warm-up requests must be a TFRecord file of PredictionLog. Received: {path / FILE}: {error}"
        ) from error
    return count
