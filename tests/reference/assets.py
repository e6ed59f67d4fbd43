"""The real models and corpora that some slow tests read."""

from pathlib import Path

import pytest

from kerasllm.data.assets import asset_path


def asset(name: str) -> Path:
    """Returns where an asset lies, or skips the test and says how to fetch it."""
    try:
        return asset_path(name)
    except FileNotFoundError as hint:
        pytest.skip(str(hint))
