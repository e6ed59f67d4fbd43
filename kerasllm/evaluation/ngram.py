"""N-gram baselines: what a language model must beat before its perplexity means anything."""

import numpy as np


def ngram_perplexity(
    train_ids: np.ndarray, validation_ids: np.ndarray, vocabulary_size: int, order: int
) -> float:
    """Perplexity per token of an n-gram model on the tokens a language model is scored on.

    Every validation token except the first is a target, as in
    `kerasllm.data.packing.language_model_dataset`. See `ngram_log_probabilities` for the model.

    Args:
        train_ids: int [train_length], the tokens to count.
        validation_ids: int [validation_length], at least two tokens.
        vocabulary_size: number of ids; all ids are in [0, vocabulary_size).
        order: 1 (unigram) or 2 (bigram).

    Returns:
        exp of the mean negative log-probability (nats) of the targets.

    Raises:
        ValueError: an argument is out of range.
    """
    log_probabilities = ngram_log_probabilities(train_ids, validation_ids, vocabulary_size, order)
    return float(np.exp(-np.mean(log_probabilities)))


def ngram_log_probabilities(
    train_ids: np.ndarray, token_ids: np.ndarray, vocabulary_size: int, order: int
) -> np.ndarray:
    """Log-probability of each token after the first under an n-gram model of `train_ids`.

    The unigram has add-one smoothing: p(w) = (c(w) + 1) / (N + V). The bigram backs it up by
    Witten-Bell interpolation, which needs no fitted weight:
    p(w | v) = (c(v, w) + T(v) p(w)) / (c(v) + T(v)), where c(v) counts how often v is followed by
    any token and T(v) how many different tokens follow it; after an unseen v it is p(w). Both sum
    to one over w. (Witten and Bell 1991; Chen and Goodman 1998, section 2.5.)

    Args:
        train_ids: int [train_length], the tokens to count.
        token_ids: int [length], at least two tokens.
        vocabulary_size: number of ids V; all ids are in [0, vocabulary_size).
        order: 1 (unigram) or 2 (bigram).

    Returns:
        float64 [length - 1], natural logarithms, for `token_ids[1:]`.

    Raises:
        ValueError: an argument is out of range.
    """
    if order not in (1, 2):
        raise ValueError(f"`order` must be 1 or 2. Received: order={order}")
    train_ids = _check_ids("train_ids", train_ids, vocabulary_size, minimum_length=1)
    token_ids = _check_ids("token_ids", token_ids, vocabulary_size, minimum_length=2)

    unigram_counts = np.bincount(train_ids, minlength=vocabulary_size)
    unigram = (unigram_counts + 1) / (train_ids.size + vocabulary_size)
    targets = token_ids[1:]
    if order == 1:
        return np.log(unigram[targets])

    # A pair (v, w) is the number v * V + w; the sorted distinct pairs are a sparse count table.
    pairs, pair_counts = np.unique(train_ids[:-1] * vocabulary_size + train_ids[1:], return_counts=True)
    followers = np.bincount(pairs // vocabulary_size, minlength=vocabulary_size)
    context_counts = np.bincount(train_ids[:-1], minlength=vocabulary_size)

    contexts = token_ids[:-1]
    wanted = contexts * vocabulary_size + targets
    place = np.searchsorted(pairs, wanted)
    found = np.append(pairs, -1)[place] == wanted
    counts = np.where(found, np.append(pair_counts, 0)[place], 0)
    # After an unseen context every weight gives p(w); one avoids 0 / 0.
    back_off = np.maximum(followers[contexts], 1)
    return np.log((counts + back_off * unigram[targets]) / (context_counts[contexts] + back_off))


def _check_ids(name: str, token_ids: np.ndarray, vocabulary_size: int, minimum_length: int) -> np.ndarray:
    token_ids = np.asarray(token_ids)
    if token_ids.ndim != 1 or not np.issubdtype(token_ids.dtype, np.integer):
        raise ValueError(
            f"`{name}` must be a 1-D array of integers. "
            f"Received: shape={token_ids.shape}, dtype={token_ids.dtype}"
        )
    if token_ids.size < minimum_length:
        raise ValueError(
            f"`{name}` must hold at least {minimum_length} token(s). Received: {token_ids.size}"
        )
    lowest, highest = int(token_ids.min()), int(token_ids.max())
    if lowest < 0 or highest >= vocabulary_size:
        raise ValueError(
            f"`{name}` must be in [0, vocabulary_size). Received: ids from {lowest} to {highest}, "
            f"vocabulary_size={vocabulary_size}"
        )
    return token_ids.astype(np.int64)
