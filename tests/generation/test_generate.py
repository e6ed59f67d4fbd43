import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from kerasllm import (
    GPT2,
    T5,
    CausalLM,
    GenerationConfig,
    GPT2Config,
    Seq2SeqLM,
    T5Config,
    Tokenizer,
    train_tokenizer,
)

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


def ids_of(completions):
    return [completion.token_ids for completion in completions]


@pytest.mark.grappler
def test_equals_the_whole_text_forward(random_lm):
    outputs = ids_of(random_lm.generate_tokens(PROMPTS, max_new_tokens=20))
    assert outputs == [greedy_reference(random_lm, prompt, 20) for prompt in PROMPTS]
    assert all(len(set(row)) > 5 for row in outputs)  # or it would prove little


@pytest.mark.grappler
def test_rows_do_not_depend_on_their_neighbours(causal_lm):
    settings = {"max_new_tokens": 15, "temperature": 1.0, "seed": 11}
    together = causal_lm.generate_tokens(PROMPTS, **settings)
    alone = [ids_of(causal_lm.generate_tokens([prompt], **settings))[0] for prompt in PROMPTS]
    assert ids_of(together) == alone


def test_each_row_has_its_own_settings(causal_lm):
    from kerasllm.generation import TextGenerator

    generator = TextGenerator(causal_lm.model, causal_lm.tokenizer)
    outputs = generator.generate_text(
        tf.constant(["Once"] * 4),
        max_new_tokens=tf.constant([3, 9, 9, 9]),
        temperature=tf.constant([0.0, 0.0, 1.5, 1.5]),
        top_k=tf.constant([0, 0, 0, 1]),
        top_p=tf.constant([1.0] * 4),
        min_p=tf.constant([0.0] * 4),
        repetition_penalty=tf.constant([1.0] * 4),
        seed=tf.constant([0, 0, 1, 1]),
        stop=tf.constant([[""]] * 4),
    )
    counts = outputs["num_tokens"].numpy()
    ids = [row[:count].tolist() for row, count in zip(outputs["token_ids"].numpy(), counts, strict=True)]
    greedy = greedy_reference(causal_lm, "Once", 9)
    assert ids[0] == greedy[:3]
    assert ids[1] == greedy
    assert ids[3] == greedy  # top_k = 1 leaves the most likely token
    assert ids[2] != greedy
    assert outputs["token_ids"].numpy()[0, 3:].tolist() == [-1] * (len(greedy) - 3)


def test_stops_at_the_end_token(tokenizer):
    """A model that says `eos` after a given token ends there, and its row alone."""
    keras.utils.set_random_seed(0)
    model = GPT2(GPT2Config(vocabulary_size=400, context_length=32, num_layers=1, num_heads=2, dim=16))
    causal_lm = CausalLM(model, tokenizer)
    prompts = ["a b", "c"]
    free = ids_of(causal_lm.generate_tokens(prompts, max_new_tokens=8))
    # Make the end token score as the token that comes third for the first prompt, and a little more.
    table = ops.convert_to_numpy(model.token_embedding.embeddings).copy()
    third = free[0][2]
    table[tokenizer.eos_id] = table[third] * 1.0001
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
    assert len(causal_lm.generate_tokens("a")[0].token_ids) == 5
    causal_lm.generation_config = GenerationConfig(max_new_tokens=2)
    assert len(causal_lm.generate_tokens("a")[0].token_ids) == 2
    causal_lm.tokenizer = train_tokenizer("character", stories[:9])
    assert causal_lm.generate("a") == causal_lm.tokenizer.decode(greedy_reference(causal_lm, "a", 2))


def test_without_an_end_token(stories):
    tokenizer = train_tokenizer("byte_bpe", stories[:9], 300, special_tokens=())
    config = GPT2Config(vocabulary_size=300, context_length=16, num_layers=1, num_heads=2, dim=8)
    causal_lm = CausalLM(GPT2(config), tokenizer)
    assert len(causal_lm.generate_tokens("a", 7)[0].token_ids) == 7


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
    for prompts in ([], ["a", None], [[]], [[0.5]], [[-1]], [[400]], None, np.array([0.5]), np.array(7)):
        with pytest.raises((ValueError, TypeError)):
            causal_lm.generate(prompts)
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        causal_lm.generate(["a", "b\ud800"])
    with pytest.raises(TypeError, match="`prompts` must be one text"):
        causal_lm.generate(None)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        CausalLM(causal_lm.model).generate("a")


def test_names_of_transformers_are_explained(causal_lm):
    with pytest.raises(TypeError, match="for `num_return_sequences`: `n`"):
        causal_lm.generate("a", num_return_sequences=2)
    with pytest.raises(TypeError, match="`assistant_model` must be a task"):
        causal_lm.generate("a", assistant_model="a/folder")


def test_beams_of_a_model_that_draws(random_lm):
    expected = random_lm.generate("a", 4, num_beams=3, temperature=0)
    drawing = CausalLM(random_lm.model, random_lm.tokenizer, GenerationConfig(temperature=1.5))
    assert drawing.generate("a", 4, num_beams=3) == expected
    with pytest.raises(ValueError, match="`num_beams` needs temperature=0"):
        drawing.generate("a", 4, num_beams=3, temperature=1.0)


def test_seeds_as_an_array(random_lm):
    expected = random_lm.generate(["a", "b"], 4, temperature=1.0, seed=[5, 6])
    assert random_lm.generate(["a", "b"], 4, temperature=1.0, seed=np.array([5, 6])) == expected


def test_weights_in_several_files(random_lm, tmp_path):
    random_lm.save_pretrained(tmp_path, max_shard_size=1)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1


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


# The live interface

SAMPLED = {"max_new_tokens": 12, "temperature": 1.5}


def test_several_results_of_a_prompt(random_lm):
    texts = random_lm.generate(PROMPTS[:2], n=3, seed=[1, 2], **SAMPLED)
    assert [len(of_one) for of_one in texts] == [3, 3]
    assert len({text for of_one in texts for text in of_one}) == 6
    # The first one is what one result would be; a single prompt gives a single list.
    assert [of_one[0] for of_one in texts] == random_lm.generate(PROMPTS[:2], seed=[1, 2], **SAMPLED)
    assert random_lm.generate(PROMPTS[1], n=3, seed=2, **SAMPLED) == texts[1]
    beams = random_lm.generate(PROMPTS[:2], 5, n=2, num_beams=3)
    assert [len(of_one) for of_one in beams] == [2, 2] and beams[0][0] != beams[0][1]


def test_seeds_are_the_row_s(random_lm):
    one, two = random_lm.generate(["Once", "Once"], seed=[3, 4], **SAMPLED)
    assert one == random_lm.generate("Once", seed=3, **SAMPLED) != two
    with pytest.raises(ValueError, match="one for each prompt. Received: 3 seeds, 2 prompts"):
        random_lm.generate(["a", "b"], seed=[1, 2, 3], **SAMPLED)


def test_streams_are_the_texts(random_lm):
    texts = random_lm.generate(PROMPTS, seed=5, **SAMPLED)
    pieces = list(random_lm.generate(PROMPTS[0], stream=True, seed=5, **SAMPLED))
    assert len(pieces) > 3 and "".join(pieces) == texts[0]
    rows = {number: "" for number in range(len(PROMPTS))}
    for number, piece in random_lm.generate(PROMPTS, stream=True, seed=5, **SAMPLED):
        assert piece
        rows[number] += piece
    assert list(rows.values()) == texts


def test_ends_before_a_stop_string(random_lm):
    """Wherever it lies, also across tokens and in the middle of one; and only the row that has it ends."""
    free = random_lm.generate_tokens(PROMPTS, seed=5, **SAMPLED)
    text = free[0].text
    for start, end in ((1, 3), (len(text) // 2, len(text) // 2 + 4), (len(text) - 2, len(text))):
        stop = text[start:end]
        rows = random_lm.generate_tokens(PROMPTS, seed=5, stop_strings=["\0", stop], **SAMPLED)
        for row, whole in zip(rows, free, strict=True):
            assert row.text == whole.text.partition(stop)[0]
            assert (row.finish_reason == "stop") == (stop in whole.text)
            assert row.token_ids == whole.token_ids[: len(row.token_ids)]
        assert stop in random_lm.tokenizer.decode(rows[0].token_ids)
        assert stop not in random_lm.tokenizer.decode(rows[0].token_ids[:-1])
        streamed = "".join(
            random_lm.generate(PROMPTS[0], stream=True, seed=5, stop_strings=stop, **SAMPLED)
        )
        assert streamed == text.partition(stop)[0]


def test_full_results(random_lm):
    (free,) = random_lm.generate_tokens("Once", 9)
    assert (free.finish_reason, free.logprobs, len(free.token_ids)) == ("length", None, 9)
    (row,) = random_lm.generate_tokens("Once", 9, logprobs=2, stop_token_ids=[free.token_ids[4]])
    place = free.token_ids.index(free.token_ids[4])
    assert row.finish_reason == "stop" and row.token_ids == free.token_ids[:place]
    assert len(row.logprobs) == len(row.top_logprobs) == place
    for token, value, top in zip(row.token_ids, row.logprobs, row.top_logprobs, strict=True):
        assert len(top) == 2 and list(top.values()) == sorted(top.values(), reverse=True)
        assert top[token] == value  # greedy: the chosen token is the likeliest
    assert random_lm.generate_tokens("Once", 9, logprobs=0)[0].top_logprobs == [{}] * 9
    many = random_lm.generate_tokens("Once", 1, logprobs=400)[0].top_logprobs[0]
    np.testing.assert_allclose(np.exp(list(many.values())).sum(), 1, rtol=1e-4)


def test_settings_that_would_do_nothing(random_lm):
    for settings in ({"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}):
        with pytest.raises(ValueError, match="needs a `temperature` above 0"):
            random_lm.generate("a", 2, **settings)
    greedy = random_lm.generate("a", 2, temperature=0, top_p=0.5)
    assert random_lm.generate("a", 2, top_k=0, top_p=1.0) == greedy


def test_token_ids_in_and_out(random_lm):
    ids = random_lm.tokenizer.encode("Once upon")
    assert random_lm.generate(ids, 5) == random_lm.generate("Once upon", 5)
    assert random_lm.generate([ids, "Once upon"], 5) == [random_lm.generate("Once upon", 5)] * 2
    for one in (np.array(ids), tf.constant(ids), list(np.array(ids))):
        assert random_lm.generate(one, 5) == random_lm.generate("Once upon", 5)
        assert random_lm.generate([one, "Once upon"], 5) == random_lm.generate([ids] * 2, 5)
    assert random_lm.generate(np.array([ids] * 2), 5) == random_lm.generate([ids] * 2, 5)
    (row,) = CausalLM(random_lm.model).generate_tokens(ids, 5)
    assert row.text is None and row.token_ids == random_lm.generate_tokens(ids, 5)[0].token_ids


def test_draft_model(random_lm, causal_lm, stories):
    texts = random_lm.generate(PROMPTS, 9)
    assert random_lm.generate(PROMPTS, 9, assistant_model=causal_lm) == texts
    assert random_lm.generate(PROMPTS, 9, prompt_lookup_num_tokens=3) == texts
    other = train_tokenizer("byte_bpe", stories[50:], vocabulary_size=400)
    with pytest.raises(ValueError, match="`assistant_model` must have the same tokens"):
        random_lm.generate("a", 3, assistant_model=CausalLM(causal_lm.model, other))


def test_chat(random_lm):
    messages = [{"role": "user", "content": "Hello <|endoftext|>"}]
    options = {"chat_template": "{{ messages[0].content }}{{ '!' if add_generation_prompt }}"}
    answer = random_lm.chat(messages, 6, template_options=options)
    assert answer == random_lm.generate("Hello <|endoftext|>!", 6)
    assert "".join(random_lm.chat(messages, 6, stream=True, template_options=options)) == answer
    with pytest.raises(ValueError, match="template"):
        random_lm.chat(messages)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"n": 0}, ValueError, "`n` must be at least 1"),
        ({"n": 2}, ValueError, "`n` results that differ need a temperature"),
        ({"num_beams": 2, "n": 3}, ValueError, "at most `num_beams` results"),
        ({"num_beams": 2, "stream": True}, ValueError, "A beam search has"),
        ({"temprature": 1.0}, TypeError, r"Received: \['temprature'\]"),
        ({"min_new_tokens": 5, "max_new_tokens": 3}, ValueError, "`min_new_tokens` must be at most"),
    ],
)
def test_bad_settings_are_refused(random_lm, settings, error, message):
    with pytest.raises(error, match=message):
        random_lm.generate("a", **{"max_new_tokens": 4, **settings})


def test_generated_settings_of_the_config_are_exported(random_lm, tmp_path):
    """Those that the signature has no input for are in the graph."""
    config = GenerationConfig(max_new_tokens=9, repetition_penalty=1.8, no_repeat_ngram_size=2)
    model = CausalLM(random_lm.model, random_lm.tokenizer, config)
    serve = tf.saved_model.load(str(model.export(tmp_path / "1"))).signatures["serving_default"]
    texts = [text.decode() for text in serve(prompt=tf.constant(PROMPTS))["text"].numpy()]
    assert texts == model.generate(PROMPTS) != random_lm.generate(PROMPTS, 9)
    model.generation_config = GenerationConfig(num_beams=2)
    with pytest.raises(ValueError, match="A graph cannot hold `num_beams`"):
        model.export(tmp_path / "2")


def llama_tokenizer():
    """As Llama 2's: a mark stands for a space, and the space at the beginning of a text is dropped."""
    tokens = ["<unk>", "<s>", "</s>", "▁Paris", "▁is", "▁nice", "▁", "i", "s"]
    content = {
        "added_tokens": [{"id": i, "content": tokens[i], "special": True} for i in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "merges": [],
            "vocab": {token: i for i, token in enumerate(tokens)},
        },
    }
    return Tokenizer.from_json(json.dumps(content), settings={"bos_token": "<s>", "eos_token": "</s>"})


def says_only(model, token_id):
    """Makes a model say one token whatever comes before."""
    model.final_norm.scale.assign(np.zeros(model.config.dim))
    model.final_norm.bias.assign(np.ones(model.config.dim))
    table = np.zeros((model.config.vocabulary_size, model.config.dim), "float32")
    table[token_id] = 1
    model.token_embedding.embeddings.assign(table)


def test_a_continuation_keeps_the_space_before_it(tmp_path):
    tokenizer = llama_tokenizer()
    config = GPT2Config(vocabulary_size=9, context_length=16, num_layers=1, num_heads=1, dim=4)
    model = CausalLM(GPT2(config), tokenizer, GenerationConfig(max_new_tokens=2))
    says_only(model.model, tokenizer.token_to_id("▁nice"))
    # A prompt without text: the beginning token alone.
    prompts, expected = ["is", ""], [" nice nice", "nice nice"]
    assert model.generate(prompts) == expected
    assert model.generate(prompts[0]) == expected[0]
    assert model.generate(tokenizer.encode("is", add_special_tokens=True)) == expected[0]
    assert model.generate(prompts, num_beams=2) == expected
    assert model.generate(prompts, stop_strings="Paris") == expected
    assert model.generate(prompts, temperature=1e-3, n=2) == [[text] * 2 for text in expected]
    pieces = list(model.generate(prompts, stream=True))
    assert ["".join(piece for row, piece in pieces if row == number) for number in (0, 1)] == expected
    assert "".join(model.generate(prompts[0], stream=True)) == expected[0]
    serve = tf.saved_model.load(str(model.export(tmp_path / "1"))).signatures["serving_default"]
    texts = serve(prompt=tf.constant(prompts))["text"].numpy()
    assert [text.decode() for text in texts] == expected


def test_an_answer_of_an_encoder_decoder_begins_a_text():
    tokenizer = llama_tokenizer()
    config = T5Config(
        vocabulary_size=9,
        num_layers=1,
        num_heads=1,
        dim=4,
        head_dim=4,
        intermediate_dim=4,
        decoder_start_id=tokenizer.token_to_id("▁is"),  # no special token
    )
    model = Seq2SeqLM(T5(config), tokenizer, GenerationConfig(max_new_tokens=2))
    others = [i for i in range(9) if i != tokenizer.token_to_id("▁nice")]
    assert model.generate("is", suppress_tokens=others) == "nice nice"
    assert "".join(model.generate("is", suppress_tokens=others, stream=True)) == "nice nice"
