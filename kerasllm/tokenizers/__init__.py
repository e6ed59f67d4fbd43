"""Text to ids and back inside the TensorFlow graph, with ids equal to Hugging Face's."""

from kerasllm.tokenizers.base import Tokenizer
from kerasllm.tokenizers.byte_bpe import ByteBPETokenizer
from kerasllm.tokenizers.character import CharacterTokenizer
from kerasllm.tokenizers.decoding import StreamingDecoder
from kerasllm.tokenizers.sentencepiece import SentencePieceBPETokenizer
from kerasllm.tokenizers.train import train_tokenizer
from kerasllm.tokenizers.unigram import UnigramTokenizer
from kerasllm.tokenizers.word import WordTokenizer
from kerasllm.tokenizers.wordpiece import WordPieceTokenizer

__all__ = [
    "ByteBPETokenizer",
    "CharacterTokenizer",
    "SentencePieceBPETokenizer",
    "StreamingDecoder",
    "Tokenizer",
    "UnigramTokenizer",
    "WordPieceTokenizer",
    "WordTokenizer",
    "train_tokenizer",
]
