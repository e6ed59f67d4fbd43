"""Requests that lie beside a model, run before it is served."""

from pathlib import Path

import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from kerasllm_serving.core import run_predict
from kerasllm_serving.errors import StartupError
from kerasllm_serving.model import Servable

FILE = Path("assets.extra", "tf_serving_warmup_requests")
_MOST_RECORDS = 1000  # as in TensorFlow Serving


def warm_up(servable: Servable, path: Path) -> int:
    """Runs the Predict requests of a version folder; those of other calls are passed over.

    Args:
        servable: The loaded version.
        path: Its folder.

    Returns:
        How many requests were run.

    Raises:
        StartupError: If the file is damaged or has too many records.
        ServingError: If a request fails.
    """
    if not (path / FILE).is_file():
        return 0
    count = 0
    try:
        for number, record in enumerate(tf.data.TFRecordDataset(str(path / FILE)).as_numpy_iterator()):
            if number >= _MOST_RECORDS:
                raise StartupError(f"Warm-up requests must be at most {_MOST_RECORDS}. Received: more")
            log = prediction_log_pb2.PredictionLog.FromString(record)
            if log.HasField("predict_log"):
                run_predict(servable, log.predict_log.request)
                count += 1
    except (tf.errors.DataLossError, ValueError) as error:
        raise StartupError(
            f"Warm-up requests must be a TFRecord file. Received: {path / FILE}: {error}"
        ) from error
    return count
