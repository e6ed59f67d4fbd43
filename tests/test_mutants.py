"""Proves that the tests of layers and models catch wrong maths: each mutant must turn them red."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTED = ("tests/layers", "tests/models", "tests/reference", "tests/golden")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One way to get the maths wrong.

    Args:
        what: What is wrong.
        file: The file below `kerasllm/` that is changed.
        changes: Original text, which must occur exactly once, and what replaces it.
        tests: The test file that must notice.
        select: Which of its tests run (`-k`).
    """

    what: str
    file: str
    changes: tuple[tuple[str, str], ...]
    tests: str
    select: str

    def apply(self, root: Path) -> None:
        path = root / "kerasllm" / self.file
        text = path.read_text()
        for original, mutated in self.changes:
            times = text.count(original)
            assert times == 1, f"{self.what}: must occur once, not {times} times in {self.file}: {original}"
            text = text.replace(original, mutated)
        path.write_text(text)


ATTENTION = "layers/test_attention.py"
POSITION = "layers/test_position.py"
TRANSFORMER = "layers/test_transformer.py"
BERT = "models/test_bert.py"
GPT2 = "models/test_gpt2.py"
LLAMA = "models/test_llama.py"
T5 = "models/test_t5.py"

MUTANTS = [
    Mutant(
        "no rotary embedding",
        "layers/attention.py",
        (("if rotary_wavelength is not None:", "if False:"),),
        ATTENTION,
        "self_attention_matches_numpy",
    ),
    Mutant(
        "rotary position of a decoded token always 0",
        "layers/attention.py",
        (("positions = offsets if", "positions = ops.arange(length) if"),),
        ATTENTION,
        "decoding_equals_the_whole",
    ),
    Mutant(
        "learned position of a decoded token always 0",
        "models/base.py",
        (('return ops.expand_dims(ops.cast(cache_index, "int32"), -1) + offsets', "return offsets"),),
        GPT2,
        "decoding_equals_the_whole",
    ),
    Mutant(
        "tile for repeat in grouped-query attention",
        "layers/attention.py",
        (
            (
                "(-1, length, self.num_kv_heads, group, self.head_dim)",
                "(-1, length, group, self.num_kv_heads, self.head_dim)",
            ),
            (
                "query = ops.transpose(query, (0, 2, 3, 1, 4))",
                "query = ops.transpose(query, (0, 3, 2, 1, 4))",
            ),
            (
                "mixed = ops.reshape(mixed, (-1, self.num_heads, length, self.head_dim))\n"
                "        mixed = ops.transpose(mixed, (0, 2, 1, 3))",
                "mixed = ops.reshape(mixed, (-1, self.num_kv_heads, group, length, self.head_dim))\n"
                "        mixed = ops.transpose(mixed, (0, 3, 2, 1, 4))",
            ),
        ),
        ATTENTION,
        "self_attention_matches_numpy",
    ),
    Mutant(
        "no causal mask",
        "layers/attention.py",
        (("if self.causal:  #", "if False:  #"),),
        ATTENTION,
        "causal_to_the_last_bit",
    ),
    Mutant(
        "causal mask that lets the next token through",
        "layers/attention.py",
        (("<= query_index", "<= 1 + query_index"),),
        GPT2,
        "causal_to_the_last_bit",
    ),
    Mutant(
        "activation on the wrong branch",
        "layers/feed_forward.py",
        (
            (
                "ACTIVATIONS[self.activation](gate) * up",
                "gate * ACTIVATIONS[self.activation](up)",
            ),
        ),
        "layers/test_feed_forward.py",
        "matches_numpy",
    ),
    Mutant(
        "exact GELU for its approximation",
        "layers/feed_forward.py",
        (("approximate=True", "approximate=False"),),
        "layers/test_feed_forward.py",
        "matches_numpy",
    ),
    Mutant(
        "RMSNorm without the root",
        "layers/norm.py",
        (("ops.rsqrt(mean_square + self.epsilon)", "1.0 / (mean_square + self.epsilon)"),),
        "layers/test_norm.py",
        "matches_numpy",
    ),
    Mutant(
        "LayerNorm without the mean",
        "layers/norm.py",
        (("centred = wide - ops.mean(wide, axis=-1, keepdims=True)", "centred = wide"),),
        "layers/test_norm.py",
        "matches_numpy",
    ),
    Mutant(
        "scores not divided by the root of the width",
        "layers/attention.py",
        (("1.0 / math.sqrt(head_dim) if query_scale", "1.0 if query_scale"),),
        ATTENTION,
        "self_attention_matches_numpy",
    ),
    Mutant(
        "sinusoids of the wrong frequencies",
        "layers/position.py",
        (("exponents = np.arange(0, dim, 2, dtype", "exponents = np.arange(dim // 2, dtype"),),
        POSITION,
        "matches_the_paper",
    ),
    Mutant(
        "norm before the sum instead of after it",
        "layers/transformer.py",
        (("return forget_inside(norm, x + branch(x))", "return x + norm(branch(x))"),),
        TRANSFORMER,
        "encoder_matches_numpy",
    ),
    Mutant(
        "mask ignored with a cache",
        "layers/attention.py",
        (
            (
                "key_length, attention_mask, position_bias, group)\n            mixed",
                "key_length, None if cache else attention_mask, position_bias, group)\n            mixed",
            ),
        ),
        ATTENTION,
        "left_padding",
    ),
    Mutant(
        "blocks of a cache weighted by softmaxes of their own",
        "layers/attention.py",
        (("mixed * faded + products", "mixed + products"),),
        ATTENTION,
        "in_blocks",
    ),
    Mutant(
        "blocks from the oldest row's place on, not from its window's",
        "layers/attention.py",
        (("ops.min(index) - sliding_window + 1", "ops.min(index)"),),
        ATTENTION,
        "in_blocks",
    ),
    Mutant(
        "columns counted twice where the last block begins in the one before",
        "layers/attention.py",
        (("< first - begin, MASKED", "< 0, MASKED"),),
        ATTENTION,
        "in_blocks",
    ),
    Mutant(
        "all rows written at the column of the first",
        "layers/attention.py",
        (("columns == index, new", "columns == index[:1], new"),),
        ATTENTION,
        "rows_at_different_columns",
    ),
    Mutant(
        "positions forgotten",
        "models/gpt2.py",
        ((" + self.position_embedding(positions)\n", "\n"),),
        GPT2,
        "order_matters",
    ),
    Mutant(
        "tied head untied on reload",
        "models/base.py",
        (
            (
                'config_class.from_dict(config.pop("config"))',
                'config_class.from_dict({**config.pop("config"), "tie_embeddings": False})',
            ),
        ),
        GPT2,
        "tying_survives",
    ),
    Mutant(
        "tying left out of the saved configuration",
        "models/base.py",
        (
            (
                '"config": self.config.to_dict()',
                '"config": {k: v for k, v in self.config.to_dict().items() if k[:3] != "tie"}',
            ),
        ),
        GPT2,
        "tying_survives",
    ),
    Mutant(
        "the norms of a block exchanged in the weight table",
        "models/gpt2.py",
        (
            ('ln_1.weight": ("block_{}/attention', 'ln_1.weight": ("block_{}/feed_forward'),
            ('ln_2.weight": ("block_{}/feed_forward', 'ln_2.weight": ("block_{}/attention'),
        ),
        GPT2,
        "logits_and_loss",
    ),
    Mutant(
        "no window",
        "layers/attention.py",
        (("if sliding_window is not None:\n", "if False:\n"),),
        ATTENTION,
        "options_match_numpy",
    ),
    Mutant(
        "a window of one more",
        "layers/attention.py",
        (("keys > query_index - sliding_window", "keys >= query_index - sliding_window"),),
        LLAMA,
        "a_window_hides",
    ),
    Mutant(
        "no norm of queries and keys",
        "layers/attention.py",
        (("if norm is not None:\n", "if False:\n"),),
        ATTENTION,
        "options_match_numpy",
    ),
    Mutant(
        "scale of the queries ignored",
        "layers/attention.py",
        (("head_dim) if query_scale is None else query_scale", "head_dim)"),),
        ATTENTION,
        "options_match_numpy",
    ),
    Mutant(
        "scores without their bound",
        "layers/attention.py",
        (("if score_cap is not None:\n", "if False:\n"),),
        ATTENTION,
        "options_match_numpy",
    ),
    Mutant(
        "no position bias",
        "layers/attention.py",
        (("if position_bias is not None:\n", "if False:\n"),),
        ATTENTION,
        "position_bias_matches_numpy",
    ),
    Mutant(
        "one column too many overwritten by several tokens",
        "layers/attention.py",
        (("columns < index + count", "columns <= index + count"),),
        ATTENTION,
        "several_tokens_per_row",
    ),
    Mutant(
        "scaling of the rotation ignored",
        "layers/position.py",
        (("if scaling is None:\n", "if True:\n"),),
        POSITION,
        "scaling_matches",
    ),
    Mutant(
        "slow and fast pairs exchanged in Llama 3's scaling",
        "layers/position.py",
        (("(1.0 - kept) * frequencies / factor + kept *", "kept * frequencies / factor + (1.0 - kept) *"),),
        POSITION,
        "scaling_matches",
    ),
    Mutant(
        "YaRN without its temperature",
        "layers/position.py",
        (("attention_factor = temperature(1.0)", "attention_factor = 1.0"),),
        POSITION,
        "scaling_matches",
    ),
    Mutant(
        "the whole head rotated instead of a fraction",
        "layers/position.py",
        (("self.rotary_dim = int(head_dim * fraction)", "self.rotary_dim = head_dim"),),
        POSITION,
        "scaling_matches",
    ),
    Mutant(
        "distances without a direction",
        "layers/position.py",
        (("offset = np.where(distance > 0, count, 0)", "offset = 0"),),
        POSITION,
        "published_buckets",
    ),
    Mutant(
        "linear instead of logarithmic buckets",
        "layers/position.py",
        (("growth = np.log(np.maximum(distance, 1)", "growth = (np.maximum(distance, 1)"),),
        POSITION,
        "published_buckets",
    ),
    Mutant(
        "Gemma's gain without the one",
        "layers/norm.py",
        (("if self.unit_offset:\n", "if False:\n"),),
        "layers/test_norm.py",
        "matches_numpy",
    ),
    Mutant(
        "no norm at the end of a branch",
        "layers/transformer.py",
        (("y if last_norm is None else forget_inside(last_norm, y)", "y"),),
        TRANSFORMER,
        "decoder_matches_numpy",
    ),
    Mutant(
        "embeddings not scaled",
        "models/llama.py",
        (("if self.config.scale_embeddings:\n", "if False:\n"),),
        LLAMA,
        "matches_numpy",
    ),
    Mutant(
        "logits without their bound",
        "models/llama.py",
        (("logits if cap is None else cap * ops.tanh(logits / cap)", "logits"),),
        LLAMA,
        "matches_numpy",
    ),
    Mutant(
        "a rotation in every layer",
        "models/llama.py",
        (("if config.rotary_layers is None or config.rotary_layers[number]:", "if True:"),),
        LLAMA,
        "matches_numpy",
    ),
    Mutant(
        "one rotation for layers with and without a window",
        "models/llama.py",
        (("if config.local_rotary_wavelength is not None:\n", "if False:\n"),),
        LLAMA,
        "matches_numpy",
    ),
    Mutant(
        "a window in every layer",
        "models/llama.py",
        (("windowed = config.window_layers is None or config.window_layers[number]", "windowed = True"),),
        LLAMA,
        "matches_numpy",
    ),
    Mutant(
        "the norms of a Llama's block exchanged in the weight table",
        "models/llama.py",
        (
            (
                'input_layernorm="attention_norm", post_attention_layernorm="feed_forward_norm"',
                'input_layernorm="feed_forward_norm", post_attention_layernorm="attention_norm"',
            ),
        ),
        LLAMA,
        "logits_and_loss",
    ),
    Mutant(
        "RoBERTa's positions counted from the padding's own",
        "models/bert.py",
        (("* counted + padding_id", "* counted + padding_id - 1"),),
        BERT,
        "hidden_states_match_numpy",
    ),
    Mutant(
        "padding counted among RoBERTa's positions",
        "models/bert.py",
        (("return ops.cumsum(counted, axis=1)", "return ops.cumsum(ops.ones_like(counted), axis=1)"),),
        BERT,
        "pass_over_padding",
    ),
    Mutant(
        "mask of an encoder ignored",
        "models/bert.py",
        (("x = block(x, attention_mask=attention_mask,", "x = block(x, attention_mask=None,"),),
        BERT,
        "padding_on_the_right",
    ),
    Mutant(
        "norms of BERT before the branches",
        "models/bert.py",
        (("norm_first=False", "norm_first=True"),),
        BERT,
        "hidden_states_match_numpy",
    ),
    Mutant(
        "the masked-token head with the body's activation",
        "models/bert.py",
        (("config.head_activation or config.activation", "config.activation"),),
        BERT,
        "masked_lm_matches_numpy",
    ),
    Mutant(
        "no dropout before the last matrix of a classifier",
        "models/bert.py",
        (
            (
                "self.classifier_dropout(self.classifier_dense(x), training=training)",
                "self.classifier_dense(x)",
            ),
        ),
        BERT,
        "each_dropout_is_applied",
    ),
    Mutant(
        "buckets of the two directions exchanged",
        "layers/position.py",
        (("offset = np.where(distance > 0, count, 0)", "offset = np.where(distance < 0, count, 0)"),),
        T5,
        "test_matches_numpy",
    ),
    Mutant(
        "tied head of T5 with an unscaled input",
        "models/t5.py",
        (("hidden * self.config.dim**-0.5", "hidden"),),
        T5,
        "test_matches_numpy",
    ),
    Mutant(
        "scores of T5 divided by the root of the width",
        "models/t5.py",
        (("query_scale=1.0", "query_scale=None"),),
        T5,
        "test_matches_numpy",
    ),
    Mutant(
        "distances of a decoded token as if it were the first",
        "models/t5.py",
        (
            (
                "self._positions(token_ids, cache_index), key_length",
                "self._positions(token_ids, None), key_length",
            ),
        ),
        T5,
        "decoding_equals_the_whole",
    ),
    Mutant(
        "padding of the source seen by the decoder",
        "models/t5.py",
        (("memory_mask=memory_mask,", "memory_mask=None,"),),
        T5,
        "padding_changes_nothing",
    ),
]


def copy_of_the_code(folder: Path) -> Path:
    """Copies what the tests of layers and models need."""
    clutter = shutil.ignore_patterns("__pycache__")
    for name in ("kerasllm", *TESTED):
        shutil.copytree(ROOT / name, folder / name, ignore=clutter)
    shutil.copy(ROOT / "setup.cfg", folder)
    return folder


def run_tests(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_every_mutant_applies(tmp_path):
    for mutant in MUTANTS:
        package = tmp_path / mutant.what / "kerasllm"
        shutil.copytree(ROOT / "kerasllm", package, ignore=shutil.ignore_patterns("__pycache__"))
        mutant.apply(package.parent)


@pytest.mark.slow
def test_the_unchanged_copy_passes(tmp_path):
    """Otherwise a mutant could turn red for another reason, such as an incomplete copy."""
    folder = copy_of_the_code(tmp_path)
    files = sorted({f"tests/{mutant.tests}" for mutant in MUTANTS})
    result = run_tests(folder, *files, "-k", " or ".join(sorted({mutant.select for mutant in MUTANTS})))
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what.replace(" ", "_"))
def test_mutant_turns_the_tests_red(mutant, tmp_path):
    folder = copy_of_the_code(tmp_path)
    mutant.apply(folder)
    result = run_tests(folder, f"tests/{mutant.tests}", "-k", mutant.select)
    # 1: a test failed. A mutant that does not even run, or a selection without tests, gives another code
    # or another error, and proves nothing.
    assert result.returncode == 1, result.stdout
    assert "AssertionError" in result.stdout, result.stdout
