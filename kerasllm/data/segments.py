"""Documents → rows that hold several documents side by side, none of which sees another."""

import numpy as np
import tensorflow as tf

from kerasllm.data.batching import batch_rows, check_sequence_length, pad_row
from kerasllm.data.tokens import Documents, cut_spans, read_tokens
from kerasllm.tokenizers import Tokenizer


def packed_dataset(
    documents: Documents,
    tokenizer: Tokenizer,
    sequence_length: int,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    repeat: bool = False,
    drop_remainder: bool = False,
) -> tf.data.Dataset:
    """Packs whole documents into rows for a causal language model, none across a border.

    Each token of a document predicts the next one of the same document, the last one its end-of-text
    token, which is a label only. A document of more than `sequence_length` such predictions is cut into
    pieces; the last token of a piece still predicts the next one. Which pieces share a row is found once,
    by best fit decreasing over all of them, so that few places stay empty; in each pass the same rows
    come, shuffled if so asked.

    Args:
        documents: texts, a finite `tf.data.Dataset` of scalar strings, or what `tokenize_documents`
            returns.
        tokenizer: turns strings into ids.
        sequence_length: tokens in a row.
        batch_size: rows per batch.
        shuffle: whether rows come in random order, a new one in each pass: in each round of `repeat`, and
            otherwise each time the dataset is iterated.
        seed: chooses the random orders; with `repeat` they follow from it alone, without it also from
            `tf.random.set_seed`.
        shard: (index, count) of the part to return; rows are dealt out in turn.
        repeat: whether to go on without end. Batches then run over the end of a pass, and none is short.
        drop_remainder: whether to leave out the last batch of a pass if it is short.

    Returns:
        A dataset of ({"token_ids", "segment_ids", "positions"}, labels, weights), all [batch,
        sequence_length] and int32 except for the float32 weights. `segment_ids` counts the pieces of a
        row from 1; 0 is empty space, where all is 0. `positions` counts from 0 in each piece. A model
        must keep tokens of different segments from seeing each other. The batch size is static with
        `repeat` or `drop_remainder`.

    Raises:
        TypeError: `documents` is one string, or holds something else than strings.
        ValueError: an argument is out of range; no document has two tokens, its end included; or there
            are too few rows: none for the shard, or no full batch with `drop_remainder`.
    """
    check_sequence_length(sequence_length)
    token_ids, document_lengths = read_tokens(documents, tokenizer)
    document_starts = np.cumsum(document_lengths) - document_lengths
    # The last token of a document is a label only.
    starts, lengths = cut_spans(document_starts, np.maximum(document_lengths - 1, 0), sequence_length)
    if not lengths.size:
        raise ValueError(
            "a document must have two tokens, one to see and one to predict. "
            f"Received: {len(document_lengths)} documents, none of which has"
        )
    row_of_piece = pack_pieces(lengths, sequence_length)
    by_row = np.argsort(row_of_piece, kind="stable")
    pieces_per_row = np.bincount(row_of_piece)
    with tf.device("CPU:0"):  # tf.data runs there; tensors that it captures should lie there.
        tokens = tf.constant(token_ids)
        starts_of_row = tf.RaggedTensor.from_row_lengths(starts[by_row], pieces_per_row)
        lengths_of_row = tf.RaggedTensor.from_row_lengths(lengths[by_row], pieces_per_row)

    def make_row(row: tf.Tensor, _: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor, tf.Tensor]:
        starts, lengths = starts_of_row[row], lengths_of_row[row]
        positions = tf.ragged.range(lengths).values
        places = tf.repeat(starts, lengths) + positions
        inputs = {
            "token_ids": tf.gather(tokens, places),
            "segment_ids": tf.repeat(tf.range(1, tf.size(lengths) + 1), lengths),
            "positions": tf.cast(positions, tf.int32),
        }
        inputs = {name: pad_row(values, sequence_length) for name, values in inputs.items()}
        labels = pad_row(tf.gather(tokens, places + 1), sequence_length)
        return inputs, labels, tf.cast(inputs["segment_ids"] > 0, tf.float32)

    return batch_rows(
        len(pieces_per_row),
        make_row,
        batch_size,
        shuffle=shuffle,
        seed=seed,
        shard=shard,
        repeat=repeat,
        drop_remainder=drop_remainder,
    )


def pack_pieces(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """Puts pieces into rows by best fit decreasing: the longest first, each where the least is left over.

    Args:
        lengths: int [pieces], from 1 to `row_length`.
        row_length: what fits into a row.

    Returns:
        int64 [pieces], the row of each. Rows are numbered by the first piece that they hold, so that
        they keep the order of the pieces as far as may be.
    """
    rows_by_space = [[] for _ in range(row_length + 1)]
    spaces = 0  # Bit s is set where a row has s places left: finding the best fit is one shift.
    row_count = 0
    row_of_piece = np.empty(len(lengths), np.int64)
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, row = row_length, row_count
            row_count += 1
        rows_by_space[space - length].append(row)
        if space > length:
            spaces |= 1 << (space - length)
        row_of_piece[piece] = row
    first_piece = np.full(row_count, len(lengths))
    np.minimum.at(first_piece, row_of_piece, np.arange(len(lengths)))
    new_number = np.argsort(np.argsort(first_piece))
    return new_number[row_of_piece]
