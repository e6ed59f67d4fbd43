"""The papers' formulas in NumPy float64: one row, one head, one pair at a time, and no cache.

Slow and plain on purpose. Nothing here looks at `kerasllm`; weights come in as dictionaries from the path
of a variable to its array, as `reference.weights.arrays` makes them.
"""

import math

import numpy as np


def below(weights, prefix):
    """The entries of a sub-layer, by their paths below it."""
    return {
        path.removeprefix(prefix + "/"): array
        for path, array in weights.items()
        if path.startswith(prefix + "/")
    }


def dense(weights, x):
    return x @ weights["kernel"] + weights.get("bias", 0.0)


def softmax(scores):
    """Softmax of a vector, entries of minus infinity included."""
    powers = [math.exp(score - max(scores)) for score in scores]
    return np.array(powers) / sum(powers)


# --- Norms: Ba et al. (2016), equation 4; Zhang and Sennrich (2019), equation 4 ---


def layer_norm(weights, x, epsilon=1e-5):
    mean = x.mean(-1, keepdims=True)
    variance = (x**2).mean(-1, keepdims=True) - mean**2
    return (x - mean) / np.sqrt(variance + epsilon) * weights["scale"] + weights.get("bias", 0.0)


def rms_norm(weights, x, epsilon=1e-5):
    root_mean_square = np.sqrt(np.sum(x * x, -1, keepdims=True) / x.shape[-1] + epsilon)
    return weights["scale"] * x / root_mean_square


# --- Feed-forward: Hendrycks and Gimpel (2016), section 2; Shazeer (2020), equation 5 ---

ACTIVATIONS = {
    "gelu": np.vectorize(lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)), otypes=[float]),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def feed_forward(weights, x, activation):
    hidden = ACTIVATIONS[activation](dense(below(weights, "up"), x))
    return dense(below(weights, "down"), hidden)


def gated_feed_forward(weights, x, activation):
    gate = ACTIVATIONS[activation](dense(below(weights, "gate"), x))
    return dense(below(weights, "down"), gate * dense(below(weights, "up"), x))


# --- Positions: Vaswani et al. (2017), section 3.5; Su et al. (2021), equation 13 ---


def sinusoids(position, dim, max_wavelength=10000.0):
    """The encoding of one position."""
    encoded = np.zeros(dim)
    for i in range(dim // 2):
        encoded[2 * i] = math.sin(position / max_wavelength ** (2 * i / dim))
        encoded[2 * i + 1] = math.cos(position / max_wavelength ** (2 * i / dim))
    return encoded


def rotate(vector, position, max_wavelength=10000.0):
    """Turns one head's vector: each pair is a complex number, multiplied by a unit one."""
    half = len(vector) // 2
    rotated = np.zeros(len(vector))
    for i in range(half):
        angle = position * max_wavelength ** (-2 * i / len(vector))
        turned = complex(vector[i], vector[i + half]) * complex(math.cos(angle), math.sin(angle))
        rotated[i], rotated[i + half] = turned.real, turned.imag
    return rotated


# --- Attention: Vaswani et al. (2017), section 3.2; Ainslie et al. (2023), section 2.2 ---


def attention(queries, keys, values, bias, scale):
    """One row, one head.

    Args:
        queries: `[queries, width]`.
        keys: `[keys, width]`.
        values: `[keys, value_width]`.
        bias: `[queries, keys]`, minus infinity where a key must not be seen.
        scale: Multiplies the scores.
    """
    results = []
    for query, row_bias in zip(queries, bias, strict=True):
        scores = [scale * sum(query * key) + b for key, b in zip(keys, row_bias, strict=True)]
        results.append(sum(w * v for w, v in zip(softmax(scores), values, strict=True)))
    return np.stack(results)


def causal(length):
    """Bias `[length, length]` that hides the later keys."""
    return np.array(
        [[0.0 if key <= query else -math.inf for key in range(length)] for query in range(length)]
    )


def multi_head_attention(
    weights, x, memory=None, *, num_heads, num_kv_heads=None, is_causal=False, wavelength=None,
    positions=None, bias=None,
):  # fmt: skip
    """All rows, all heads.

    Args:
        weights: Of `query`, `key`, `value` and `output`.
        x: `[batch, length, width]`.
        memory: `[batch, memory_length, memory_width]` or None.
        bias: Broadcastable to `[batch, num_heads, queries, keys]`, added to the scores.
        positions: `[batch, length]` for the rotation; None counts from 0.
    """
    memory = x if memory is None else memory
    queries, keys, values = (
        dense(below(weights, name), source)
        for name, source in (("query", x), ("key", memory), ("value", memory))
    )
    num_kv_heads = num_kv_heads or num_heads
    width = queries.shape[-1] // num_heads
    batch, length, key_length = len(x), x.shape[1], memory.shape[1]
    bias = np.broadcast_to(0.0 if bias is None else bias, (batch, num_heads, length, key_length))
    if is_causal:
        bias = bias + causal(length)
    if positions is None:
        positions = [range(length)] * batch

    def head(array, row, number):
        part = array[row, :, number * width : (number + 1) * width]
        if wavelength is None or array is values:
            return part
        return np.stack([rotate(v, p, wavelength) for v, p in zip(part, positions[row], strict=True)])

    rows = []
    for row in range(batch):
        heads = []
        for number in range(num_heads):
            shared = number // (num_heads // num_kv_heads)  # consecutive heads share keys and values
            heads.append(
                attention(
                    head(queries, row, number),
                    head(keys, row, shared),
                    head(values, row, shared),
                    bias[row, number],
                    1 / math.sqrt(width),
                )
            )
        rows.append(np.concatenate(heads, -1))
    return dense(below(weights, "output"), np.stack(rows))


# --- Blocks: Vaswani et al. (2017), section 3.1; Xiong et al. (2020), table 1, for the norm in front ---


def block(
    weights, x, memory=None, *, norm="layer", norm_first=True, epsilon=1e-5, activation="gelu_tanh",
    gated=False, memory_bias=None, num_heads, num_kv_heads=None, **attention_arguments,
):  # fmt: skip
    """An encoder or decoder block; with a memory it has a second attention in the middle."""
    normalise = {"layer": layer_norm, "rms": rms_norm}[norm]
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}

    def attend(y):
        return multi_head_attention(below(weights, "attention"), y, **heads, **attention_arguments)

    def attend_to_memory(y):
        own = below(weights, "memory_attention")
        return multi_head_attention(own, y, memory, bias=memory_bias, **heads)

    def transform(y):
        network = gated_feed_forward if gated else feed_forward
        return network(below(weights, "feed_forward"), y, activation)

    steps = [("attention_norm", attend)]
    if memory is not None:
        steps.append(("memory_norm", attend_to_memory))
    steps.append(("feed_forward_norm", transform))
    for name, step in steps:
        own = below(weights, name)
        if norm_first:
            x = x + step(normalise(own, x, epsilon))
        else:
            x = normalise(own, x + step(x), epsilon)
    return x


# --- GPT-2: Radford et al. (2019), section 2.3 ---


def gpt2(weights, token_ids, *, num_layers, num_heads, activation="gelu_tanh", epsilon=1e-5, bias=None):
    """Logits `[batch, length, vocabulary_size]`; the head is tied where there is none of its own."""
    table = weights["token_embedding/embeddings"]
    x = np.stack(
        [
            [
                table[token] + weights["position_embedding/embeddings"][place]
                for place, token in enumerate(row)
            ]
            for row in token_ids
        ]
    )
    for number in range(num_layers):
        x = block(
            below(weights, f"block_{number}"),
            x,
            num_heads=num_heads,
            activation=activation,
            epsilon=epsilon,
            is_causal=True,
            bias=bias,
        )
    x = layer_norm(below(weights, "final_norm"), x, epsilon)
    return x @ weights.get("head/embeddings", table).T
