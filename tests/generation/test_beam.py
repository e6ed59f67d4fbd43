import itertools

import numpy as np
import pytest
from reference import generation as reference

from kerasllm import GenerationConfig
from kerasllm.generation import Engine, Row
from kerasllm.generation.engine import search_beams

PROMPTS = [[3, 1, 4, 1, 5], [8], [9, 7, 9, 3, 2, 2, 6]]
END_IDS = (7, 11)


def rows_of(prompts=PROMPTS, end_ids=END_IDS, **settings):
    return [Row(prompt, GenerationConfig(**settings), end_ids) for prompt in prompts]


def test_enough_beams_find_the_best_text(forward, engine):
    """With as many beams as tokens, two new tokens are searched exhaustively."""
    config = {"num_beams": 60, "max_new_tokens": 2, "length_penalty": 0.0, "early_stopping": "never"}
    (found,) = search_beams(engine, rows_of([[3, 1, 4]], (), **config))
    first = np.log(reference.softmax(np.asarray(forward(np.array([[3, 1, 4]])))[0, -1].astype("float64")))
    texts = np.array([[3, 1, 4, token] for token in range(60)])
    second = np.asarray(forward(texts))[:, -1].astype("float64")
    scores = {
        (a, b): first[a] + np.log(reference.softmax(second[a]))[b]
        for a, b in itertools.product(range(60), range(60))
    }
    best = sorted(scores, key=scores.get, reverse=True)[:60]
    assert [tuple(beam.token_ids) for beam in found[:20]] == best[:20]
    np.testing.assert_allclose([beam.score for beam in found], [scores[pair] for pair in best], atol=1e-4)


def test_several_steps(forward, engine):
    """Against a search without end tokens and without a cache."""
    config = {"num_beams": 3, "max_new_tokens": 6, "length_penalty": 0.0, "early_stopping": "never"}
    found = search_beams(engine, rows_of(end_ids=(), **config))
    for prompt, beams in zip(PROMPTS, found, strict=True):
        texts = [([], 0.0)]
        for _ in range(6):
            longer = []
            for new, score in texts:
                logits = np.asarray(forward(np.array([prompt + new], "int32")))[0, -1].astype("float64")
                values = score + np.log(reference.softmax(logits))
                longer += [([*new, token], value) for token, value in enumerate(values)]
            texts = sorted(longer, key=lambda text: -text[1])[:3]
        assert [beam.token_ids for beam in beams] == [new for new, _ in texts]
        np.testing.assert_allclose([beam.score for beam in beams], [s for _, s in texts], atol=1e-4)


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_do_not_depend_on_their_neighbours(tiny, jit_compile):
    engine = Engine(tiny, jit_compile=jit_compile)
    rows = rows_of(num_beams=3, max_new_tokens=9, repetition_penalty=1.3, min_new_tokens=2)
    together = search_beams(engine, rows)
    for row, beams in zip(rows, together, strict=True):
        (alone,) = search_beams(engine, [row])
        assert [beam.token_ids for beam in alone] == [beam.token_ids for beam in beams]
        np.testing.assert_allclose([b.score for b in alone], [b.score for b in beams], atol=1e-5)
        assert all(2 <= len(beam.token_ids) <= 9 for beam in beams)


def test_settings_of_the_search_are_the_batch_s(engine):
    rows = rows_of(num_beams=3, max_new_tokens=2)[:1] + rows_of(num_beams=2, max_new_tokens=2)[:1]
    with pytest.raises(ValueError, match="`num_beams` must be the same for all rows"):
        search_beams(engine, rows)


@pytest.mark.reference
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 4, "length_penalty": 2.0},
        {"num_beams": 4, "length_penalty": -0.5},
        {"num_beams": 3, "early_stopping": True},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5},
        {"num_beams": 5, "early_stopping": "never", "length_penalty": 0.0},
        {"num_beams": 3, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    ],
    ids=str,
)
def test_equals_transformers(tiny, settings, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from kerasllm.checkpoints import save_folder

    save_folder(tmp_path, tiny, None, None)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    engine = Engine(tiny, jit_compile=False)
    found = search_beams(engine, rows_of(max_new_tokens=12, **settings))
    for prompt, beams in zip(PROMPTS, found, strict=True):
        outputs = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            num_return_sequences=settings["num_beams"],
            eos_token_id=list(END_IDS),
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
            **settings,
        )
        scores = outputs.sequences_scores.numpy()
        np.testing.assert_allclose([beam.score for beam in beams], scores, atol=2e-4)
        for beam, text in zip(beams, outputs.sequences[:, len(prompt) :].tolist(), strict=True):
            ends = [place for place, token in enumerate(text) if token in END_IDS]
            assert beam.token_ids == (text[: ends[0]] if ends else text)
