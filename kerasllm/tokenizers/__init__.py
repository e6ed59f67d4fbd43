"""Text to ids and back inside the TensorFlow graph, with ids equal to Hugging Face's."""

from kerasllm.tokenizers.base import Tokenizer
from kerasllm.tokenizers.byte_bpe import ByteBPETokenizer
from kerasllm.tokenizers.character import CharacterTokenizer
from kerasllm.tokenizers.train import train_tokenizer
from kerasllm.tokenizers.word import WordTokenizer

__all__ = [
    "ByteBPETokenizer",
    "CharacterTokenizer",
    "Tokenizer",
    "WordTokenizer",
    "train_tokenizer",
]
