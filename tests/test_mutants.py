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
GPT2 = "models/test_gpt2.py"

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
                "(batch, length, self.num_kv_heads, group, self.head_dim)",
                "(batch, length, group, self.num_kv_heads, self.head_dim)",
            ),
            (
                "query = ops.transpose(query, (0, 2, 3, 1, 4))",
                "query = ops.transpose(query, (0, 3, 2, 1, 4))",
            ),
            (
                "mixed = ops.reshape(mixed, (batch, self.num_heads, length, self.head_dim))\n"
                "        mixed = ops.transpose(mixed, (0, 2, 1, 3))",
                "mixed = ops.reshape(mixed, (batch, self.num_kv_heads, group, length, self.head_dim))\n"
                "        mixed = ops.transpose(mixed, (0, 3, 2, 1, 4))",
            ),
        ),
        ATTENTION,
        "self_attention_matches_numpy",
    ),
    Mutant(
        "no causal mask",
        "layers/attention.py",
        (("if self.causal:\n", "if False:\n"),),
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
                "ACTIVATIONS[self.activation](self.gate(x)) * self.up(x)",
                "self.gate(x) * ACTIVATIONS[self.activation](self.up(x))",
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
        (("query = query * (1.0 / math.sqrt(self.head_dim))", "query = query * 1.0"),),
        ATTENTION,
        "self_attention_matches_numpy",
    ),
    Mutant(
        "sinusoids of the wrong frequencies",
        "layers/position.py",
        (("-np.arange(0, dim, 2, dtype", "-np.arange(dim // 2, dtype"),),
        "layers/test_position.py",
        "matches_the_paper",
    ),
    Mutant(
        "norm before the sum instead of after it",
        "layers/transformer.py",
        (("else norm(x + branch(x))", "else x + norm(branch(x))"),),
        "layers/test_transformer.py",
        "encoder_matches_numpy",
    ),
    Mutant(
        "mask ignored with a cache",
        "layers/attention.py",
        (
            (
                "self._bias(offsets, length, key_length, attention_mask, batch, group)",
                "self._bias(offsets, length, key_length, None if cache else attention_mask, batch, group)",
            ),
        ),
        ATTENTION,
        "left_padding",
    ),
    Mutant(
        "all rows written at the column of the first",
        "layers/attention.py",
        (("columns == ops.reshape(index, (-1, 1, 1, 1))", "columns == index[0]"),),
        ATTENTION,
        "rows_at_different_columns",
    ),
    Mutant(
        "positions forgotten",
        "models/gpt2.py",
        (("x = x + self.position_embedding(self._positions(token_ids, cache_index))\n", "pass\n"),),
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
