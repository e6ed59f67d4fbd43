import json

import numpy as np
import pytest
from reference.assets import asset
from reference.checks import assert_close, to_numpy
from reference.weights import randomize
from reference.word_piece import make_word_piece

from kerasllm.models import GPT2, T5, Bert, BertConfig, GPT2Config, T5Config
from kerasllm.tasks import TextEmbedder
from kerasllm.tasks.text_embedder import POOLINGS

CONFIG = BertConfig(
    vocabulary_size=26, context_length=12, num_layers=2, num_heads=2, dim=8, intermediate_dim=12
)
TEXTS = ["the cat sat on the mat.", "a good film", "bird", "awful book under a tree. the dog"]
POOLED = {
    "mean": lambda states: states.mean(0),
    "cls": lambda states: states[0],
    "last": lambda states: states[-1],
    "max": lambda states: states.max(0),
}


def build(**settings):
    return TextEmbedder(randomize(Bert(CONFIG, head=None)), make_word_piece(), **settings)


class TestEncode:
    @pytest.mark.parametrize(
        "pooling, normalize",
        [("mean", False), ("mean", True), ("cls", True), ("last", False), ("max", False)],
    )
    def test_pools_each_text_without_its_padding(self, pooling, normalize):
        model = build(pooling=pooling, normalize=normalize)
        vectors = model.encode(TEXTS, batch_size=3)
        for text, vector in zip(TEXTS, vectors, strict=True):
            ids = np.array([model.tokenizer.encode(text, add_special_tokens=True)])
            right = POOLED[pooling](to_numpy(model.model(ids))[0].astype("float64"))
            assert_close(vector, right / np.linalg.norm(right) if normalize else right)

    def test_one_text(self):
        model = build()
        assert model.encode(TEXTS[0]).shape == (8,)
        assert_close(model.encode(TEXTS[0]), model.encode(TEXTS)[0])
        assert model.encode([]).shape == (0, 8)

    def test_similarity(self):
        vectors = build().encode(TEXTS)
        cosines = TextEmbedder.similarity(vectors, vectors[:2])
        assert cosines.shape == (4, 2)
        right = vectors[3] @ vectors[1] / np.linalg.norm(vectors[3]) / np.linalg.norm(vectors[1])
        np.testing.assert_allclose(cosines[3, 1], right, rtol=1e-5)
        np.testing.assert_allclose(TextEmbedder.similarity(vectors[0], 3 * vectors[0]), [[1.0]], rtol=1e-6)

    def test_prompts(self):
        model = build(prompts={"query": "good ", "passage": "bad "}, default_prompt="passage")
        plain = build()
        assert_close(model.encode(TEXTS, prompt="query"), plain.encode([f"good {t}" for t in TEXTS]))
        assert_close(model.encode(TEXTS), plain.encode([f"bad {text}" for text in TEXTS]))
        with pytest.raises(ValueError, match=r"`prompt` must be one of \['passage', 'query'\].*'title'"):
            model.encode(TEXTS, prompt="title")

    def test_long_texts_are_cut_only_where_someone_says_so(self):
        long = "the cat " * 10
        with pytest.raises(ValueError, match="context of the model, 12 tokens.*text 0 of 22 tokens"):
            build().encode(long)
        right = build().encode("the cat the cat the")
        assert_close(build(max_length=7).encode(long), right)
        assert_close(build(max_length=9).encode(long, max_length=7), right)

    def test_decoders_and_encoders_of_t5(self, tokenizer):
        sizes = {"vocabulary_size": 400, "num_layers": 1, "num_heads": 2, "dim": 8}
        for network, pooling in (
            (GPT2(GPT2Config(context_length=32, **sizes), head=None), "last"),
            (T5(T5Config(head_dim=4, intermediate_dim=9, **sizes), head=None), "mean"),
        ):
            model = TextEmbedder(randomize(network), tokenizer, pooling=pooling)
            texts = ["Once upon a time", "The dog", "A"]
            for text, vector in zip(texts, model.encode(texts), strict=True):
                states = to_numpy(network(np.array([tokenizer.encode(text)])))[0]
                assert_close(vector, POOLED[pooling](states))

    def test_errors(self):
        with pytest.raises(ValueError, match="`pooling` must be one of .*Received: 'middle'"):
            build(pooling="middle")
        with pytest.raises(ValueError, match="`default_prompt` must be None or one of .*'query'"):
            build(default_prompt="query")
        for wrong in ([("a", "b")], None, b"a", 5):
            with pytest.raises(TypeError, match="`texts` must be strings"):
                build().encode(wrong)
        with pytest.raises(ValueError, match="must have the head None. Received: head='masked_lm'"):
            TextEmbedder(Bert(CONFIG))


SETTINGS = {
    "pooling": "cls",
    "normalize": True,
    "max_length": 7,
    "prompts": {"query": "good "},
    "default_prompt": "query",
}


class TestFiles:
    @pytest.mark.parametrize("ending", ["", ".keras"])
    def test_saving(self, ending, tmp_path):
        model, path = build(**SETTINGS), tmp_path / f"model{ending}"
        (model.save if ending else model.save_pretrained)(path)
        loaded = TextEmbedder.load(path)
        for name in SETTINGS:
            assert getattr(loaded, name) == getattr(model, name)
        np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))

    def test_a_second_save_replaces_the_first(self, tmp_path):
        build(**SETTINGS).save_pretrained(tmp_path)
        build(pooling="last").save_pretrained(tmp_path)
        loaded = TextEmbedder.from_pretrained(tmp_path)
        assert (loaded.pooling, loaded.normalize, loaded.max_length) == ("last", False, None)

    def test_a_folder_of_another_task(self, tmp_path):
        build(**SETTINGS).save_pretrained(tmp_path)
        (tmp_path / "modules.json").unlink()
        loaded = TextEmbedder.from_pretrained(tmp_path)
        assert (loaded.pooling, loaded.normalize, loaded.max_length) == ("mean", False, None)

    @pytest.mark.parametrize("older", [True, False])
    def test_names_of_other_releases(self, older, tmp_path):
        build(**SETTINGS).save_pretrained(tmp_path)
        pooling = {"pooling_mode": "max"}
        kind = "sentence_transformers.sentence_transformer.modules"
        if older:
            kind, names = "sentence_transformers.models", ("cls_token", "mean_tokens", "max_tokens")
            pooling = {f"pooling_mode_{name}": name == "max_tokens" for name in names}
        change(tmp_path / "1_Pooling" / "config.json", lambda _: {"word_embedding_dimension": 8, **pooling})
        change(
            tmp_path / "modules.json",
            lambda modules: [{**m, "type": f"{kind}.{m['type'].rpartition('.')[2]}"} for m in modules],
        )
        (tmp_path / "sentence_bert_config.json").rename(tmp_path / "sentence_roberta_config.json")
        loaded = TextEmbedder.from_pretrained(tmp_path)
        assert (loaded.pooling, loaded.normalize, loaded.max_length) == ("max", True, 7)

    def test_no_text_is_longer_than_the_context(self, tmp_path):
        build(max_length=7).save_pretrained(tmp_path)
        change(tmp_path / "sentence_bert_config.json", lambda values: {**values, "max_seq_length": 512})
        assert TextEmbedder.from_pretrained(tmp_path).max_length == 12

    @pytest.mark.parametrize(
        "file, content, message",
        [
            ("modules.json", {"a": 1}, "modules.json must be a list of modules"),
            ("modules.json", [1, 2], "modules.json must be a list of modules"),
            ("modules.json", [{"type": "x.Transformer", "path": ""}], r"Received: .*\['Transformer'\]"),
            (
                "modules.json",
                [{"type": f"x.{name}", "path": ""} for name in ("Transformer", "Pooling", "Dense")],
                "must be a Transformer and a Pooling.*'Dense'",
            ),
            (
                "modules.json",
                [{"type": "x.Transformer", "path": "../a"}, {"type": "x.Pooling", "path": "1_Pooling"}],
                "A module must be in a folder of its own or none. Received: path='../a'",
            ),
            (
                "1_Pooling/config.json",
                {"pooling_mode": "weightedmean"},
                "pooling must be one of .*weightedm",
            ),
            ("1_Pooling/config.json", {"pooling_mode": ["mean", "max"]}, "Received: .'mean', 'max'."),
            ("1_Pooling/config.json", {"pooling_mode_weightedmean_tokens": True}, "pooling must be one of"),
            ("1_Pooling/config.json", {"include_prompt": False}, "must include the prompt"),
            ("sentence_bert_config.json", {"do_lower_case": True}, "`do_lower_case` must be false"),
            ("sentence_bert_config.json", {"max_seq_length": "many"}, "must be at least 1 or null.*'many'"),
            ("config_sentence_transformers.json", {"prompts": ["a"]}, "`prompts` must map names to texts"),
        ],
        ids=str,
    )
    def test_what_is_not_done(self, file, content, message, tmp_path):
        build().save_pretrained(tmp_path)
        change(tmp_path / file, lambda _: content)
        with pytest.raises(ValueError, match=message):
            TextEmbedder.from_pretrained(tmp_path)


def change(path, function):
    path.write_text(json.dumps(function(json.loads(path.read_text()))))


@pytest.mark.reference
class TestSentenceTransformers:
    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_same_vectors(self, pooling, normalize, tmp_path):
        sentence_transformers = pytest.importorskip("sentence_transformers")
        model = build(
            pooling=pooling, normalize=normalize, max_length=7, prompts={"q": "good "}, default_prompt="q"
        )
        model.save_pretrained(tmp_path / "ours")
        theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
        assert_close(model.encode(TEXTS), theirs.encode(TEXTS))
        theirs.save(str(tmp_path / "theirs"))
        loaded = TextEmbedder.from_pretrained(tmp_path / "theirs")
        assert (loaded.pooling, loaded.normalize, loaded.max_length) == (pooling, normalize, 7)
        assert_close(loaded.encode(TEXTS), theirs.encode(TEXTS))

    @pytest.mark.slow
    def test_minilm(self):
        sentence_transformers = pytest.importorskip("sentence_transformers")
        folder = asset("minilm")
        texts = [
            "A cat sat on the mat.",
            "There is a kitten on the rug!",
            "Ünïcödé, naïve café – 你好世界",
            "x",
            " ".join(f"Sentence number {number} of a long text." for number in range(60)),
        ]
        theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts)
        model = TextEmbedder.from_pretrained(folder)
        assert (model.pooling, model.normalize, model.max_length) == ("mean", True, 256)
        ours = model.encode(texts)
        np.testing.assert_allclose(model.similarity(ours, ours), theirs @ theirs.T, rtol=0, atol=1e-5)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
