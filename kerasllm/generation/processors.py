"""What changes the scores of the next token before one is chosen."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from kerasllm.generation.config import GenerationConfig
from kerasllm.generation.sampling import FORBIDDEN

_DRAWING = ("temperature", "top_k", "top_p")
# Settings that are left out of the graph where no row uses any of them.
_FURTHER = (
    "min_p",
    "typical_p",
    "min_new_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
)


class RowSettings(NamedTuple):
    """The settings of a batch as tensors, one value per row; see `GenerationConfig` for what they do.

    A None leaves the feature out of the graph. What a graph holds costs nothing where all rows have the
    value that changes nothing.

    Args:
        max_new_tokens: Int32 `[batch]`.
        end_ids: Int32 `[batch, any]`, filled up with -1.
        temperature: Float32 `[batch]`.
        top_k: Int32 `[batch]`.
        top_p: Float32 `[batch]`.
        min_p: Float32 `[batch]`.
        typical_p: Float32 `[batch]`.
        min_new_tokens: Int32 `[batch]`.
        repetition_penalty: Float32 `[batch]`.
        presence_penalty: Float32 `[batch]`.
        frequency_penalty: Float32 `[batch]`.
        no_repeat_ngram_size: Int32 `[batch]`.
        logit_bias: Float32 `[batch, vocabulary]`, `FORBIDDEN` for suppressed tokens.
        allowed: Int32 `[batch, vocabulary / 32]`, rounded up: a bit for each token that may come now, the
            first token in the lowest bit of the first number.
    """

    max_new_tokens: tf.Tensor
    end_ids: tf.Tensor
    temperature: tf.Tensor
    top_k: tf.Tensor
    top_p: tf.Tensor
    min_p: tf.Tensor | None = None
    typical_p: tf.Tensor | None = None
    min_new_tokens: tf.Tensor | None = None
    repetition_penalty: tf.Tensor | None = None
    presence_penalty: tf.Tensor | None = None
    frequency_penalty: tf.Tensor | None = None
    no_repeat_ngram_size: tf.Tensor | None = None
    logit_bias: tf.Tensor | None = None
    allowed: tf.Tensor | None = None


def settings_arrays(
    configs: Sequence[GenerationConfig], end_ids: Sequence[Sequence[int]], vocabulary_size: int
) -> RowSettings:
    """Turns configurations into `RowSettings` of NumPy arrays.

    Args:
        configs: A configuration for each row.
        end_ids: The ids that end a text, for each row.
        vocabulary_size: Number of tokens of the model.

    Returns:
        The settings; without the rarer ones if no row uses them.

    Raises:
        ValueError: If a setting names a token that the model does not have.
    """

    def column(name):
        default = getattr(GenerationConfig, name)
        dtype = np.float32 if isinstance(default, float) else np.int32
        return np.array([getattr(config, name) for config in configs], dtype)

    if outside := sorted({id for ids in end_ids for id in ids if id >= vocabulary_size}):
        raise ValueError(
            f"Tokens that end a text must be tokens of the model, which are {vocabulary_size}. "
            f"Received: {outside}"
        )
    width = max(map(len, end_ids), default=0)
    settings = RowSettings(
        max_new_tokens=column("max_new_tokens"),
        end_ids=np.array([[*ids, *[-1] * (width - len(ids))] for ids in end_ids], np.int32),
        **{name: column(name) for name in _DRAWING},
    )
    has_bias = any(config.logit_bias or config.suppress_tokens for config in configs)
    is_neutral = all(
        getattr(config, name) == getattr(GenerationConfig, name) for config in configs for name in _FURTHER
    )
    if is_neutral and not has_bias:
        return settings
    bias = np.zeros((len(configs), vocabulary_size), np.float32)
    for row, config in enumerate(configs):
        numbers = {**(config.logit_bias or {}), **dict.fromkeys(config.suppress_tokens, -np.inf)}
        if outside := [token for token in numbers if token >= vocabulary_size]:
            raise ValueError(
                "`logit_bias` and `suppress_tokens` must name tokens of the model, which are "
                f"{vocabulary_size}. Received: {outside}"
            )
        if len(set(config.suppress_tokens)) == vocabulary_size:
            raise ValueError(
                "`suppress_tokens` must leave a token to generate. Received: all tokens of the model"
            )
        bias[row, list(numbers)] = np.maximum(list(numbers.values()), FORBIDDEN)
    return settings._replace(logit_bias=bias, **{name: column(name) for name in _FURTHER})


def count_tokens(token_ids: tf.Tensor, counted: tf.Tensor, vocabulary: tf.Tensor) -> tf.Tensor:
    """Counts how often each token occurs in each row.

    Args:
        token_ids: Int32 `[batch, length]`.
        counted: Booleans `[batch, length]`: which places count.
        vocabulary: Int32 `[]`, the number of tokens.

    Returns:
        Float32 `[batch, vocabulary]`.
    """
    shape = tf.shape(token_ids)
    rows = tf.broadcast_to(tf.range(shape[0])[:, None], shape)
    places = tf.stack([rows, token_ids], axis=-1)
    return tf.scatter_nd(places, tf.cast(counted, tf.float32), [shape[0], vocabulary])


@tf.function(
    input_signature=[tf.TensorSpec([None, None], tf.int32), *[tf.TensorSpec([None], tf.int32)] * 2],
    autograph=False,
)  # to be traced only once
def repeats_ngram(sequences: tf.Tensor, lengths: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Finds the places at which an n-gram of the row ends that the row's end is about to repeat.

    Args:
        sequences: Int32 `[batch, length]`.
        lengths: Int32 `[batch]`, tokens of each row that count.
        size: Int32 `[batch]`, n; 0: no n-gram.

    Returns:
        Booleans `[batch, length]`: the `n - 1` tokens before are the last `n - 1` tokens of the row.
    """
    columns = tf.range(tf.shape(sequences)[1])[None]

    def compare(distance, repeats):
        last = tf.gather(sequences, tf.maximum(lengths - distance, 0), batch_dims=1)
        before = tf.gather(sequences, tf.maximum(columns[0] - distance, 0), axis=1)
        return distance + 1, repeats & ((before == last[:, None]) | (distance >= size)[:, None])

    size_of_row = size[:, None]
    full = (size_of_row > 0) & (columns >= size_of_row - 1) & (columns < lengths[:, None])
    longest = tf.reduce_max(size)
    return tf.while_loop(lambda distance, _: distance < longest, compare, [tf.constant(1), full])[1]


def process_scores(
    logits: tf.Tensor,
    sequences: tf.Tensor,
    lengths: tf.Tensor,
    prompt_lengths: tf.Tensor,
    settings: RowSettings,
) -> tf.Tensor:
    """Changes the scores as the settings say, in Hugging Face's order.

    Args:
        logits: Floats `[batch, vocabulary]`.
        sequences: Int32 `[batch, length]`: prompts and what came after.
        lengths: Int32 `[batch]`, the tokens in each row of `sequences`.
        prompt_lengths: Int32 `[batch]`, how many of them are the prompt.
        settings: The settings.

    Returns:
        Float32 `[batch, vocabulary]`, `FORBIDDEN` for tokens that must not come.
    """
    scores = tf.cast(logits, tf.float32)
    vocabulary = tf.shape(scores)[-1]
    columns = tf.range(tf.shape(sequences)[1])[None]
    in_text = columns < lengths[:, None]

    def change(scores, is_needed, function):
        return tf.cond(tf.reduce_any(is_needed), lambda: function(scores), lambda: scores)

    def penalize_repetition(scores):
        seen = count_tokens(sequences, in_text, vocabulary) > 0
        penalty = settings.repetition_penalty[:, None]
        return tf.where(seen, tf.where(scores > 0, scores / penalty, scores * penalty), scores)

    def penalize_generated(scores):
        counts = count_tokens(sequences, in_text & (columns >= prompt_lengths[:, None]), vocabulary)
        present = tf.cast(counts > 0, tf.float32) * settings.presence_penalty[:, None]
        return scores - present - counts * settings.frequency_penalty[:, None]

    def forbid_ngrams(scores):
        ends = repeats_ngram(sequences, lengths, settings.no_repeat_ngram_size)
        return tf.where(count_tokens(sequences, ends, vocabulary) > 0, FORBIDDEN, scores)

    def forbid_end(scores):
        too_early = lengths - prompt_lengths < settings.min_new_tokens
        ids = settings.end_ids
        is_end = count_tokens(tf.maximum(ids, 0), (ids >= 0) & too_early[:, None], vocabulary) > 0
        return tf.where(is_end, FORBIDDEN, scores)

    def forbid_others(scores):
        bits = tf.bitwise.right_shift(settings.allowed[:, :, None], tf.range(32)) & 1
        bits = tf.reshape(bits, [tf.shape(scores)[0], -1])[:, :vocabulary]
        return tf.where(bits == 1, scores, FORBIDDEN)

    if settings.logit_bias is not None:
        scores = tf.maximum(scores + settings.logit_bias, FORBIDDEN)
    if settings.repetition_penalty is not None:
        scores = change(scores, settings.repetition_penalty != 1, penalize_repetition)
        is_penalized = (settings.presence_penalty != 0) | (settings.frequency_penalty != 0)
        scores = change(scores, is_penalized, penalize_generated)
        scores = change(scores, settings.no_repeat_ngram_size > 0, forbid_ngrams)
        scores = change(scores, settings.min_new_tokens > lengths - prompt_lengths, forbid_end)
    if settings.allowed is not None:
        scores = change(scores, settings.allowed != -1, forbid_others)
    return tf.maximum(scores, FORBIDDEN)
