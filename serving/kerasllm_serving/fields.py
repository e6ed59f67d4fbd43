"""The body of a request to OpenAI's API, checked as it is read, and the errors of that API."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import grpc

from kerasllm_serving.errors import ServingError


class ApiError(Exception):
    """A request that failed, as OpenAI's clients read it.

    Args:
        status: HTTP status.
        message: What went wrong.
        param: The field that is wrong.
        code: A word for programs.
        seconds: After which it may be asked again, where that would help.
        allowed: The methods that a path takes, where another came.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        seconds: float = 1.0,
        allowed: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.seconds = seconds
        self.allowed = allowed

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        content = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": content}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it: when to ask again, and how."""
        if self.status in (429, 503):
            return {"retry-after": str(math.ceil(self.seconds))}
        return {"allow": ", ".join(self.allowed)} if self.allowed else {}


def from_serving_error(error: ServingError) -> ApiError:
    """Returns the same error as OpenAI's clients read it."""
    code = {
        grpc.StatusCode.RESOURCE_EXHAUSTED: "queue_full",
        grpc.StatusCode.DEADLINE_EXCEEDED: "timeout",
    }.get(error.code)
    if "maximum context length" in error.message:
        code = "context_length_exceeded"
    return ApiError(error.http_status, error.message, code=code)


class Fields:
    """The fields of a request's body, checked when they are taken.

    Args:
        body: JSON, or what was read of it.
    """

    def __init__(self, body: bytes | Mapping[str, Any]) -> None:
        if isinstance(body, Mapping):
            self._values = body
            return
        try:
            values = json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"The body must be JSON. Received: {error}") from error
        if not isinstance(values, dict):
            raise ApiError(400, f"The body must be a JSON object. Received: {type(values).__name__}")
        self._values = values

    def without(self, *names: str) -> dict[str, Any]:
        """Returns all fields that are not null but those of some names."""
        return {k: v for k, v in self._values.items() if k not in names and v is not None}

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field as it is; the default where it is missing or null."""
        value = self._values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """Returns a whole number in a range."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float, holds: Callable[[float], bool], rule: str) -> float:
        """Returns a number for which something holds."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, rule)
        try:
            value = float(value)
        except OverflowError:
            self.refuse(name, rule)
        # The graph works in float32.
        if not (math.isfinite(value) and abs(value) < 1e38 and holds(value)):
            self.refuse(name, rule)
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        """Returns True or False."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def string(self, name: str, default: str | None = None) -> str | None:
        """Returns a string."""
        value = self.get(name, default)
        if value is not None and not isinstance(value, str):
            self.refuse(name, "a string")
        return value

    def refuse(self, name: str, rule: str) -> NoReturn:
        """Raises the error that a field breaks a rule."""
        received = repr(self._values.get(name))
        if len(received) > 80:
            received = received[:80] + "…"
        raise ApiError(400, f"`{name}` must be {rule}. Received: {received}", param=name)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
