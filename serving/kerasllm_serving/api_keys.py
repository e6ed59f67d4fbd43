"""Who may ask."""

import hashlib
import hmac
from collections.abc import Collection
from pathlib import Path

from kerasllm_serving.errors import StartupError


class KeyCheck:
    """Tells whether a request brings one of the keys.

    Args:
        api_keys: The keys; none: anybody may ask.
    """

    def __init__(self, api_keys: Collection[str]) -> None:
        self._known = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    def __call__(self, authorization: bytes) -> bool:
        """Checks what a request sent as `Authorization`, which must be `Bearer KEY`."""
        if not self._known:
            return True
        scheme, _, key = authorization.partition(b" ")
        found = hashlib.sha256(key.strip()).digest()
        # All are compared, so that the time does not tell which one is near.
        matches = [hmac.compare_digest(found, known) for known in self._known]
        return scheme.lower() == b"bearer" and any(matches)


def read_api_keys(path: Path) -> tuple[str, ...]:
    """Reads a file with a key per line; empty lines and those that begin with # do not count.

    Args:
        path: The file.

    Returns:
        The keys.

    Raises:
        StartupError: If it cannot be read, or holds no key.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(
            f"`--api_keys_file` must be a readable file. Received: {path}: {error}"
        ) from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise StartupError(
            f"`--api_keys_file` must hold a key per line. Received: {path}, which holds none"
        )
    return keys
