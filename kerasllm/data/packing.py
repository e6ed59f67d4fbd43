"""Documents → one stream of tokens → windows that a causal language model trains and is scored on."""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from kerasllm.data.batching import (
    check_batching,
    check_sequence_length,
    finish_dataset,
    for_each_pass,
    pass_seeds,
    shuffle_values,
)
from kerasllm.data.tokens import check_tokens, tokenize_documents
from kerasllm.tokenizers import Tokenizer


def language_model_dataset(
    documents: Sequence[str] | tf.data.Dataset,
    tokenizer: Tokenizer,
    sequence_length: int,
    batch_size: int,
    *,
    stride: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    repeat: bool = False,
    passes: int | None = None,
    drop_remainder: bool = False,
    score_overlap: bool = True,
) -> tf.data.Dataset:
    """Packs documents end to end into batches for a causal language model.

    The documents are tokenized once, in the graph, and their ids are kept in memory; each document
    is followed by the tokenizer's end-of-text token if it has one. `windows_dataset` says how the
    stream of tokens is cut into windows, shuffled and sharded.

    Args:
        documents: texts, or a finite `tf.data.Dataset` of scalar strings.
        tokenizer: turns strings into ids.
        sequence_length: tokens that the model sees at once.
        batch_size: windows per batch.
        stride: tokens from one window to the next, at most `sequence_length` (the default).
        shuffle: whether documents and windows come in random order, a new one in each pass.
        seed: chooses the random orders.
        shard: (index, count) of the part to return; windows are dealt out in turn.
        repeat: whether to go on without end.
        passes: how many passes, the n-th in an order that follows from `seed` and n; None: one, in another
            order each time the dataset is iterated.
        drop_remainder: whether to leave out the last batch of a pass if it is short.
        score_overlap: whether a token that was a label in the window before keeps its weight.

    Returns:
        A dataset of (token_ids int32 [batch, sequence_length], labels int32 [batch,
        sequence_length], weights float32 [batch, sequence_length]).

    Raises:
        TypeError: `documents` is one string, or holds something else than strings.
        ValueError: as in `windows_dataset`.
    """
    token_ids, document_lengths = tokenize_documents(documents, tokenizer)
    return windows_dataset(
        token_ids,
        sequence_length,
        batch_size,
        document_lengths=document_lengths,
        stride=stride,
        shuffle=shuffle,
        seed=seed,
        shard=shard,
        repeat=repeat,
        passes=passes,
        drop_remainder=drop_remainder,
        score_overlap=score_overlap,
    )


def windows_dataset(
    token_ids: np.ndarray,
    sequence_length: int,
    batch_size: int,
    *,
    document_lengths: np.ndarray | None = None,
    stride: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    repeat: bool = False,
    passes: int | None = None,
    drop_remainder: bool = False,
    score_overlap: bool = True,
) -> tf.data.Dataset:
    """Cuts a stream of tokens into windows and batches them.

    Window k sees the tokens [k * stride, k * stride + sequence_length) and its labels are the
    tokens one further. With the default stride every token except the first of the stream is a
    label exactly once. The last window is filled up with zeros whose weight is 0; all other weights
    are 1.

    Shuffling puts first the documents and then the windows of their stream into a random order,
    another one in each pass: in each round of `repeat`, and otherwise each time the dataset is
    iterated, as every epoch of `model.fit` does. The orders follow from `seed` alone with `repeat`
    or `passes`; without them also from `tf.random.set_seed`, as usual in TensorFlow.

    Sharding is by window: shard (i, n) gets every n-th window of the pass, beginning with the i-th.
    The n shards of one pass are disjoint and together are all windows, if all workers have the same
    tokens and arguments; their sizes differ by one window at most.

    Args:
        token_ids: int [tokens], the documents end to end.
        sequence_length: tokens that the model sees at once.
        batch_size: windows per batch.
        document_lengths: int [documents], numbers of tokens, which add up to the whole; needed
            only to shuffle documents. By default the stream is one document.
        stride: tokens from one window to the next, at most `sequence_length`, which it is by
            default. A smaller one repeats tokens with more context before them.
        shuffle: whether documents and windows come in random order.
        seed: chooses the random orders.
        shard: (index, count) of the part to return.
        repeat: whether to go on without end. Batches then run over the end of a pass, and none is
            short.
        passes: how many passes, the n-th in an order that follows from `seed` and n; None: one, in another
            order each time the dataset is iterated.
        drop_remainder: whether to leave out the last batch of a pass if it is short; nothing else
            is left out.
        score_overlap: whether a token that was a label in the window before keeps its weight.
            False gives it weight 0, so that each token is scored once, with all the context there
            is: strided perplexity.

    Returns:
        A dataset of (token_ids int32 [batch, sequence_length], labels int32 [batch,
        sequence_length], weights float32 [batch, sequence_length]). The batch size is static with
        `repeat` or `drop_remainder`.

    Raises:
        ValueError: an argument is out of range, or there are too few tokens: fewer than two, no
            full window with `repeat` or `drop_remainder`, no window for the shard, or no full batch
            with `drop_remainder`.
    """
    token_ids, document_lengths = check_tokens(token_ids, document_lengths)
    stride = sequence_length if stride is None else stride
    _check_arguments(sequence_length, batch_size, stride, shard)
    window_count = _count_windows(token_ids.size, sequence_length, stride)
    shard_index, shard_count = shard
    shard_size = len(range(shard_index, window_count, shard_count))
    _check_enough_tokens(token_ids.size, sequence_length, batch_size, shard_size, repeat, drop_remainder)

    with tf.device("CPU:0"):  # tf.data runs there; tensors that it captures should lie there.
        documents = tf.RaggedTensor.from_row_lengths(tf.constant(token_ids), document_lengths)
        offsets = tf.range(sequence_length + 1, dtype=tf.int64)
        padding = tf.zeros([sequence_length + 1], tf.int32)

    @tf.autograph.experimental.do_not_convert
    def make_windows(pass_number: tf.Tensor) -> tf.data.Dataset:
        """All windows of one pass over the documents, by `batch_size` at once."""
        order = tf.range(window_count, dtype=tf.int64)
        stream = documents.values
        if shuffle:
            document_seed, window_seed = pass_seeds(seed, pass_number)
            document_order = shuffle_values(tf.range(documents.nrows()), document_seed)
            stream = tf.gather(documents, document_order).values
            order = shuffle_values(order, window_seed)
        # One padded copy of the stream per pass makes a window a plain gather.
        stream = tf.concat([stream, padding], axis=0)

        @tf.autograph.experimental.do_not_convert
        def cut(windows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            positions = windows[:, tf.newaxis] * stride + offsets
            tokens = tf.gather(stream, positions)
            is_scored = positions[:, 1:] < token_ids.size
            if not score_overlap:
                is_new = (offsets[1:] > sequence_length - stride) | (windows == 0)[:, tf.newaxis]
                is_scored &= is_new
            return tokens[:, :-1], tokens[:, 1:], tf.cast(is_scored, tf.float32)

        windows = tf.data.Dataset.from_tensor_slices(order[shard_index::shard_count])
        return windows.batch(batch_size).map(cut, num_parallel_calls=tf.data.AUTOTUNE)

    dataset = for_each_pass(make_windows, seed, repeat, passes)
    if repeat or drop_remainder:
        dataset = dataset.rebatch(batch_size, drop_remainder=True)
    batch_count = shard_size // batch_size if drop_remainder else -(-shard_size // batch_size)
    return finish_dataset(dataset, batch_count, shard, repeat, passes)


def _count_windows(token_count: int, sequence_length: int, stride: int) -> int:
    labels_after_first_window = max(token_count - 1 - sequence_length, 0)
    return 1 + math.ceil(labels_after_first_window / stride)


def _check_arguments(sequence_length: int, batch_size: int, stride: int, shard: tuple[int, int]) -> None:
    check_sequence_length(sequence_length)
    check_batching(batch_size, shard)
    if not 1 <= stride <= sequence_length:
        raise ValueError(
            "`stride` must be from 1 to `sequence_length`, for a longer one skips tokens. "
            f"Received: stride={stride}, sequence_length={sequence_length}"
        )


def _check_enough_tokens(
    token_count: int,
    sequence_length: int,
    batch_size: int,
    shard_size: int,
    repeat: bool,
    drop_remainder: bool,
) -> None:
    if token_count < 2:
        raise ValueError(
            f"there must be at least two tokens, one to see and one to predict. Received: {token_count}"
        )
    if (repeat or drop_remainder) and token_count <= sequence_length:
        raise ValueError(
            "there must be more tokens than `sequence_length` with `repeat` or `drop_remainder`. "
            f"Received: {token_count} tokens, sequence_length={sequence_length}"
        )
    if shard_size == 0:
        raise ValueError(
            "every shard must get a window. Received: too few windows for this one, from "
            f"{token_count} tokens, sequence_length={sequence_length}"
        )
    if drop_remainder and not repeat and shard_size < batch_size:
        raise ValueError(
            "there must be a full batch with `drop_remainder`. "
            f"Received: {shard_size} windows of {token_count} tokens, batch_size={batch_size}"
        )
