"""What generation should do, in NumPy and float64, one row at a time and without a cache."""

import numpy as np


def process(scores, text, prompt_length, config, end_ids):
    """The scores of one row after all that changes them before a draw; -inf for what must not come."""
    scores = np.asarray(scores, "float64").copy()
    text, new = list(text), list(text[prompt_length:])
    for token, bias in (config.logit_bias or {}).items():
        scores[token] += bias
    for token in set(text):
        scores[token] *= 1 / config.repetition_penalty if scores[token] > 0 else config.repetition_penalty
    for token in set(new):
        scores[token] -= config.presence_penalty + config.frequency_penalty * new.count(token)
    if size := config.no_repeat_ngram_size:
        end = text[len(text) - size + 1 :]
        for start in range(len(text) - size + 1):
            if text[start : start + size - 1] == end:
                scores[text[start + size - 1]] = -np.inf
    scores[list(config.suppress_tokens)] = -np.inf
    if len(new) < config.min_new_tokens:
        scores[list(end_ids)] = -np.inf
    return scores


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def first_to_reach(keys, weights, amount):
    """Marks tokens by falling key and rising id until their weights sum to the amount."""
    order = np.argsort(-keys, kind="stable")
    kept = np.zeros(len(keys), bool)
    total = 0.0
    for token in order:
        if total >= amount:
            break
        kept[token] = True
        total += weights[token]
    return kept


def filter(scores, config):
    """The probabilities from which one row's token is drawn."""
    scores = scores / config.temperature
    if config.top_k:
        kept = first_to_reach(scores, np.ones(len(scores)), config.top_k)
        scores = np.where(kept, scores, -np.inf)
    if config.top_p < 1:
        kept = first_to_reach(scores, softmax(scores), config.top_p)
        scores = np.where(kept, scores, -np.inf)
    probabilities = softmax(scores)
    if config.min_p:
        scores = np.where(probabilities >= config.min_p * probabilities.max(), scores, -np.inf)
    if config.typical_p < 1:
        probabilities = softmax(scores)
        possible = probabilities > 0
        surprise = np.full(len(scores), np.inf)
        surprise[possible] = -np.log(probabilities[possible])
        entropy = (probabilities[possible] * surprise[possible]).sum()
        kept = first_to_reach(-abs(surprise - entropy), probabilities, config.typical_p)
        scores = np.where(kept, scores, -np.inf)
    return softmax(scores)


def choose(scores, config, uniform):
    """The next token of one row."""
    if config.temperature == 0:
        return int(np.argmax(scores))
    return int(np.searchsorted(np.cumsum(filter(scores, config)), uniform, side="right"))


def generate(model, prompt, config, end_ids=(), uniform=None):
    """The new tokens of one row: the whole text goes through the model for each of them."""
    text = list(prompt)
    while len(text) - len(prompt) < config.max_new_tokens:
        logits = np.asarray(model(np.array([text], "int32")))[0, -1]
        number = None if uniform is None else uniform[len(text) - len(prompt)]
        token = choose(process(logits, text, len(prompt), config, end_ids), config, number)
        if token in end_ids:
            break
        text.append(token)
    return text[len(prompt) :]
