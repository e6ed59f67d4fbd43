"""A folder that answers as the live model does passes; one that does not is found and put nowhere."""

import errno
import json
import shutil

import pytest
from reference.weights import randomize

from kerasllm import (
    T5,
    Bert,
    BertConfig,
    CausalLM,
    GenerationConfig,
    MaskedLM,
    Seq2SeqLM,
    SequenceClassifier,
    T5Config,
    TextEmbedder,
    Tokenizer,
    train_tokenizer,
)
from kerasllm.cli import main
from kerasllm.export import VerificationError, release, verify, verify_export
from kerasllm.export.deployment import find_models


def problems(checks):
    return {check.name for check in checks if check.problem}


@pytest.fixture(scope="module")
def answers():
    """What was answered in this module, by the questions: a process that loads a folder takes long."""
    return {}


@pytest.fixture
def ask_once(answers, monkeypatch):
    ask = verify._ask

    def ask_or_remember(folder, questions):
        key = (str(folder), repr([(q.signature, q.inputs) for q in questions]))
        if key not in answers:
            answers[key] = ask(folder, questions)
        return answers[key]

    monkeypatch.setattr(verify, "_ask", ask_or_remember)


def test_a_true_folder_passes(served, causal_lm, ask_once):
    """As TensorFlow Serving runs it: a session, in a process where kerasllm cannot be imported."""
    checks = verify_export(served / "1", causal_lm)
    assert not problems(checks), verify.format_checks(checks)
    counts = {check.name: check.count for check in checks}
    assert counts["greedy token ids"] == 10 and counts["drawn token ids"] == 20
    assert counts["token ids of hard texts"] >= 20 and counts["reference tokenizer"] >= 30
    assert counts["scores"] == counts["texts of serving_default"] == 5 and counts["logits"] == 2
    table = verify.format_checks(checks).splitlines()
    assert len(table) == 1 + len(checks) and all(line.endswith("  equal") for line in table[1:])


def test_other_weights_are_found(served, random_lm, ask_once):
    found = problems(verify_export(served / "1", random_lm))
    assert found == {
        "greedy token ids",
        "drawn token ids",
        "texts of serving_default",
        "scores",
        "logits",
    }


def test_another_chat_template_is_found(random_served, chat_lm):
    """And the exported one is as good as the live one."""
    signatures = verify.read_signatures(random_served / "1")
    template = chat_lm.tokenizer.chat_template.replace(" | trim", "")
    settings = {"chat_template": template, "eos_token": chat_lm.tokenizer.eos_token}
    tokenizer = Tokenizer.from_json(chat_lm.tokenizer.to_json(), settings=settings)
    other = CausalLM(chat_lm.model, tokenizer, chat_lm.generation_config)
    asked = [
        [q for q in verify._Questions(task, signatures, {}).collect() if q.signature == "chat"]
        for task in (chat_lm, other)
    ]
    answers = [
        {name: verify._from_json(value) for name, value in answer.items()}
        for answer in verify._ask(random_served / "1", asked[0])
    ]
    for questions, is_equal in zip(asked, (True, False), strict=True):
        assert sum(len(question.inputs["roles"]) for question in questions) == 5
        found = [q.compare(answer) for q, answer in zip(questions, answers, strict=True)]
        assert (not any(found)) == is_equal, found


def test_another_tokenizer_is_found(served, causal_lm, stories, monkeypatch):
    other = train_tokenizer("byte_bpe", stories[50:], vocabulary_size=400)
    monkeypatch.setattr(causal_lm, "tokenizer", other)
    asked = verify._Questions(causal_lm, verify.read_signatures(served / "1"), {}).collect()
    asked = [question for question in asked if question.signature in ("tokenize", "detokenize")]
    differing = set()
    for question, answer in zip(asked, verify._ask(served / "1", asked), strict=True):
        outputs = {name: verify._from_json(value) for name, value in answer.items()}
        differing |= {question.name} if question.compare(outputs) else set()
    assert differing == {"token ids of hard texts", "texts of token ids"}


def test_a_tokenizer_unlike_its_file_is_found(tokenizer):
    content = json.loads(tokenizer.to_json())
    content["normalizer"] = {"type": "Lowercase"}
    content["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    other = Tokenizer.from_json(json.dumps(content))
    assert not problems(verify._check_reference(other))
    other.to_json = tokenizer.to_json
    (check,) = verify._check_reference(other)
    assert "live" in verify.format_checks([check]) and check.problem


@pytest.fixture(scope="module")
def word_pieces(stories):
    return train_tokenizer("wordpiece", stories[:50], 300)


@pytest.fixture(scope="module")
def make_bert(word_pieces):
    def make(head, seed=0, **fields):
        size = word_pieces.vocabulary_size
        config = BertConfig(
            vocabulary_size=size, context_length=32, num_layers=1, num_heads=2, dim=8, **fields
        )
        return randomize(Bert(config, head=head), seed)

    return make


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_release(make_bert, word_pieces, tmp_path, monkeypatch):
    task, other = (TextEmbedder(make_bert(None, seed), word_pieces) for seed in (0, 1))
    served, lines = tmp_path / "vectors", []
    path = release(task, served / "1", source={"name": "x", "license": "mit"}, report=lines.append)
    manifest = json.loads((path / "assets.extra" / "kerasllm_manifest.json").read_text())
    assert manifest["source"]["license"] == "mit" and names(served) == ["1"] and not lines
    with pytest.raises(FileExistsError, match="only with `overwrite`"):
        release(task, served / "1")

    class Wrong(TextEmbedder):
        """Says one thing and exports another."""

        def export(self, path, **limits):
            return other.export(path, **limits)

    wrong = Wrong(task.model, word_pieces)
    with pytest.raises(VerificationError, match="stays here: ") as raised:
        release(wrong, served / "1", verify=True, overwrite=True, report=lines.append)
    assert "DIFFERS" in lines[0] and "from the live numbers" in lines[0]
    # What failed can be looked at, servers do not see it, and what was there is there.
    (failed,) = (name for name in names(served) if name != "1")
    assert failed.startswith(".") and failed in str(raised.value)
    assert (served / failed / "saved_model.pb").is_file() and find_models(tmp_path) == {"vectors": [1]}
    assert json.loads((path / "assets.extra" / "kerasllm_manifest.json").read_text()) == manifest
    shutil.rmtree(served / failed)

    release(other, served / "1", overwrite=True)
    replaced = json.loads((path / "assets.extra" / "kerasllm_manifest.json").read_text())
    assert replaced["weights_sha256"] != manifest["weights_sha256"] and names(served) == ["1"]
    monkeypatch.chdir(served / "1")
    with pytest.raises(ValueError, match="current working directory"):
        release(task, served / "1", overwrite=True)


def test_a_full_disk_is_known_beforehand(make_bert, word_pieces, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(OSError, match="needs 64 MiB and there are 1 MiB free") as raised:
        release(TextEmbedder(make_bert(None), word_pieces), tmp_path / "a" / "1")
    assert raised.value.errno == errno.ENOSPC and names(tmp_path) == []


def test_what_fails_while_writing_leaves_nothing(make_bert, word_pieces, tmp_path):
    class Full(TextEmbedder):
        def export(self, path, **limits):
            super().export(path, **limits)
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        release(Full(make_bert(None), word_pieces), tmp_path / "1")
    assert names(tmp_path) == []


def test_command(make_bert, word_pieces, tmp_path, capsys):
    labels = ("bad", "good")
    task = SequenceClassifier(make_bert("classifier", labels=labels), word_pieces)
    folder = str(task.save_pretrained(tmp_path / "model"))
    path = str(tmp_path / "served" / "films" / "1")
    assert main(["export", folder, path, "--verify", "--docker", "--license", "mit"]) == 0
    out = capsys.readouterr().out
    assert "scores of labels" in out and "DIFFERS" not in out and f"written: {path}" in out
    card = (tmp_path / "served" / "films" / "1" / "assets.extra" / "README.md").read_text()
    assert "| license | mit |" in card and "| source | model |" in card
    config = (tmp_path / "served" / "tf_serving" / "models.config").read_text()
    assert 'base_path: "/models/films"' in config and "versions: 1" in config
    assert main(["export", folder, path]) == 1
    assert "only with `overwrite`" in capsys.readouterr().err
    assert main(["export", folder, str(tmp_path / "x.tflite"), "--verify"]) == 1
    assert "takes none of --overwrite" in capsys.readouterr().err
    assert main(["export", folder, str(tmp_path / "x.tflite"), "--no-jit-compile"]) == 1
    assert "takes none of --overwrite" in capsys.readouterr().err
    assert main(["export", folder, str(tmp_path / "x" / "1"), "--jit-compile"]) == 1
    assert "`--jit-compile` is for models that write text" in capsys.readouterr().err


def test_masked_lm_passes(make_bert, word_pieces, tmp_path):
    lines = []
    release(MaskedLM(make_bert("masked_lm"), word_pieces), tmp_path / "1", verify=True, report=lines.append)
    assert "filled masks" in lines[0] and "warm-up requests" in lines[0] and "DIFFERS" not in lines[0]


@pytest.mark.slow
def test_encoder_decoder_and_embedder_pass(make_bert, word_pieces, tokenizer, tmp_path):
    config = T5Config(
        vocabulary_size=400, context_length=32, num_layers=1, num_decoder_layers=1, num_heads=2, dim=16
    )
    lines = []
    for number, task in enumerate(
        (
            Seq2SeqLM(randomize(T5(config)), tokenizer, GenerationConfig(max_new_tokens=6)),
            TextEmbedder(make_bert(None), word_pieces),
        )
    ):
        release(task, tmp_path / str(number), verify=True, report=lines.append)
    assert "drawn token ids" in lines[0] and "scores" in lines[0] and "vectors" in lines[1]
    assert "DIFFERS" not in "".join(lines)
