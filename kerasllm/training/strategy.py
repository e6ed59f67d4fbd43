"""Which devices and processes a training is spread over."""

import json
import os

import tensorflow as tf

STRATEGIES = ("auto", "one", "mirrored", "multi_worker", "tpu")


def make_strategy(name: str = "auto") -> tf.distribute.Strategy:
    """Makes a strategy; models are made and compiled in its `scope()`.

    Several workers must be known before TensorFlow runs anything: call this first.

    Args:
        name: `"one"`: one device. `"mirrored"`: a replica on each GPU of this machine. `"multi_worker"`:
            one or more on each worker that `TF_CONFIG` names. `"tpu"`: on each core of a Cloud TPU; never
            run by us. `"auto"`: several workers if `TF_CONFIG` names them, or else all GPUs.

    Returns:
        The strategy.

    Raises:
        ValueError: If there is no such strategy, or what it needs is not there.
    """
    if name not in STRATEGIES:
        raise ValueError(f"The strategy must be one of {STRATEGIES}. Received: {name!r}")
    workers = _count_workers()
    gpus = tf.config.list_physical_devices("GPU")
    if name == "auto":
        name = "multi_worker" if workers > 1 else "mirrored" if len(gpus) > 1 else "one"
    if name == "one":
        return tf.distribute.get_strategy()
    if name == "mirrored":
        if not gpus:
            raise ValueError('The strategy "mirrored" needs a GPU. Received: a machine without one')
        return tf.distribute.MirroredStrategy()
    if name == "multi_worker":
        if not workers:
            raise ValueError(
                'The strategy "multi_worker" needs `TF_CONFIG`, which `kerasllm launch` sets or prints. '
                "Received: none"
            )
        return tf.distribute.MultiWorkerMirroredStrategy()
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver()
    tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)


def _count_workers() -> int:
    """How many workers `TF_CONFIG` names; 0 if there is none."""
    text = os.environ.get("TF_CONFIG")
    if not text:
        return 0
    try:
        config = json.loads(text)
        cluster, task = config["cluster"], config["task"]
        workers = [
            (kind, number) for kind in ("chief", "worker") for number in range(len(cluster.get(kind, ())))
        ]
        if (task["type"], int(task["index"])) not in workers:
            raise ValueError(f"{task} is none of {workers}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            "`TF_CONFIG` must be JSON with the addresses in `cluster` and this process's place in `task`. "
            f"Received: {text} ({error!r})"
        ) from error
    return len(workers)
