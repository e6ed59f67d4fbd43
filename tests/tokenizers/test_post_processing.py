"""The special tokens that a tokenizer puts around its texts, as `tokenizers` puts them."""

import json

import pytest
import tensorflow as tf
import tokenizers
from reference.tokenizer_kinds import train_byte_level
from tokenizers import processors

from kerasllm.tokenizers import Tokenizer

TEXTS = ["", "a", "hello low", " <s> x"]
SECOND = ["b", "", "lower", "y"]
PROCESSORS = {
    "none": None,
    "bytes": processors.ByteLevel(trim_offsets=True),
    "bert": processors.BertProcessing(("</s>", 257), ("<s>", 256)),
    "roberta": processors.RobertaProcessing(("</s>", 257), ("<s>", 256), trim_offsets=True),
    "template": processors.TemplateProcessing(
        single="<s> $A </s>:1", pair="$B:3 </s>:2 $A:1 <s>:0", special_tokens=[("<s>", 256), ("</s>", 257)]
    ),
    "repeated": processors.TemplateProcessing(
        single="$A <s> $A", pair="$A $B $B", special_tokens=[("<s>", 256)]
    ),
    "sequence": processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 256)]
            ),
        ]
    ),
}


@pytest.fixture(scope="module")
def plain() -> tokenizers.Tokenizer:
    return train_byte_level("gpt2", ["a"], 256, ["<s>", "</s>"])


@pytest.mark.parametrize("name", PROCESSORS)
def test_single_texts_and_pairs(plain, name):
    reference = tokenizers.Tokenizer.from_str(plain.to_str())
    if PROCESSORS[name] is not None:
        reference.post_processor = PROCESSORS[name]
    tokenizer = Tokenizer.from_json(reference.to_str())
    reference.encode_special_tokens = True
    for add_special_tokens in (False, True):
        expected = reference.encode_batch(TEXTS, add_special_tokens=add_special_tokens)
        received = tokenizer.encode(TEXTS, add_special_tokens=add_special_tokens)
        # Without the template a text is there once.
        once = 2 if name == "repeated" and not add_special_tokens else 1
        assert received == [e.ids[: len(e.ids) // once] for e in expected]
        pairs = list(zip(TEXTS, SECOND, strict=True))
        expected = reference.encode_batch(pairs, add_special_tokens=add_special_tokens)
        ids, type_ids = tokenizer.tokenize_pairs(TEXTS, SECOND, add_special_tokens=add_special_tokens)
        assert ids.to_list() == [e.ids for e in expected]
        assert type_ids.to_list() == [e.type_ids for e in expected]
        assert ids.dtype == type_ids.dtype == tf.int32


def test_in_a_graph(plain):
    config = json.loads(plain.to_str())
    config["post_processor"] = {"type": "BertProcessing", "sep": ["</s>", 257], "cls": ["<s>", 256]}
    tokenizer = Tokenizer.from_json(json.dumps(config))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)] * 2)
    def tokenize(texts, second):
        return tokenizer.tokenize(texts, add_special_tokens=True), *tokenizer.tokenize_pairs(texts, second)

    ids, pair_ids, type_ids = tokenize(tf.constant(["a", "bc"]), tf.constant(["d", ""]))
    a, b, c, d = tokenizer.encode("abcd")
    assert ids.to_list() == [[256, a, 257], [256, b, c, 257]]
    assert pair_ids.to_list() == [[256, a, 257, d, 257], [256, b, c, 257, 257]]
    assert type_ids.to_list() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
}
REFUSED = {
    "unknown": ({"type": "Magic"}, "'Magic'"),
    "no object": ("Magic", "must be an object"),
    "two": ({"type": "Sequence", "processors": [TEMPLATE, TEMPLATE]}, "one step at most"),
    "no text": (TEMPLATE | {"single": []}, "must hold the texts"),
    "no second text": (TEMPLATE | {"pair": TEMPLATE["single"]}, "must hold the texts"),
    "unknown token": (TEMPLATE | {"single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}]}, "must name"),
    "huge type": (TEMPLATE | {"single": [{"Sequence": {"id": "A", "type_id": 10**20}}]}, "must name"),
    "piece": (TEMPLATE | {"single": [5]}, "one entry"),
    "inner": (TEMPLATE | {"single": [{"Sequence": 5}]}, "`Sequence` must be of the type dict"),
    "ids": (TEMPLATE | {"special_tokens": {"<s>": {"ids": ["x"]}}}, "must have ids"),
    "outside": (
        TEMPLATE
        | {
            "special_tokens": {"<s>": {"ids": [10**12]}},
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, *TEMPLATE["single"]],
        },
        "must be from 0 to",
    ),
    "bert": ({"type": "BertProcessing", "sep": ["</s>"], "cls": ["<s>", 256]}, "a token and its id"),
    "bert type": (
        {"type": "BertProcessing", "sep": ["</s>", "x"], "cls": ["<s>", 256]},
        "a token and its id",
    ),
    "bert nothing": ({"type": "BertProcessing"}, "`sep` must be of the type list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_unsupported_is_refused(plain, name):
    post_processor, message = REFUSED[name]
    config = json.loads(plain.to_str()) | {"post_processor": post_processor}
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_json(json.dumps(config))
