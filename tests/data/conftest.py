"""Tokenizers of the kinds that masked and span-corrupted models have."""

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from kerasllm.data import generate_stories
from kerasllm.tokenizers import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def stories():
    return generate_stories(300)


@pytest.fixture(scope="session")
def bert_tokenizer(stories):
    """WordPiece with [CLS] and [SEP] around each text, and with so few tokens that words have several."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special_tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    settings = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    return Tokenizer.from_json(tokenizer.to_str(), settings=settings)


@pytest.fixture(scope="session")
def t5_tokenizer(stories):
    """Characters, an end-of-text token, and as many sentinels as T5 has."""
    sentinels = [f"<extra_id_{number}>" for number in range(100)]
    return train_tokenizer("character", stories, special_tokens=["<pad>", "<|endoftext|>", *sentinels])
