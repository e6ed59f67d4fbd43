"""How a failure looks to a client, over gRPC and HTTP, and to whoever starts the server."""

import re

import grpc

_HTTP_STATUS = {
    grpc.StatusCode.OK: 200,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNKNOWN: 500,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DATA_LOSS: 500,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}
_CODE_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}

# What TensorFlow's Python session puts around the message of the failing op, and the runtime of functions.
_PREFIX = re.compile(r"^Graph execution error:\s*")
_FUNCTIONS = re.compile(r"^(\{\{(function_)?node [^{}]*\}\}\s*)+")
_SEVERAL_ROOTS = re.compile(r"^\d+ root error\(s\) found\.\s*\(0\) [A-Z_]+: ")
_WHERE_DEFINED = re.compile(r"^Detected at node.*?^Node: '[^\n]*'\n", re.DOTALL | re.MULTILINE)
_NODE_TRAILER = re.compile(r"\s*\n\t \[\[.*", re.DOTALL)
_STACK_TRAILER = re.compile(r"\s*Original stack trace for .*", re.DOTALL)


class ServingError(Exception):
    """A request that failed; it reaches the client as this code and message.

    Args:
        code: Canonical status code.
        message: What the client reads.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def http_status(self) -> int:
        """The HTTP status that TensorFlow Serving's REST API gives to this code."""
        return _HTTP_STATUS[self.code]


class StartupError(Exception):
    """The server cannot start; the message says the rule and what came in."""


def invalid_argument(message: str) -> ServingError:
    """Returns the error of a request that is wrong whatever the state of the server."""
    return ServingError(grpc.StatusCode.INVALID_ARGUMENT, message)


def unimplemented(message: str) -> ServingError:
    """Returns the error of a call that this server does not offer."""
    return ServingError(grpc.StatusCode.UNIMPLEMENTED, message)


def clean_message(message: str) -> str:
    """Reduces the message of a failed session run to what the failing op said.

    Args:
        message: The message of a `tf.errors.OpError`, with the node names and the Python stacks
            that `Session.run` adds to it.

    Returns:
        The op's own message. Of several root errors, the first.
    """
    message = _PREFIX.sub("", message)
    message = _SEVERAL_ROOTS.sub("", message)
    message = _WHERE_DEFINED.sub("", message)
    message = _FUNCTIONS.sub("", message)
    message = _NODE_TRAILER.sub("", message)
    message = _STACK_TRAILER.sub("", message)
    return message.strip()


def from_tensorflow(error: Exception) -> ServingError:
    """Converts a `tf.errors.OpError` raised by the graph, keeping its code.

    Args:
        error: The error; it has `error_code` (canonical number) and `message`.

    Returns:
        The error for the client, without stack traces.
    """
    code = _CODE_BY_NUMBER.get(error.error_code, grpc.StatusCode.UNKNOWN)
    return ServingError(code, clean_message(error.message))
