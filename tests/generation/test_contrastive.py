import numpy as np
import pytest
import tensorflow as tf
from reference import generation as reference

from kerasllm import GenerationConfig
from kerasllm.generation import Engine, Row

PROMPTS = [[3, 1, 4, 1, 5], [8], [9, 7, 9, 3, 2, 2, 6]]
END_IDS = (7,)
SETTINGS = {"top_k": 3, "penalty_alpha": 0.6, "min_new_tokens": 3}


def rows_of(**settings):
    return [Row(prompt, GenerationConfig(max_new_tokens=6, **settings), END_IDS) for prompt in PROMPTS]


def contrastive_search(model, row):
    """The definition of Su et al. (2022), with the whole text through the model for each candidate."""
    config, text = row.config, list(row.prompt)

    def states(text):
        logits, hidden = model(np.array([text], "int32"))
        hidden = np.asarray(hidden)[0].astype("float64")
        return np.asarray(logits)[0, -1], hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)

    while len(text) - len(row.prompt) < config.max_new_tokens:
        logits, hidden = states(text)
        scores = reference.process(logits, text, len(row.prompt), config, row.end_ids)
        probabilities = reference.softmax(scores)
        candidates = np.argsort(-probabilities, kind="stable")[: config.top_k]
        alpha = config.penalty_alpha
        values = [
            (1 - alpha) * probabilities[token] - alpha * (hidden @ states([*text, token])[1][-1]).max()
            for token in candidates
            if probabilities[token] > 0
        ]
        token = int(candidates[int(np.argmax(values))])
        if token in row.end_ids:
            break
        text.append(token)
    return text[len(row.prompt) :]


def test_what_may_not_come_is_never_new_enough(tiny):
    allowed = (11, 12, 13)
    forbidden = [token for token in range(60) if token not in allowed]
    batch = Engine(tiny).start(rows_of(top_k=8, penalty_alpha=0.95, suppress_tokens=forbidden))
    batch.advance(100)
    assert {token for row in range(3) for token in batch.new_ids(row)} <= set(allowed)


@pytest.fixture(scope="module")
def wanted(tiny, forward):
    specs = [tf.TensorSpec([None, None], tf.int32)]
    with_hidden = tf.function(lambda ids: tiny(ids, return_hidden=True), input_signature=specs)
    found = [contrastive_search(with_hidden, row) for row in rows_of(**SETTINGS)]
    plain = GenerationConfig(max_new_tokens=6, min_new_tokens=3)
    assert found != [reference.generate(forward, prompt, plain, END_IDS) for prompt in PROMPTS]
    return found


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_equals_the_definition(tiny, wanted, jit_compile):
    rows = rows_of(**SETTINGS)
    batch = Engine(tiny, jit_compile=jit_compile).start(rows)
    batch.advance(3)
    batch.advance(100)
    assert [batch.new_ids(number) for number in range(len(rows))] == wanted
