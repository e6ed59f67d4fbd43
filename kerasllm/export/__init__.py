"""Models as files that run without kerasllm: SavedModel for servers, LiteRT for devices."""

from kerasllm.export.batching import Batching
from kerasllm.export.deployment import write_deployment
from kerasllm.export.extra import describe_source
from kerasllm.export.litert import export_litert
from kerasllm.export.litert_encoder import export_litert_encoder, export_litert_seq2seq
from kerasllm.export.litertlm import export_litertlm
from kerasllm.export.release import release
from kerasllm.export.saved_model import (
    export_classifier,
    export_embedder,
    export_masked_lm,
    export_saved_model,
)
from kerasllm.export.verify import VerificationError, verify_export

__all__ = [
    "Batching",
    "VerificationError",
    "describe_source",
    "export_classifier",
    "export_embedder",
    "export_litert",
    "export_litert_encoder",
    "export_litert_seq2seq",
    "export_litertlm",
    "export_masked_lm",
    "export_saved_model",
    "release",
    "verify_export",
    "write_deployment",
]
