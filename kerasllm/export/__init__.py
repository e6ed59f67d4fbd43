"""Models as files that run without kerasllm: SavedModel for servers, LiteRT for devices."""

from kerasllm.export.litert import export_litert
from kerasllm.export.saved_model import export_saved_model

__all__ = ["export_litert", "export_saved_model"]
