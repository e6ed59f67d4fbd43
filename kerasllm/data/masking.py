"""Documents → texts with some tokens hidden, which a masked language model finds again."""

import json

import numpy as np
import tensorflow as tf

from kerasllm.data.batching import batch_rows, check_sequence_length, pad_row
from kerasllm.data.tokens import Documents, cut_spans, read_tokens
from kerasllm.tokenizers import Tokenizer, WordPieceTokenizer, WordTokenizer


def masked_lm_dataset(
    documents: Documents,
    tokenizer: Tokenizer,
    sequence_length: int,
    batch_size: int,
    *,
    mask_rate: float = 0.15,
    mask_fraction: float = 0.8,
    random_fraction: float = 0.1,
    whole_words: bool = False,
    new_masks: bool = True,
    shuffle: bool = False,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    repeat: bool = False,
    passes: int | None = None,
    drop_remainder: bool = False,
) -> tf.data.Dataset:
    """Hides tokens of documents at random for a masked language model, as BERT does.

    Each token is selected with the probability `mask_rate`. Of the selected ones `mask_fraction` become
    the mask token and `random_fraction` a random token; the others stay as they are. The model has to
    say what all of the selected ones were. Special tokens are never selected and never a random token.
    Devlin et al., "BERT", 2019.

    A row is one document with the tokenizer's special tokens around it; a document that is too long is
    cut into several rows.

    Args:
        documents: texts, a finite `tf.data.Dataset` of scalar strings, or what `tokenize_documents`
            returns with `end_of_text=False`.
        tokenizer: turns strings into ids; it must have a mask token.
        sequence_length: tokens in a row, special tokens included.
        batch_size: rows per batch.
        mask_rate: share of the tokens to select, above 0 and at most 1.
        mask_fraction: share of the selected tokens that become the mask token.
        random_fraction: share of the selected tokens that become a random token.
        whole_words: whether to select words, each with all of its tokens or none; `word_table` says what
            a word is. What becomes of a selected token is still drawn for each by itself.
        new_masks: whether other tokens are selected in each pass. False is for validation.
        shuffle: whether rows come in random order, a new one in each pass: in each round of `repeat`, and
            otherwise each time the dataset is iterated.
        seed: chooses masks and orders; with `repeat` or `passes` they follow from it alone, otherwise
            also from `tf.random.set_seed`.
        shard: (index, count) of the part to return; rows are dealt out in turn.
        repeat: whether to go on without end. Batches then run over the end of a pass, and none is short.
        passes: how many passes, the n-th in an order that follows from `seed` and n; None: one, in another
            order each time the dataset is iterated.
        drop_remainder: whether to leave out the last batch of a pass if it is short.

    Returns:
        A dataset of ({"token_ids", "attention_mask"}, labels, weights), all [batch, sequence_length] and
        int32 except for the float32 weights. `labels` are the tokens before masking; `weights` are 1
        where a token was selected and 0 elsewhere. `attention_mask` is 0 where a row is filled up.

    Raises:
        TypeError: `documents` is one string, or holds something else than strings.
        ValueError: an argument is out of range, the tokenizer has no mask token, no document has a
            token, or there are too few rows: none for the shard, or no full batch with `drop_remainder`.
    """
    check_sequence_length(sequence_length)
    _check_rates(mask_rate, mask_fraction, random_fraction)
    if tokenizer.mask_id is None:
        raise ValueError(
            "the tokenizer must have a mask token, which its settings name as `mask_token`. Received: none"
        )
    token_ids, document_lengths = read_tokens(documents, tokenizer, end_of_text=False)
    rows = _rows_with_special_tokens(token_ids, document_lengths, tokenizer, sequence_length)
    is_special = np.zeros(tokenizer.vocabulary_size, bool)
    is_special[list(tokenizer.special_tokens.values())] = True
    ordinary_ids = np.flatnonzero(~is_special)
    if not ordinary_ids.size:
        raise ValueError("the tokenizer must have tokens that are not special. Received: none")
    ordinary_count = float(ordinary_ids.size)
    mask_id, pad_id = tokenizer.mask_id, tokenizer.pad_id or 0
    with tf.device("CPU:0"):  # tf.data runs there; tensors that it captures should lie there.
        is_special = tf.constant(is_special)
        ordinary_ids = tf.constant(ordinary_ids, tf.int32)
        if whole_words:
            begins_word, ends_line = (tf.constant(column) for column in word_table(tokenizer))

    def make_row(row: tf.Tensor, seed: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor, tf.Tensor]:
        ids = rows[row]
        length = tf.size(ids)
        draws = tf.random.stateless_uniform([3, length + 1], seed, alg="philox")
        select_draws, change_draws, id_draws = tf.unstack(draws)
        if whole_words:
            is_first = tf.gather(begins_word, ids) | tf.pad(tf.gather(ends_line, ids)[:-1], [[1, 0]])
            word_numbers = tf.cumsum(tf.cast(is_first, tf.int32))  # from 0, or from 1
            select_draws = tf.gather(select_draws, word_numbers)
        else:
            select_draws = select_draws[:length]
        is_selected = (select_draws < mask_rate) & ~tf.gather(is_special, ids)

        random_numbers = tf.cast(id_draws[:length] * ordinary_count, tf.int32)
        random_ids = tf.gather(ordinary_ids, random_numbers)
        change_draws = change_draws[:length]
        changed = tf.where(change_draws < mask_fraction + random_fraction, random_ids, ids)
        changed = tf.where(change_draws < mask_fraction, mask_id, changed)
        inputs = {
            "token_ids": pad_row(tf.where(is_selected, changed, ids), sequence_length, pad_id),
            "attention_mask": pad_row(tf.ones_like(ids), sequence_length),
        }
        labels = pad_row(ids, sequence_length, pad_id)
        return inputs, labels, pad_row(tf.cast(is_selected, tf.float32), sequence_length)

    return batch_rows(
        int(rows.nrows()),
        make_row,
        batch_size,
        shuffle=shuffle,
        seed=seed,
        shard=shard,
        repeat=repeat,
        drop_remainder=drop_remainder,
        new_draws=new_masks,
        passes=passes,
    )


def word_table(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Says where words begin: at a token that begins one, and after a token that ends a line.

    With WordPiece all but the continuations ("##ing") begin a word, with a word tokenizer all tokens do,
    and otherwise those that begin with white space, such as the space mark of SentencePiece. Special
    tokens always do.

    Args:
        tokenizer: the tokenizer.

    Returns:
        (begins a word, ends a line), bool [vocabulary_size] each.
    """
    ids = range(tokenizer.vocabulary_size)
    ends_line = np.zeros(len(ids), bool)
    if isinstance(tokenizer, WordPieceTokenizer):
        prefix = json.loads(tokenizer.to_json())["model"].get("continuing_subword_prefix", "##")
        begins_word = np.array([not tokenizer.id_to_token(id).startswith(prefix) for id in ids])
    elif isinstance(tokenizer, WordTokenizer):
        begins_word = np.ones(len(ids), bool)
    else:
        token_bytes = [tokenizer.token_bytes(id) for id in ids]
        begins_word = np.array([text[:1].isspace() for text in token_bytes])
        ends_line = np.array([text.endswith((b"\n", b"\r")) for text in token_bytes])
    begins_word[list(tokenizer.special_tokens.values())] = True
    return begins_word, ends_line


def _rows_with_special_tokens(
    token_ids: np.ndarray, document_lengths: np.ndarray, tokenizer: Tokenizer, sequence_length: int
) -> tf.RaggedTensor:
    """Documents in pieces that fit, each with its special tokens: int32 [rows, None]."""
    with tf.device("CPU:0"):
        nothing = tf.RaggedTensor.from_row_lengths(tf.zeros([0], tf.int32), [0])
        special_count = int(tokenizer.with_special_tokens(nothing)[0].row_lengths()[0])
        if sequence_length <= special_count:
            raise ValueError(
                f"`sequence_length` must leave room beside the {special_count} special tokens of a text. "
                f"Received: sequence_length={sequence_length}"
            )
        starts = np.cumsum(document_lengths) - document_lengths
        _, lengths = cut_spans(starts, document_lengths, sequence_length - special_count)
        if not lengths.size:
            raise ValueError(
                f"a document must have a token. Received: {len(document_lengths)} documents without any"
            )
        pieces = tf.RaggedTensor.from_row_lengths(tf.constant(token_ids), lengths)
        return tokenizer.with_special_tokens(pieces)[0]


def _check_rates(mask_rate: float, mask_fraction: float, random_fraction: float) -> None:
    if not 0.0 < mask_rate <= 1.0:
        raise ValueError(f"`mask_rate` must be above 0 and at most 1. Received: mask_rate={mask_rate}")
    fractions_fit = mask_fraction + random_fraction <= 1.0 + 1e-9
    if not (mask_fraction >= 0.0 and random_fraction >= 0.0 and fractions_fit):
        raise ValueError(
            "`mask_fraction` and `random_fraction` must not be negative and add up to 1 at most. "
            f"Received: mask_fraction={mask_fraction}, random_fraction={random_fraction}"
        )
