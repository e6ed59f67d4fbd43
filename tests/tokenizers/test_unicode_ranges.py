"""The character classes are those of the installed `tokenizers` library."""

import subprocess
import sys


def test_file_is_up_to_date(pytestconfig):
    tool = pytestconfig.rootpath / "tools" / "make_unicode_ranges"
    subprocess.run([sys.executable, tool, "--check"], check=True)
