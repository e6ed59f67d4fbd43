"""What is left of TensorFlow's error messages."""

import grpc
import pytest
import tensorflow as tf
from kerasllm_serving.errors import ServingError, clean_message, from_tensorflow


@pytest.mark.parametrize(
    ("message", "cleaned"),
    [
        ("plain", "plain"),
        (
            "Graph execution error:\n\nassertion failed: [k must be positive]\n\t [[{{node a/b}}]]",
            "assertion failed: [k must be positive]",
        ),
        (
            "Graph execution error:\n\nDetected at node 'All' defined at (most recent call last):\n"
            "    File \"/home/me/train.py\", line 3, in <module>\nNode: 'All'\n"
            "Invalid reduction dimension\n\t [[{{node All}}]]\n\n"
            "Original stack trace for 'All':\n  File \"/home/me/train.py\", line 3\n",
            "Invalid reduction dimension",
        ),
        (
            "Graph execution error:\n\n2 root error(s) found.\n"
            "  (0) INVALID_ARGUMENT: first\n\t [[{{node a}}]]\n\t [[b/_2]]\n"
            "  (1) INVALID_ARGUMENT: second\n\t [[{{node b}}]]\n"
            "0 successful operations.\n0 derived errors ignored.",
            "first",
        ),
        ("two\nlines\n\t [[{{function_node f}}{{node a}}]]", "two\nlines"),
        # Of graphs that are not optimized, and where the message itself has what looks like a node.
        (
            "{{function_node __inference_signature_wrapper_f_23}} {{function_node __inference_f_17}} "
            "no number: x\n\t [[{{function_node __inference_f_17}}{{node a/b}}]]\n\t [[PartitionedCall]]",
            "no number: x",
        ),
        ("{{node a/b}} no number: x\n\t [[{{node a/b}}]]", "no number: x"),
        (
            "2 root error(s) found.\n  (0) INVALID_ARGUMENT: {{function_node f}} first\n\t [[{{node a}}]]\n"
            "  (1) CANCELLED: {{function_node f}} second",
            "first",
        ),
        (
            "{{function_node f_23}} no number: {{node x}} [[y]]\n\t [[f/a]]\n\t [[f]]",
            "no number: {{node x}} [[y]]",
        ),
    ],
)
def test_clean_message(message, cleaned):
    assert clean_message(message) == cleaned


def test_codes_are_kept():
    error = from_tensorflow(tf.errors.OutOfRangeError(None, None, "Graph execution error:\n\nend"))
    assert (error.code, error.message) == (grpc.StatusCode.OUT_OF_RANGE, "end")


@pytest.mark.parametrize(
    ("code", "http_status"),
    [
        ("OK", 200),
        ("CANCELLED", 499),
        ("INVALID_ARGUMENT", 400),
        ("FAILED_PRECONDITION", 400),
        ("OUT_OF_RANGE", 400),
        ("UNAUTHENTICATED", 401),
        ("PERMISSION_DENIED", 403),
        ("NOT_FOUND", 404),
        ("ALREADY_EXISTS", 409),
        ("ABORTED", 409),
        ("RESOURCE_EXHAUSTED", 429),
        ("UNKNOWN", 500),
        ("INTERNAL", 500),
        ("DATA_LOSS", 500),
        ("UNIMPLEMENTED", 501),
        ("UNAVAILABLE", 503),
        ("DEADLINE_EXCEEDED", 504),
    ],
)
def test_http_status(code, http_status):
    assert ServingError(grpc.StatusCode[code], "").http_status == http_status


def test_every_code_has_an_http_status():
    for code in grpc.StatusCode:
        assert ServingError(code, "").http_status
