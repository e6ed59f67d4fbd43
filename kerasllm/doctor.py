"""What is installed, on what machine, and what is wrong with it."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from typing import NamedTuple

from packaging.requirements import Requirement

# Extra -> modules that must import for it to work.
EXTRAS = {
    "serving": ("grpc", "tensorflow_serving.apis.predict_pb2", "uvicorn", "kerasllm_serving"),
    "litert": (
        "ai_edge_litert.interpreter",
        "litert_lm",
        "litert_lm_builder",
        "litert_quantizer.quantizer",
    ),
    "test": ("pytest", "pytest_timeout"),
}


class Report(NamedTuple):
    """What `examine` found.

    Attributes:
        facts: Pairs of a name and what was found.
        problems: What is wrong, and what to do about it.
    """

    facts: list[tuple[str, str]]
    problems: list[str]


def examine() -> Report:
    """Looks at the Python environment and the machine.

    Returns:
        The report.
    """
    facts = [
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", f"{platform.platform()}, {len(os.sched_getaffinity(0))} processor cores"),
        ("free disk space", f"{shutil.disk_usage('.').free / 1e9:.0f} GB"),
    ]
    problems: list[str] = []
    _examine_versions(facts, problems)
    _examine_extras(facts, problems)
    _examine_tensorflow(facts, problems)
    return Report(facts, problems)


def _examine_versions(facts: list[tuple[str, str]], problems: list[str]) -> None:
    """Compares what is installed with the bounds that the package was tested under."""
    try:
        requirements = importlib.metadata.requires("kerasllm") or []
    except importlib.metadata.PackageNotFoundError:
        problems.append("kerasllm is not installed as a package: pip install -e . in its repository")
        return
    for requirement in sorted((Requirement(text) for text in requirements), key=lambda r: r.name.lower()):
        optional = requirement.marker is not None
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            facts.append(
                (requirement.name, "not installed" + (f" ({requirement.marker})" if optional else ""))
            )
            if not optional:
                problems.append(f"{requirement.name} is missing: pip install '{requirement}'")
            continue
        facts.append((requirement.name, version))
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(
                f"{requirement.name} must be {requirement.specifier}. Found: {version}. "
                f"pip install '{requirement.name}{requirement.specifier}'"
            )


def _examine_extras(facts: list[tuple[str, str]], problems: list[str]) -> None:
    for extra, modules in EXTRAS.items():
        missing = []
        for module in modules:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                missing.append(error.name or module)
            except (
                Exception
            ) as error:  # a broken wheel can fail in any way, and this is the place to say so
                problems.append(f"{module} is installed but does not import: {error}")
        facts.append((f"extra [{extra}]", "complete" if not missing else f"missing: {', '.join(missing)}"))


def _examine_tensorflow(facts: list[tuple[str, str]], problems: list[str]) -> None:
    try:
        import keras
        import tensorflow as tf
    except Exception as error:
        problems.append(f"TensorFlow and Keras must import: {error}")
        return
    backend = keras.backend.backend()
    facts.append(("Keras backend", backend))
    if backend != "tensorflow":
        problems.append(
            "Export and serving need the TensorFlow backend: set KERAS_BACKEND=tensorflow. "
            f"Found: {backend}"
        )
    devices = [
        device.name.removeprefix("/physical_device:") for device in tf.config.list_physical_devices()
    ]
    facts.append(("devices", ", ".join(devices)))
    if tf.test.is_built_with_cuda() and shutil.which("nvidia-smi") and not any("GPU" in d for d in devices):
        problems.append(
            "There is an NVIDIA GPU that TensorFlow does not see: pip install 'tensorflow[and-cuda]'"
        )
    total = tf.reduce_sum(tf.linalg.matmul(tf.eye(8), tf.eye(8)))
    if float(total) != 8.0:
        problems.append(f"A product of two identity matrices must sum to 8. Computed: {float(total)}")
