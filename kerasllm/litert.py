"""Runs an exported `.tflite` on this machine, with what the server runs it with; no TensorFlow."""

from kerasllm_serving.litert import (
    CachedModel,
    Encoder,
    Generator,
    choose_token,
    generate,
    uniform_numbers,
    weight_cache,
)

__all__ = [
    "CachedModel",
    "Encoder",
    "Generator",
    "choose_token",
    "generate",
    "uniform_numbers",
    "weight_cache",
]
