"""Prompts and their completions → rows of which only the completions are learned."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from kerasllm.data.batching import batch_rows, check_sequence_length, pad_row
from kerasllm.data.tokens import tokenize_documents
from kerasllm.tokenizers import Tokenizer

_TOO_LONG = ("error", "drop")


def prefix_lm_dataset(
    pairs: Sequence[tuple[str, str]] | Sequence[tuple[Sequence[int], Sequence[int]]],
    tokenizer: Tokenizer,
    sequence_length: int,
    batch_size: int,
    *,
    too_long: str = "error",
    shuffle: bool = False,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    repeat: bool = False,
    drop_remainder: bool = False,
) -> tf.data.Dataset:
    """Makes rows of a prompt and its completion, of which a model learns the completion.

    A row is the tokens of the prompt, those of the completion and the end-of-text token if the tokenizer
    has one. The loss counts for tokens of the completion and its end only. Tokens of the prompt see those
    before them only, as when the model generates.

    Args:
        pairs: (prompt, completion) texts, which are tokenized each for itself and without special tokens
            but the end; or pairs of ids, which are taken as they are, such as chats that end with their
            own token.
        tokenizer: turns strings into ids.
        sequence_length: tokens that the model sees at once. A pair may have one more, for the last one is
            a label only.
        batch_size: rows per batch.
        too_long: what to do with pairs that do not fit: "error" or "drop".
        shuffle: whether rows come in random order, a new one in each pass: in each round of `repeat`, and
            otherwise each time the dataset is iterated.
        seed: chooses the random orders; with `repeat` they follow from it alone, without it also from
            `tf.random.set_seed`.
        shard: (index, count) of the part to return; rows are dealt out in turn.
        repeat: whether to go on without end. Batches then run over the end of a pass, and none is short.
        drop_remainder: whether to leave out the last batch of a pass if it is short.

    Returns:
        A dataset of (token_ids, labels, weights), each [batch, sequence_length], int32 except for the
        float32 weights, as of `windows_dataset`. The batch size is static with `repeat` or
        `drop_remainder`.

    Raises:
        TypeError: a pair is neither two strings nor two sequences of integers.
        ValueError: an argument is out of range; a prompt or a completion has no tokens; a pair is too
            long and `too_long="error"`; or there are too few rows: none for the shard, or no full batch
            with `drop_remainder`.
    """
    check_sequence_length(sequence_length)
    if too_long not in _TOO_LONG:
        raise ValueError(f"`too_long` must be one of {_TOO_LONG}. Received: too_long={too_long!r}")
    (prompt_ids, prompt_lengths), (completion_ids, completion_lengths) = _read_pairs(pairs, tokenizer)
    for name, lengths in (("prompt", prompt_lengths), ("completion", completion_lengths)):
        if not lengths.all():
            raise ValueError(
                f"a {name} must have a token at least. Received: pair {int((lengths == 0).argmax())} "
                f"with an empty {name}"
            )
    total_lengths = prompt_lengths + completion_lengths
    fits = total_lengths <= sequence_length + 1
    if not fits.all() and too_long == "error":
        raise ValueError(
            f"a pair must have at most `sequence_length` + 1 tokens, {sequence_length + 1}; "
            f'`too_long="drop"` leaves out those that have more. Received: pair {int(fits.argmin())} of '
            f"{total_lengths[fits.argmin()]} tokens"
        )
    if not fits.any():
        raise ValueError(
            f"a pair must fit into {sequence_length + 1} tokens. "
            f"Received: {len(fits)} pairs, none of which does"
        )
    with tf.device("CPU:0"):  # tf.data runs there; tensors that it captures should lie there.
        prompts = tf.RaggedTensor.from_row_lengths(tf.constant(prompt_ids), prompt_lengths)
        completions = tf.RaggedTensor.from_row_lengths(tf.constant(completion_ids), completion_lengths)
        rows = tf.ragged.boolean_mask(tf.concat([prompts, completions], axis=1), fits)
        prompt_lengths = tf.constant(prompt_lengths[fits], tf.int32)
        places = tf.range(sequence_length)

    def make_row(row: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        ids, prompt_length = rows[row], prompt_lengths[row]
        length = tf.size(ids) - 1  # of the inputs: the last token is a label only
        inputs = pad_row(ids[:-1], sequence_length)
        labels = pad_row(ids[1:], sequence_length)
        is_learned = (places >= prompt_length - 1) & (places < length)
        return inputs, labels, tf.cast(is_learned, tf.float32)

    return batch_rows(
        int(rows.nrows()),
        make_row,
        batch_size,
        shuffle=shuffle,
        seed=seed,
        shard=shard,
        repeat=repeat,
        drop_remainder=drop_remainder,
    )


def _read_pairs(
    pairs: Sequence[tuple], tokenizer: Tokenizer
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Of prompts and of completions the ids end to end, int32, and the lengths, int64 [pairs]."""
    if not len(pairs):
        raise ValueError("`pairs` must hold at least one pair. Received: none")
    text_pairs = 0
    for number, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                f"a pair must be (prompt, completion). Received: {type(pair).__name__} as pair {number}"
            )
        text_pairs += all(isinstance(part, str) for part in pair)
    prompts, completions = zip(*pairs, strict=True)
    if text_pairs == len(pairs):
        return (
            tokenize_documents(list(prompts), tokenizer, end_of_text=False),
            tokenize_documents(list(completions), tokenizer),
        )
    return _read_ids(prompts, tokenizer), _read_ids(completions, tokenizer)


def _read_ids(rows: Sequence[Sequence[int]], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    arrays = [np.asarray(row) for row in rows]
    for number, array in enumerate(arrays):
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise TypeError(
                "pairs must all be of strings or all of lists of ids. "
                f"Received: pair {number} with {type(rows[number]).__name__}"
            )
    ids = np.concatenate(arrays).astype(np.int32)
    if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocabulary_size:
        raise ValueError(
            f"ids must be from 0 to {tokenizer.vocabulary_size - 1}, as the tokenizer's. "
            f"Received: ids from {ids.min()} to {ids.max()}"
        )
    return ids, np.array([array.size for array in arrays], np.int64)
