"""Models as files that run without kerasllm: SavedModel for servers, LiteRT for devices."""

from kerasllm.export.litert import export_litert
from kerasllm.export.saved_model import (
    export_classifier,
    export_embedder,
    export_masked_lm,
    export_saved_model,
)

__all__ = [
    "export_classifier",
    "export_embedder",
    "export_litert",
    "export_masked_lm",
    "export_saved_model",
]
