"""Rules inside of a graph: what breaks one fails with INVALID_ARGUMENT and a line that says which."""

import tensorflow as tf

from kerasllm.tokenizers.utf8 import VALID_UTF8


def rule(condition: tf.Tensor, message: str, *values: tf.Tensor) -> tf.Operation:
    """Makes an op that fails with INVALID_ARGUMENT unless all is true.

    Args:
        condition: Booleans.
        message: What is said then, with `{}` for each of the values.
        *values: What was received.

    Returns:
        The op.
    """
    text = tf.strings.format(message, values) if values else message
    return tf.debugging.Assert(tf.reduce_all(condition), [text], summarize=-1)


def after(rules: list[tf.Operation], tensors):
    """Returns tensors once the rules hold; without this, ops that need them would race the check."""
    with tf.control_dependencies(rules):
        return tf.nest.map_structure(tf.identity, tensors, expand_composites=True)


def check_texts(name: str, texts: tf.Tensor, longest: int) -> tf.Tensor:
    """Checks texts from outside before anything is done with them.

    Args:
        name: What they are called in a message.
        texts: Strings of any shape.
        longest: Most bytes of each.

    Returns:
        The texts, once the rules hold.
    """
    most = tf.reduce_max(tf.strings.length(texts))
    rules = [
        rule(
            tf.strings.length(texts) <= longest,
            f"`{name}` must be of at most {longest} bytes. Received: a text of {{}} bytes.",
            most,
        ),
        rule(
            tf.strings.regex_full_match(texts, VALID_UTF8),
            f"`{name}` must be UTF-8. Received: bytes that are not.",
        ),
    ]
    return after(rules, texts)


def check_batch(inputs: dict[str, tf.Tensor], largest: int, ranks: dict[str, int]) -> dict[str, tf.Tensor]:
    """Checks that inputs belong together.

    Args:
        inputs: Tensors by name, the first of which says how many rows there are.
        largest: Most rows.
        ranks: The number of axes of those that have not one.

    Returns:
        The inputs, once the rules hold.
    """
    # A server passes on what it gets: the shapes that a graph declares are not checked before.
    inputs = {name: tf.ensure_shape(value, [None] * ranks.get(name, 1)) for name, value in inputs.items()}
    first, *others = inputs
    count = tf.shape(inputs[first])[0]
    rules = [
        rule(count > 0, f"There must be at least one `{first}`. Received: none."),
        rule(count <= largest, f"A request may have at most {largest} rows. Received: {{}} rows.", count),
    ]
    for name in others:
        own = tf.shape(inputs[name])[0]
        message = f"`{name}` must have one value per `{first}`. Received: {{}} values, {{}} of `{first}`."
        rules.append(rule(own == count, message, own, count))
    return after(rules, inputs)
