"""Text → documents → tokens → batches for training, as `tf.data`."""

from kerasllm.data.assets import asset_path
from kerasllm.data.documents import documents_dataset
from kerasllm.data.masking import masked_lm_dataset
from kerasllm.data.packing import language_model_dataset, windows_dataset
from kerasllm.data.padding import padded_batches
from kerasllm.data.prefix import prefix_lm_dataset
from kerasllm.data.segments import packed_dataset
from kerasllm.data.sources import read_documents, read_records, split_documents
from kerasllm.data.span_corruption import span_corruption_dataset
from kerasllm.data.stories import generate_stories
from kerasllm.data.tokens import tokenize_documents

__all__ = [
    "asset_path",
    "documents_dataset",
    "generate_stories",
    "language_model_dataset",
    "masked_lm_dataset",
    "packed_dataset",
    "padded_batches",
    "prefix_lm_dataset",
    "read_documents",
    "read_records",
    "span_corruption_dataset",
    "split_documents",
    "tokenize_documents",
    "windows_dataset",
]
