"""The character classes are those of the installed `tokenizers` library."""

import subprocess
import sys

import pytest

from kerasllm.tokenizers.unicode import PYTHON_SPACES


@pytest.mark.slow
def test_file_is_up_to_date(pytestconfig):
    tool = pytestconfig.rootpath / "tools" / "make_unicode_ranges"
    subprocess.run([sys.executable, tool, "--check"], check=True)


def test_all_of_pythons_spaces():
    assert set(PYTHON_SPACES) == set(filter(str.isspace, map(chr, range(sys.maxunicode + 1))))
