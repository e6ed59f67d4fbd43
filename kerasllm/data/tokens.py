"""Documents → all their tokens, end to end in one array."""

import json
import os
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from kerasllm.data.cache import cached_tokens, make_key
from kerasllm.tokenizers import Tokenizer

_DOCUMENTS_PER_STEP = 256

# Texts, or what `tokenize_documents` made of them.
Documents = Sequence[str] | tf.data.Dataset | tuple[np.ndarray, np.ndarray]


def tokenize_documents(
    documents: Sequence[str] | tf.data.Dataset,
    tokenizer: Tokenizer,
    *,
    end_of_text: bool = True,
    cache: str | os.PathLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes documents, each followed by the end-of-text token if the tokenizer has one.

    With a cache the tokens are written into a folder of it, named after the tokenizer and the documents,
    and read from there the next time. Other documents or another tokenizer have another folder, so that
    nothing outdated is read; who needs the room deletes folders.

    Args:
        documents: texts, or a finite `tf.data.Dataset` of scalar strings, which with a cache is read twice
            and must give the same texts in the same order each time.
        tokenizer: turns strings into ids.
        end_of_text: whether the end-of-text token follows each document.
        cache: a folder to keep tokens in; made if it does not exist.

    Returns:
        (token_ids int32 [tokens], all documents end to end; lengths int64 [documents], their
        numbers of tokens). With a cache they are memory-mapped and read-only.

    Raises:
        TypeError: `documents` is one string, or holds something else than strings.
        ValueError: there are no documents, or the files in the cache are damaged.
    """
    if not isinstance(documents, tf.data.Dataset):
        documents = texts_dataset(documents)
    if cache is None:
        return _tokenize(documents, tokenizer, end_of_text)
    key = make_key(_key_parts(documents, tokenizer, end_of_text))
    return cached_tokens(cache, key, lambda: _tokenize(documents, tokenizer, end_of_text))


def read_tokens(
    documents: Documents, tokenizer: Tokenizer, *, end_of_text: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes documents, or checks those that are tokens already.

    Args:
        documents: texts, a finite `tf.data.Dataset` of scalar strings, or a tuple of two arrays as
            `tokenize_documents` returns it.
        tokenizer: turns strings into ids.
        end_of_text: as in `tokenize_documents`.

    Returns:
        As `tokenize_documents`.

    Raises:
        TypeError: as in `tokenize_documents`.
        ValueError: there are no documents, or the arrays do not fit together or to the tokenizer.
    """
    is_tokens = isinstance(documents, tuple) and [type(part) for part in documents[:1]] != [str]
    if not is_tokens:
        return tokenize_documents(documents, tokenizer, end_of_text=end_of_text)
    if len(documents) != 2:
        raise ValueError(f"tokens must be (token_ids, lengths). Received: {len(documents)} arrays")
    token_ids, lengths = check_tokens(*documents)
    if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < tokenizer.vocabulary_size:
        raise ValueError(
            f"token ids must be from 0 to {tokenizer.vocabulary_size - 1}, as the tokenizer's. "
            f"Received: ids from {token_ids.min()} to {token_ids.max()}"
        )
    return token_ids, lengths


def check_tokens(token_ids: np.ndarray, lengths: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Checks tokens and the lengths of their documents; without lengths they are one document."""
    token_ids = np.asarray(token_ids)
    if token_ids.ndim != 1 or not np.issubdtype(token_ids.dtype, np.integer):
        raise ValueError(
            "`token_ids` must be a 1-D array of integers. "
            f"Received: shape={token_ids.shape}, dtype={token_ids.dtype}"
        )
    lengths = np.asarray([token_ids.size] if lengths is None else lengths, np.int64)
    if (lengths < 0).any() or lengths.sum() != token_ids.size:
        raise ValueError(
            "`document_lengths` must not be negative and must add up to the number of tokens. "
            f"Received: a sum of {lengths.sum()}, {token_ids.size} tokens"
        )
    return token_ids.astype(np.int32, copy=False), lengths


def cut_spans(starts: np.ndarray, lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts spans of tokens into pieces.

    Args:
        starts: int64 [spans], where each begins.
        lengths: int64 [spans]; empty ones give no piece.
        longest: tokens of a piece; only the last one of a span is shorter.

    Returns:
        (starts int64 [pieces], lengths int64 [pieces]), in order.
    """
    piece_counts = -(-lengths // longest)
    span = np.repeat(np.arange(len(lengths)), piece_counts)
    number_in_span = np.arange(len(span)) - np.repeat(np.cumsum(piece_counts) - piece_counts, piece_counts)
    offsets = number_in_span * longest
    return starts[span] + offsets, np.minimum(lengths[span] - offsets, longest)


def _tokenize(
    documents: tf.data.Dataset, tokenizer: Tokenizer, end_of_text: bool
) -> tuple[np.ndarray, np.ndarray]:
    @tf.autograph.experimental.do_not_convert
    def tokenize(texts: tf.Tensor) -> tf.RaggedTensor:
        ids = tokenizer.tokenize(texts)
        if tokenizer.eos_id is None or not end_of_text:
            return ids
        ends = tf.fill([tf.size(texts), 1], tf.constant(tokenizer.eos_id, ids.dtype))
        return tf.concat([ids, ends], axis=1)

    batches = documents.batch(_DOCUMENTS_PER_STEP).map(tokenize, num_parallel_calls=tf.data.AUTOTUNE)
    token_ids, lengths = [], []
    for ids in batches:
        token_ids.append(ids.values.numpy())
        lengths.append(ids.row_lengths().numpy())
    if not lengths:
        raise ValueError("`documents` must hold at least one document. Received: none")
    return np.concatenate(token_ids).astype(np.int32), np.concatenate(lengths).astype(np.int64)


def _key_parts(documents: tf.data.Dataset, tokenizer: Tokenizer, end_of_text: bool) -> Iterator[bytes]:
    """All that the tokens follow from."""
    # The settings of a tokenizer name special tokens, which tokenizer.json need not.
    special_tokens = sorted(tokenizer.special_tokens.items())
    yield json.dumps([special_tokens, tokenizer.eos_id, end_of_text]).encode()
    yield tokenizer.to_json().encode()
    for texts in documents.batch(_DOCUMENTS_PER_STEP).as_numpy_iterator():
        yield from texts


def texts_dataset(documents: Sequence[str]) -> tf.data.Dataset:
    """A dataset of the texts of a list, which lie in the memory of the host."""
    if isinstance(documents, (str, bytes)):
        raise TypeError("`documents` must be a list of strings. Received: one string")
    for document in documents:
        if not isinstance(document, str):
            raise TypeError(f"`documents` must hold strings. Received: {type(document).__name__}")
    with tf.device("CPU:0"):
        return tf.data.Dataset.from_tensor_slices(tf.constant(documents, tf.string, [len(documents)]))
