"""Text → documents → windows of tokens as `tf.data`."""

from kerasllm.data.assets import asset_path
from kerasllm.data.packing import language_model_dataset, tokenize_documents, windows_dataset
from kerasllm.data.sources import read_documents, split_documents
from kerasllm.data.stories import generate_stories

__all__ = [
    "asset_path",
    "generate_stories",
    "language_model_dataset",
    "read_documents",
    "split_documents",
    "tokenize_documents",
    "windows_dataset",
]
