"""A small tokenizer with BERT's special tokens."""

import functools

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from kerasllm.tokenizers import Tokenizer, wordpiece  # noqa

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
WORDS = (
    "the a cat dog bird sat ran flew on under mat tree good bad nice awful film book . ##s ##ing".split()
)


@functools.cache  # its graphs take longer to trace than the tests to run
def make_word_piece():
    """Makes the tokenizer: [PAD] [UNK] [CLS] [SEP] [MASK] and some words, 26 tokens."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL.values(), *WORDS])}
    reference = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    reference.normalizer = normalizers.BertNormalizer(lowercase=True)
    reference.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    reference.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    reference.decoder = decoders.WordPiece()
    reference.add_special_tokens(list(SPECIAL.values()))
    settings = {f"{name}_token": token for name, token in SPECIAL.items()}
    # Without it transformers gives no token types.
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return Tokenizer.from_json(reference.to_str(), settings=settings)
