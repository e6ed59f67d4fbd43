"""Reading the entries of a JSON file from outside: each has the type it must have, or is refused."""

import json
import reprlib
from typing import Any

REQUIRED = object()

# In characters. Those of models have up to some hundred; work on a token's parts grows with its square.
LONGEST_TOKEN = 1024


def field(entry: dict, name: str, kind: type, default: Any = REQUIRED) -> Any:
    """Returns `entry[name]` if it is of the type `kind`.

    Args:
        entry: A JSON object.
        name: The key.
        kind: The type to be: bool, int (not a bool), str, list or dict.
        default: What to return where the entry is not there or null.

    Raises:
        ValueError: If the entry is of another type, or not there and without a default.
    """
    value = entry.get(name)
    if value is None and default is not REQUIRED:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"`{name}` must be of the type {kind.__name__}. Received: {reprlib.repr(entry)}")
    return value


def spelling(settings: dict, name: str) -> str | None:
    """Returns the spelling of a token that the settings name, or None if they name none.

    Args:
        settings: Contents of a tokenizer_config.json, where a token may be an object with its options.
        name: The key, such as `bos_token`.

    Raises:
        ValueError: If it is neither a text nor such an object.
    """
    token = settings.get(name)
    return field(token, "content", str) if isinstance(token, dict) else field(settings, name, str, None)


def steps(step: dict | None, children: str) -> list[dict]:
    """The steps of a pipeline, those of a step of type Sequence in its place.

    Args:
        step: A normalizer, pre-tokenizer, post-processor or decoder of a tokenizer.json, or None.
        children: What a Sequence calls its steps.

    Raises:
        ValueError: If anything among them is no object with a type.
    """
    if step is None:
        return []
    if not isinstance(step, dict):
        raise ValueError(f"A step must be an object with a `type`. Received: {reprlib.repr(step)}")
    if field(step, "type", str) != "Sequence":
        return [step]
    return [inner for child in field(step, children, list) for inner in steps(child, children)]


def parse_object(text: str, what: str) -> dict:
    """Parses the text of a JSON object; ValueError with the name `what` if it is none."""
    try:
        content = json.loads(text)
        if "\\u" in text:  # Half a surrogate pair is allowed in JSON, but no text.
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{what} must be valid JSON. Received: too many levels") from None
    except ValueError as error:
        raise ValueError(f"{what} must be valid JSON. Received: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} must be an object. Received: {reprlib.repr(content)}")
    return content
