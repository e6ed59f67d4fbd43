"""Documents → texts with spans cut out and the spans, for an encoder-decoder as T5."""

import numpy as np
import tensorflow as tf

from kerasllm.data.batching import batch_rows, check_sequence_length, pad_row, shuffle_values
from kerasllm.data.tokens import Documents, cut_spans, read_tokens
from kerasllm.tokenizers import Tokenizer


def span_corruption_dataset(
    documents: Documents,
    tokenizer: Tokenizer,
    sequence_length: int,
    batch_size: int,
    *,
    decoder_start_id: int,
    noise_rate: float = 0.15,
    mean_span_length: float = 3.0,
    new_spans: bool = True,
    shuffle: bool = False,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    repeat: bool = False,
    drop_remainder: bool = False,
) -> tf.data.Dataset:
    """Cuts random spans out of documents for an encoder-decoder, as T5 does.

    The documents are put end to end, without anything between them, and cut into rows of
    `sequence_length` tokens; a single token that is left over at the end is left out. In each row spans
    of noise take turns with spans that stay, which come first. In the source each span of noise is
    replaced by a sentinel, `<extra_id_0>`, `<extra_id_1>` and so on; the target is those sentinels, each
    followed by the tokens of its span. Both end with the end-of-text token. How many tokens and spans are
    noise is fixed: of 512 tokens 77 in 26 spans, so that a source has 462 tokens and a target 104. Raffel
    et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2020.

    Args:
        documents: texts, a finite `tf.data.Dataset` of scalar strings, or what `tokenize_documents`
            returns with `end_of_text=False`.
        tokenizer: turns strings into ids; it must have sentinels and an end-of-text token.
        sequence_length: tokens of a text before spans are cut out, at least 2.
        batch_size: rows per batch.
        decoder_start_id: the id that the decoder begins with, the model's `config.decoder_start_id`.
        noise_rate: share of the tokens to cut out, between 0 and 1 (exclusive).
        mean_span_length: mean number of tokens in a span of noise, at least 1.
        new_spans: whether other spans are cut out in each pass. False is for validation.
        shuffle: whether rows come in random order, a new one in each pass: in each round of `repeat`, and
            otherwise each time the dataset is iterated.
        seed: chooses spans and orders; with `repeat` they follow from it alone, without it also from
            `tf.random.set_seed`.
        shard: (index, count) of the part to return; rows are dealt out in turn.
        repeat: whether to go on without end. Batches then run over the end of a pass, and none is short.
        drop_remainder: whether to leave out the last batch of a pass if it is short.

    Returns:
        A dataset of ({"source_ids", "memory_mask", "token_ids"}, labels, weights), as `Seq2SeqLM` trains
        on: int32 `source_ids` and `memory_mask` [batch, source_length], int32 `token_ids` and `labels`
        and float32 `weights` [batch, target_length]. `token_ids` are the labels one further, after
        `decoder_start_id`. Where a row is filled up, `memory_mask` and `weights` are 0.

    Raises:
        TypeError: `documents` is one string, or holds something else than strings.
        ValueError: an argument is out of range, the tokenizer lacks sentinels or an end-of-text token,
            there are fewer than two tokens, or there are too few rows: none for the shard, or no full
            batch with `drop_remainder`.
    """
    check_sequence_length(sequence_length)
    _check_noise(sequence_length, noise_rate, mean_span_length)
    if not 0 <= decoder_start_id < tokenizer.vocabulary_size:
        raise ValueError(
            f"`decoder_start_id` must be from 0 to {tokenizer.vocabulary_size - 1}. "
            f"Received: decoder_start_id={decoder_start_id}"
        )
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer must have an end-of-text token. Received: none")
    noise_count, span_count = count_noise(sequence_length, noise_rate, mean_span_length)
    sentinel_ids = _sentinel_ids(tokenizer, span_count)
    token_ids, _ = read_tokens(documents, tokenizer, end_of_text=False)
    starts, lengths = cut_spans(np.array([0]), np.array([token_ids.size]), sequence_length)
    starts, lengths = starts[lengths > 1], lengths[lengths > 1]
    if not lengths.size:
        raise ValueError(
            f"there must be at least two tokens, one to keep and one to cut out. Received: {token_ids.size}"
        )
    noise = np.array([count_noise(length, noise_rate, mean_span_length) for length in lengths], np.int32)
    # The last row may be shorter than the others, and then its source and target are as well.
    source_length = sequence_length - noise_count + span_count + 1
    target_length = noise_count + span_count + 1
    pad_id = tokenizer.pad_id or 0
    with tf.device("CPU:0"):  # tf.data runs there; tensors that it captures should lie there.
        tokens, starts, lengths = tf.constant(token_ids), tf.constant(starts), tf.constant(lengths)
        noise, sentinels = tf.constant(noise), tf.constant(sentinel_ids, tf.int32)
        end, start = tf.constant([tokenizer.eos_id], tf.int32), tf.constant([decoder_start_id], tf.int32)

    def make_row(row: tf.Tensor, seed: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor, tf.Tensor]:
        ids = tokens[starts[row] : starts[row] + lengths[row]]
        is_noise = draw_noise(tf.size(ids), noise[row, 0], noise[row, 1], seed)
        source = tf.concat([replace_spans(ids, is_noise, sentinels), end], axis=0)
        target = tf.concat([replace_spans(ids, ~is_noise, sentinels), end], axis=0)
        labels = pad_row(target, target_length, pad_id)
        inputs = {
            "source_ids": pad_row(source, source_length, pad_id),
            "memory_mask": pad_row(tf.ones_like(source), source_length),
            "token_ids": tf.concat([start, labels[:-1]], axis=0),
        }
        return inputs, labels, pad_row(tf.ones_like(target, tf.float32), target_length)

    return batch_rows(
        int(lengths.shape[0]),
        make_row,
        batch_size,
        shuffle=shuffle,
        seed=seed,
        shard=shard,
        repeat=repeat,
        drop_remainder=drop_remainder,
        new_draws=new_spans,
    )


def count_noise(length: int, noise_rate: float, mean_span_length: float) -> tuple[int, int]:
    """How much of a row is noise.

    Args:
        length: tokens of the row, at least 2.
        noise_rate: share of the tokens.
        mean_span_length: mean number of tokens in a span.

    Returns:
        (tokens, spans): at least one of each, and so that there is a token to stay before each span.
    """
    # In float32 as T5 rounds, which NumPy and TensorFlow do alike: a half to the even number.
    token_count = int(np.round(np.float32(length) * np.float32(noise_rate)))
    token_count = min(max(token_count, 1), length - 1)
    span_count = int(np.round(np.float32(token_count) / np.float32(mean_span_length)))
    return token_count, min(max(span_count, 1), length - token_count)


def draw_noise(
    length: tf.Tensor, noise_count: tf.Tensor, span_count: tf.Tensor, seed: tf.Tensor
) -> tf.Tensor:
    """Draws which tokens of a row are noise.

    Args:
        length: int32 scalar, tokens of the row.
        noise_count: int32 scalar, how many of them are noise.
        span_count: int32 scalar, how many spans they form.
        seed: int64 [2].

    Returns:
        bool [length]: spans that stay and spans of noise in turn, of random lengths.
    """
    noise_seed, kept_seed = tf.unstack(tf.random.split(seed, alg="philox"))
    noise_lengths = _split_at_random(noise_count, span_count, noise_seed)
    kept_lengths = _split_at_random(length - noise_count, span_count, kept_seed)
    span_lengths = tf.reshape(tf.stack([kept_lengths, noise_lengths], axis=1), [-1])
    return tf.repeat(tf.range(2 * span_count) % 2 == 1, span_lengths)


def replace_spans(ids: tf.Tensor, is_hidden: tf.Tensor, sentinels: tf.Tensor) -> tf.Tensor:
    """Replaces each span of hidden tokens by a sentinel.

    Args:
        ids: int32 [length].
        is_hidden: bool [length].
        sentinels: int32 [sentinels], as many as there are spans or more; they are used in order.

    Returns:
        int32 [at most length].
    """
    follows_hidden = tf.concat([[False], is_hidden[:-1]], axis=0)
    is_first = is_hidden & ~follows_hidden
    # Before the first span the number is -1, which is not used.
    span_numbers = tf.maximum(tf.cumsum(tf.cast(is_first, tf.int32)) - 1, 0)
    replaced = tf.where(is_first, tf.gather(sentinels, span_numbers), ids)
    return tf.boolean_mask(replaced, is_first | ~is_hidden)


def _split_at_random(count: tf.Tensor, part_count: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Lengths of non-empty parts of `count` items, each way to split them being as likely: [part_count]."""
    # Which items but the first begin a part: `part_count - 1` of them.
    begins = shuffle_values(tf.range(count - 1) < part_count - 1, seed)
    part_numbers = tf.cumsum(tf.pad(tf.cast(begins, tf.int32), [[1, 0]]))
    return tf.math.bincount(part_numbers, minlength=part_count, maxlength=part_count)


def _sentinel_ids(tokenizer: Tokenizer, count: int) -> list[int]:
    ids = []
    for number in range(count):
        try:
            ids.append(tokenizer.token_to_id(f"<extra_id_{number}>"))
        except ValueError as error:
            raise ValueError(
                f"the tokenizer must have the sentinels <extra_id_0> to <extra_id_{count - 1}>, one for "
                f"each span of a row. Received: one without <extra_id_{number}>"
            ) from error
    return ids


def _check_noise(sequence_length: int, noise_rate: float, mean_span_length: float) -> None:
    if sequence_length < 2:
        raise ValueError(
            "`sequence_length` must be at least 2, a token to keep and one to cut out. "
            f"Received: sequence_length={sequence_length}"
        )
    if not 0.0 < noise_rate < 1.0:
        raise ValueError(
            f"`noise_rate` must be between 0 and 1 (exclusive). Received: noise_rate={noise_rate}"
        )
    if not mean_span_length >= 1.0:
        raise ValueError(
            f"`mean_span_length` must be at least 1. Received: mean_span_length={mean_span_length}"
        )
