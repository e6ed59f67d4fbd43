"""Who may ask, and how much."""

import contextlib
import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from kerasllm_serving.errors import StartupError


class TooManyRequests(Exception):
    """A key has asked for more than it may.

    Args:
        message: What it may.
        seconds: After which it may ask again.
    """

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class KeyCheck:
    """Tells whether a request brings one of the keys, and whether the key may ask for more.

    Args:
        api_keys: The keys; none: anybody may ask, and all are one to the limits.
        requests_per_minute: How many requests of a key are answered in a minute; None: any number.
        concurrent_requests: How many requests of a key are answered at once; None: any number.
        clock: Tells the seconds.
    """

    def __init__(
        self,
        api_keys: Collection[str] = (),
        requests_per_minute: int | None = None,
        concurrent_requests: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = [hashlib.sha256(key.encode()).digest() for key in api_keys]
        self._per_minute = requests_per_minute
        self._concurrent = concurrent_requests
        self._clock = clock
        self._lock = threading.Lock()
        # By keys: how many requests it may make at this time; and how many are being answered.
        self._left: dict[bytes, tuple[float, float]] = {}
        self._running: dict[bytes, int] = {}

    @property
    def has_rules(self) -> bool:
        """Whether there is anything to check."""
        return bool(self._keys) or self._per_minute is not None or self._concurrent is not None

    def find(self, authorization: bytes) -> bytes | None:
        """Looks up what a request sent as `Authorization`, which must be `Bearer KEY`.

        Args:
            authorization: The header.

        Returns:
            What stands for the key, or None: it is not known.
        """
        if not self._keys:
            return b""
        scheme, _, key = authorization.partition(b" ")
        found = hashlib.sha256(key.strip()).digest()
        # All are compared, so that the time does not tell which one is near.
        matches = [hmac.compare_digest(found, known) for known in self._keys]
        return found if scheme.lower() == b"bearer" and any(matches) else None

    @contextlib.contextmanager
    def answering(self, key: bytes) -> Iterator[None]:
        """Counts a request while it is answered.

        Args:
            key: What `find` returned.

        Raises:
            TooManyRequests: If it is one too many.
        """
        with self._lock:
            running = self._running.get(key, 0)
            if self._concurrent is not None and running >= self._concurrent:
                raise TooManyRequests(f"A key may have {self._concurrent} requests at once.", 1.0)
            if self._per_minute is not None:
                self._take(key)
            self._running[key] = running + 1
        try:
            yield
        finally:
            with self._lock:
                self._running[key] -= 1

    def _take(self, key: bytes) -> None:
        """Takes one of the requests of a key, which come back evenly, up to those of a minute."""
        now, most = self._clock(), float(self._per_minute)
        left, before = self._left.get(key, (most, now))
        left = min(most, left + (now - before) * most / 60)
        if left < 1:
            self._left[key] = (left, now)
            raise TooManyRequests(
                f"A key may ask {self._per_minute} times a minute.", (1 - left) * 60 / most
            )
        self._left[key] = (left - 1, now)


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
