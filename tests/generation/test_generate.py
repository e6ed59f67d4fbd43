import keras
import numpy as np
import pytest
from keras import ops

from kerasllm import GPT2, CausalLM, GenerationConfig, GPT2Config, train_tokenizer

PROMPTS = ["Once upon a time", "The", "Mia and Tom went to the big garden by the sea. They were"]


def greedy_reference(causal_lm, prompt, count):
    """Without a cache: the whole text through the model for each new token."""
    ids = causal_lm.tokenizer.encode(prompt)
    new = []
    while len(new) < count:
        token = int(ops.argmax(causal_lm(np.array([ids + new]))[0, -1]))
        if token == causal_lm.tokenizer.eos_id:
            break
        new.append(token)
    return new


def ids_of(outputs):
    counts = outputs["num_tokens"].numpy()
    return [row[:count].tolist() for row, count in zip(outputs["token_ids"].numpy(), counts, strict=True)]


def test_equals_the_whole_text_forward(random_lm):
    outputs = ids_of(random_lm.generate_tokens(PROMPTS, max_new_tokens=20))
    assert outputs == [greedy_reference(random_lm, prompt, 20) for prompt in PROMPTS]
    assert all(len(set(row)) > 5 for row in outputs)  # or it would prove little


def test_rows_do_not_depend_on_their_neighbours(causal_lm):
    settings = {"max_new_tokens": 15, "temperature": 1.0, "seed": 11}
    together = causal_lm.generate_tokens(PROMPTS, **settings)
    alone = [ids_of(causal_lm.generate_tokens([prompt], **settings))[0] for prompt in PROMPTS]
    assert ids_of(together) == alone


def test_each_row_has_its_own_settings(causal_lm):
    import tensorflow as tf

    from kerasllm.generation import TextGenerator

    generator = TextGenerator(causal_lm.model, causal_lm.tokenizer)
    outputs = generator.generate_text(
        tf.constant(["Once"] * 4),
        max_new_tokens=tf.constant([3, 9, 9, 9]),
        temperature=tf.constant([0.0, 0.0, 1.5, 1.5]),
        top_k=tf.constant([0, 0, 0, 1]),
        top_p=tf.constant([1.0] * 4),
        seed=tf.constant([0, 0, 1, 1]),
    )
    ids = ids_of(outputs)
    greedy = greedy_reference(causal_lm, "Once", 9)
    assert ids[0] == greedy[:3]
    assert ids[1] == greedy
    assert ids[3] == greedy  # top_k = 1 leaves the most likely token
    assert ids[2] != greedy
    assert outputs["token_ids"].numpy()[0, 3:].tolist() == [-1] * (len(greedy) - 3)


def test_stops_at_the_end_token(tokenizer):
    """A model that says `eos` after a given token ends there, and its row alone."""
    model = GPT2(GPT2Config(vocabulary_size=400, context_length=32, num_layers=1, num_heads=2, dim=16))
    causal_lm = CausalLM(model, tokenizer)
    prompts = ["a b", "c"]
    free = ids_of(causal_lm.generate_tokens(prompts, max_new_tokens=8))
    # Make the token that comes third for the first prompt score as the end token would, and more.
    table = ops.convert_to_numpy(model.token_embedding.embeddings).copy()
    third = free[0][2]
    table[tokenizer.eos_id] = table[third] * 1.01
    model.token_embedding.embeddings.assign(table)
    ended = ids_of(causal_lm.generate_tokens(prompts, max_new_tokens=8))
    for row, before in zip(ended, free, strict=True):
        expected = before[: before.index(third)] if third in before else before
        assert row == expected
        assert tokenizer.eos_id not in row


def test_fills_the_context_exactly(causal_lm):
    context = causal_lm.model.config.context_length
    prompt = "The garden was green and the sun was warm."
    room = context - len(causal_lm.tokenizer.encode(prompt))
    outputs = causal_lm.generate_tokens([prompt], max_new_tokens=room)
    assert ids_of(outputs)[0] == greedy_reference(causal_lm, prompt, room)
    with pytest.raises(ValueError, match=rf"context of {context} tokens.*max_new_tokens={room + 1}"):
        causal_lm.generate(prompt, max_new_tokens=room + 1)


def test_default_number_of_tokens_shrinks_to_the_room(causal_lm):
    context = causal_lm.model.config.context_length
    for left in (1, 3):
        prompt = "z" * (context - left)  # too rare to be merged: a token each
        assert len(causal_lm.tokenizer.encode(prompt)) == context - left
        assert ids_of(causal_lm.generate_tokens([prompt]))[0] == greedy_reference(causal_lm, prompt, left)


def test_current_settings_and_tokenizer_count(tokenizer, stories):
    config = GPT2Config(vocabulary_size=400, context_length=32, num_layers=1, num_heads=2, dim=16)
    causal_lm = CausalLM(GPT2(config), tokenizer, GenerationConfig(max_new_tokens=5))
    assert causal_lm.generate_tokens(["a"])["num_tokens"].numpy()[0] == 5
    causal_lm.generation_config = GenerationConfig(max_new_tokens=2)
    assert causal_lm.generate_tokens(["a"])["num_tokens"].numpy()[0] == 2
    causal_lm.tokenizer = train_tokenizer("character", stories[:9])
    assert causal_lm.generate("a") == causal_lm.tokenizer.decode(greedy_reference(causal_lm, "a", 2))


def test_without_an_end_token(stories):
    tokenizer = train_tokenizer("byte_bpe", stories[:9], 300, special_tokens=())
    config = GPT2Config(vocabulary_size=300, context_length=16, num_layers=1, num_heads=2, dim=8)
    causal_lm = CausalLM(GPT2(config), tokenizer)
    assert causal_lm.generate_tokens(["a"], 7)["num_tokens"].numpy()[0] == 7


def test_string_in_string_out(causal_lm):
    one = causal_lm.generate("Once", max_new_tokens=5)
    assert isinstance(one, str)
    assert causal_lm.generate(["Once"], max_new_tokens=5) == [one]
    assert one == causal_lm.tokenizer.decode(greedy_reference(causal_lm, "Once", 5))


def test_specials_in_a_prompt_are_plain_text(causal_lm):
    plain = causal_lm.tokenizer.encode("<|endoftext|>")
    assert causal_lm.tokenizer.eos_id not in plain
    outputs = causal_lm.generate_tokens(["<|endoftext|>"], max_new_tokens=4)
    assert ids_of(outputs)[0] == greedy_reference(causal_lm, "<|endoftext|>", 4)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "at least one token. Received: an empty prompt"),
        ("x " * 500, {}, r"shorter than the context of 64 tokens. Received: a prompt of \d{3,} tokens"),
        ("a", {"max_new_tokens": 2**31 - 1}, r"must fit into the context of 64 tokens.*2147483647"),
        ("a", {"max_new_tokens": 0}, "`max_new_tokens` must be at least 1. Received: .*0"),
        ("a", {"temperature": -0.5}, "`temperature` must be at least 0. Received: .*-0.5"),
        ("a", {"top_k": -2}, "`top_k` must be at least 0. Received: .*-2"),
        ("a", {"top_p": 1.5}, "`top_p` must be above 0 and at most 1. Received: .*1.5"),
    ],
)
def test_bad_input_is_refused(causal_lm, prompt, settings, message):
    with pytest.raises(ValueError, match=message):
        causal_lm.generate(prompt, **settings)


def test_bad_prompts_are_refused(causal_lm):
    for prompts in ([], [3], None):
        with pytest.raises((ValueError, TypeError)):
            causal_lm.generate(prompts)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        CausalLM(causal_lm.model).generate("a")


def test_generation_sees_updated_weights(tokenizer):
    keras.utils.set_random_seed(3)
    config = GPT2Config(vocabulary_size=400, context_length=32, num_layers=1, num_heads=2, dim=16)
    causal_lm = CausalLM(GPT2(config), tokenizer)
    causal_lm.generate("a", max_new_tokens=3)
    for weight in causal_lm.weights:
        weight.assign(keras.random.normal(weight.shape))
    assert ids_of(causal_lm.generate_tokens(["a"], max_new_tokens=6))[0] == greedy_reference(
        causal_lm, "a", 6
    )
