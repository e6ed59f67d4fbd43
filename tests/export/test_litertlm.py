import io
import json

import numpy as np
import pytest
from reference.weights import randomize
from sentencepiece import SentencePieceTrainer

from kerasllm import GPT2, CausalLM, GenerationConfig, GPT2Config, Tokenizer, cli
from kerasllm.export.litertlm import export_litertlm, llm_metadata
from kerasllm.litertlm import _engine, generate

pytest.importorskip("litert_lm")

# What checkpoints write: it adds texts, looks at the text's beginning and uses named tokens.
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'].strip() + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
PROMPT = "The little girl went to the park with her dog and"


@pytest.fixture(scope="module")
def chat_lm(random_lm):
    settings = {"chat_template": TEMPLATE, "eos_token": random_lm.tokenizer.eos_token}
    tokenizer = Tokenizer.from_json(random_lm.tokenizer.to_json(), settings=settings)
    return CausalLM(random_lm.model, tokenizer, GenerationConfig(max_new_tokens=12))


@pytest.fixture(scope="module")
def litertlm(chat_lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("litertlm") / "m.litertlm"
    return chat_lm.export(path, prefill_lengths=(4, 16), cache_length=46, quantize=None)


@pytest.mark.parametrize("prompt", ["Once", PROMPT, "a b c d e f g h i j k l m n o p q r"])
def test_the_runtime_continues_as_the_live_model(litertlm, chat_lm, prompt):
    answer = "".join(generate(litertlm, prompt, 10, raw=True, num_threads=2))
    assert answer == chat_lm.generate(prompt, 10)


def test_the_runtime_chats_as_the_live_model(litertlm, chat_lm):
    answer = "".join(generate(litertlm, f"  {PROMPT} ", 8, num_threads=2))
    assert answer == chat_lm.chat([{"role": "user", "content": f"  {PROMPT} "}], 8)
    report = json.loads(litertlm.with_suffix(".report.json").read_text())
    assert report["bundle_bytes"] == litertlm.stat().st_size > report["size_bytes"]
    assert report["divergence"] < 1e-5 and report["quantize"] is None


def test_a_token_before_each_text_is_there_once(litertlm, chat_lm, tmp_path):
    """With a template that writes it too, as those of Llama and Gemma do."""
    eos = chat_lm.tokenizer.eos_token
    content = json.loads(chat_lm.tokenizer.to_json())
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": eos, "type_id": 0}}, sequence],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {eos: {"id": eos, "ids": [0], "tokens": [eos]}},
    }
    settings = {"eos_token": eos, "bos_token": eos, "chat_template": "{{ bos_token }}" + TEMPLATE}
    tokenizer = Tokenizer.from_json(json.dumps(content), settings=settings)
    metadata = llm_metadata(chat_lm.model, tokenizer, GenerationConfig(), 46)
    assert list(metadata.start_token.token_ids.ids) == [0]
    model = CausalLM(chat_lm.model, tokenizer)
    path = model.export(tmp_path / "m.litertlm", prefill_lengths=(16,), cache_length=46, quantize=None)
    assert "".join(generate(path, PROMPT, 8, raw=True)) == model.generate(PROMPT, 8)
    assert "".join(generate(path, PROMPT, 8)) == model.chat([{"role": "user", "content": PROMPT}], 8)
    assert model.generate(PROMPT, 8) != chat_lm.generate(PROMPT, 8)  # so the token counts
    # Where the template has it as plain text, the runtime must not put it there a second time.
    settings["chat_template"] = eos + TEMPLATE
    tokenizer = Tokenizer.from_json(json.dumps(content), settings=settings)
    assert not llm_metadata(chat_lm.model, tokenizer, GenerationConfig(), 46).HasField("start_token")


def test_metadata_says_how_to_draw_and_to_stop(chat_lm):
    config = GenerationConfig(
        temperature=0.5, top_k=7, top_p=0.75, stop_token_ids=(5,), suppress_tokens=(9,)
    )
    metadata = llm_metadata(chat_lm.model, chat_lm.tokenizer, config, 46)
    sampler = metadata.sampler_params
    assert (sampler.k, sampler.p, sampler.temperature) == (7, 0.75, 0.5)
    assert [list(stop.token_ids.ids) for stop in metadata.stop_tokens] == [[chat_lm.tokenizer.eos_id], [5]]
    assert list(metadata.suppress_tokens.ids) == [9] and metadata.max_num_tokens == 46
    assert metadata.llm_model_type.HasField("generic_model")


def test_what_a_bundle_cannot_hold_is_refused_at_once(chat_lm, litertlm, tmp_path):
    model, tokenizer = chat_lm.model, chat_lm.tokenizer
    for name, config, message in (
        ("m.bin", GenerationConfig(), "must end in .litertlm"),
        ("m.litertlm", GenerationConfig(min_p=0.1), r"LiteRT-LM has .*Received: \['min_p'\]"),
        ("m.litertlm", GenerationConfig(eos_token_id=()), "needs a token that ends a text"),
    ):
        with pytest.raises(ValueError, match=message):
            export_litertlm(model, tokenizer, tmp_path / name, config)
    with pytest.raises(FileExistsError, match="never overwrites"):
        export_litertlm(model, tokenizer, litertlm)
    assert list(tmp_path.iterdir()) == []


def test_the_command_runs_and_measures(litertlm, tflite, chat_lm, capsys, tmp_path):
    command = ["run-litert", str(litertlm), PROMPT, "--max-new-tokens", "8", "--threads", "2"]
    assert cli.main([*command, "--raw"]) == 0
    assert capsys.readouterr().out == chat_lm.generate(PROMPT, 8) + "\n"
    assert cli.main(["run-litert", str(tflite), PROMPT, "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == chat_lm.generate(PROMPT, 8) + "\n"
    sizes = ["--prompt-tokens", "16", "--new-tokens", "8"]
    assert cli.main(["benchmark-litert", str(litertlm), *sizes]) == 0
    numbers = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert set(numbers) == {
        *("prefill_tokens_per_second", "decode_tokens_per_second"),
        *("seconds_to_first_token", "seconds_to_load"),
    }
    assert all(np.isfinite(float(number)) and float(number) > 0 for number in numbers.values())
    (tmp_path / "m.litertlm").write_bytes(b"no model")
    for path, message in (
        (tmp_path / "m.litertlm", "damaged"),
        (tmp_path / "none.litertlm", "no model at"),
    ):
        assert cli.main(["run-litert", str(path), "Hi"]) == 1
        assert message in capsys.readouterr().err


def sentencepiece_folder(folder, stories, kind, size, is_for_chats, **settings):
    """A checkpoint's tokenizer files; `CHAT` writes user-defined tokens, as Gemma's template does."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(stories),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        byte_fallback=True,
        user_defined_symbols=["<user>", "<a>"],
        add_dummy_prefix=not is_for_chats,
        minloglevel=2,
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_folder(folder)


CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'].strip() }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


@pytest.mark.parametrize(("kind", "settings"), [("unigram", {}), ("bpe", {"chat_template": CHAT})])
def test_sentencepiece_section(kind, settings, stories, tmp_path):
    tokenizer = sentencepiece_folder(tmp_path / "tokenizer", stories, kind, 450, bool(settings), **settings)
    config = GPT2Config(
        vocabulary_size=tokenizer.vocabulary_size, context_length=64, num_layers=1, num_heads=4, dim=32
    )
    live = CausalLM(randomize(GPT2(config)), tokenizer, GenerationConfig(max_new_tokens=8))
    live.save_pretrained(tmp_path / "checkpoint")
    path, model = tmp_path / "m.litertlm", tmp_path / "tokenizer" / "tokenizer.model"
    sizes = ["--prefill-lengths", "16", "--cache-length", "46", "--quantize", "none"]
    command = ["export", str(tmp_path / "checkpoint"), str(path), "--sentencepiece-model", str(model)]
    assert cli.main([*command, *sizes]) == 0
    assert model.read_bytes() in path.read_bytes()
    with _engine(path, 2) as engine:
        for text in (PROMPT, "Once", "two  spaces ", "é 日本 naïve", "Hi<a>there", *stories[-20:]):
            assert engine.tokenize(text) == tokenizer.encode(text, parse_special=True)
    assert "".join(generate(path, PROMPT, 8, raw=True, num_threads=2)) == live.generate(PROMPT, 8)
    if settings:
        assert "".join(generate(path, PROMPT, 8)) == live.chat([{"role": "user", "content": PROMPT}], 8)


def test_another_sentencepiece_model_is_refused(chat_lm, stories, tmp_path):
    tokenizer = sentencepiece_folder(tmp_path / "a", stories, "unigram", 450, True)
    other = sentencepiece_folder(tmp_path / "b", stories, "unigram", 440, True)
    # The tokens of the first, and another way to cut texts.
    model = json.loads(tokenizer.to_json())
    model["model"]["vocab"] = [[piece, -float(len(piece) ** 2)] for piece, _ in model["model"]["vocab"]]
    otherwise = Tokenizer.from_json(json.dumps(model), settings={"eos_token": "</s>"})
    control = Tokenizer.from_json(
        tokenizer.to_json(), settings={"eos_token": "</s>", "chat_template": CHAT + "</s>"}
    )
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(b"no model")
    file = tmp_path / "a" / "tokenizer.model"
    for made_for, model_file, message in (
        (other, file, "must have the tokenizer's tokens. Received: 450 tokens, of a tokenizer with 440"),
        (otherwise, file, "must cut texts as the tokenizer does"),
        (control, file, "a template that gives '<user>a<assistant>b</s>'"),
        (tokenizer, damaged, "must be a SentencePiece model"),
    ):
        with pytest.raises(ValueError, match=message):
            export_litertlm(
                chat_lm.model, made_for, tmp_path / "m.litertlm", sentencepiece_model=model_file
            )
    with pytest.raises(FileNotFoundError):
        export_litertlm(
            chat_lm.model, tokenizer, tmp_path / "m.litertlm", sentencepiece_model=tmp_path / "none"
        )
