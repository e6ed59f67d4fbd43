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


def rms_norm(weights, x, epsilon=1e-5, offset=0.0):
    root_mean_square = np.sqrt(np.sum(x * x, -1, keepdims=True) / x.shape[-1] + epsilon)
    return (offset + weights["scale"]) * x / root_mean_square


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


def rotate(vector, position, max_wavelength=10000.0, scaling=None, fraction=1.0):
    """Turns one head's vector: each pair is a complex number, multiplied by a unit one."""
    width = int(len(vector) * fraction)
    half = width // 2
    rotated = np.array(vector, "float64")
    for i in range(half):
        frequency, magnitude = stretch(i, width, max_wavelength, **scaling or {})
        angle = position * frequency
        unit = complex(math.cos(angle), math.sin(angle))
        turned = magnitude * complex(vector[i], vector[i + half]) * unit
        rotated[i], rotated[i + half] = turned.real, turned.imag
    return rotated


# Longer texts than the model was trained on: Chen et al. (2023), equation 4; Llama 3.1's published
# `apply_scaling`; Peng et al. (2023), sections 3.2 to 3.4.


def stretch(
    i, width, base, rope_type=None, factor=None, original_max_position_embeddings=None,
    low_freq_factor=None, high_freq_factor=None, attention_factor=None, beta_fast=32, beta_slow=1,
    mscale=None, mscale_all_dim=None, truncate=True,
):  # fmt: skip
    """The frequency of one pair of components, and the length of its unit vector."""
    frequency = base ** (-2 * i / width)
    length = original_max_position_embeddings
    wavelength = 2 * math.pi / frequency
    if rope_type == "linear":
        return frequency / factor, 1.0
    if rope_type == "llama3":
        if wavelength < length / high_freq_factor:
            return frequency, 1.0
        if wavelength > length / low_freq_factor:
            return frequency / factor, 1.0
        smooth = (length / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
        return (1 - smooth) * frequency / factor + smooth * frequency, 1.0
    if rope_type == "yarn":

        def correction(rotations):
            return width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low, high = correction(beta_fast), correction(beta_slow)
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        if low == high:
            high += 0.001
        ramp = min(max((i - low) / (high - low), 0), 1)
        if attention_factor is None:
            by_dimension = [0.1 * (m or 1) * math.log(factor) + 1 for m in (mscale, mscale_all_dim)]
            both = mscale and mscale_all_dim
            attention_factor = by_dimension[0] / by_dimension[1] if both else 0.1 * math.log(factor) + 1
        return (1 - ramp) * frequency + ramp * frequency / factor, attention_factor
    return frequency, 1.0


# --- Relative positions: Raffel et al. (2020), section 2.1, in the buckets of its published code ---


def relative_bucket(distance, num_buckets, max_distance, bidirectional):
    """The bucket of one distance, the key's place minus the query's."""
    if bidirectional:
        half = num_buckets // 2
        later = half if distance > 0 else 0
        return later + relative_bucket(-abs(distance), half, max_distance, False)
    distance, exact = max(-distance, 0), num_buckets // 2
    if distance < exact:
        return distance
    # The bucket grows with the logarithm; a tiny push keeps exact powers on their side.
    growth = math.log(distance / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    return min(exact + math.floor(growth + 1e-9), num_buckets - 1)


def relative_bias(table, query_positions, key_length, num_buckets, max_distance, bidirectional):
    """Bias `[batch, heads, queries, keys]` for places `[batch, queries]` of the queries."""
    rows = [
        [
            [
                table[relative_bucket(key - place, num_buckets, max_distance, bidirectional)]
                for key in range(key_length)
            ]
            for place in row
        ]
        for row in query_positions
    ]
    return np.array(rows).transpose(0, 3, 1, 2)


# --- Attention: Vaswani et al. (2017), section 3.2; Ainslie et al. (2023), section 2.2 ---


def attention(queries, keys, values, bias, scale, cap=None):
    """One row, one head.

    Args:
        queries: `[queries, width]`.
        keys: `[keys, width]`.
        values: `[keys, value_width]`.
        bias: `[queries, keys]`, minus infinity where a key must not be seen.
        scale: Multiplies the scores.
        cap: The scores stay below it: Riviere et al., "Gemma 2" (2024), section 2.
    """
    results = []
    for query, row_bias in zip(queries, bias, strict=True):
        scores = [scale * sum(query * key) for key in keys]
        if cap is not None:
            scores = [cap * math.tanh(score / cap) for score in scores]
        scores = [score + b for score, b in zip(scores, row_bias, strict=True)]
        results.append(sum(w * v for w, v in zip(softmax(scores), values, strict=True)))
    return np.stack(results)


def causal(length, window=None):
    """Bias `[length, length]` that hides the later keys, and all but the last `window` of the others."""

    def seen(query, key):
        return key <= query and (window is None or query - key < window)

    return np.array(
        [[0.0 if seen(query, key) else -math.inf for key in range(length)] for query in range(length)]
    )


def multi_head_attention(
    weights, x, memory=None, *, num_heads, num_kv_heads=None, is_causal=False, wavelength=None,
    positions=None, bias=None, rotary_scaling=None, rotary_fraction=1.0, sliding_window=None,
    query_scale=None, score_cap=None, qk_norm=False, epsilon=1e-6, offset=0.0,
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
        bias = bias + causal(length, sliding_window)
    if positions is None:
        positions = [range(length)] * batch

    def head(array, row, number):
        part = array[row, :, number * width : (number + 1) * width]
        if array is values:
            return part
        if qk_norm:
            name = "query_norm" if array is queries else "key_norm"
            part = rms_norm(below(weights, name), part, epsilon, offset)
        if wavelength is None:
            return part
        places = zip(part, positions[row], strict=True)
        return np.stack([rotate(v, p, wavelength, rotary_scaling, rotary_fraction) for v, p in places])

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
                    1 / math.sqrt(width) if query_scale is None else query_scale,
                    score_cap,
                )
            )
        rows.append(np.concatenate(heads, -1))
    return dense(below(weights, "output"), np.stack(rows))


# --- Blocks: Vaswani et al. (2017), section 3.1; Xiong et al. (2020), table 1, for the norm in front ---


def block(
    weights, x, memory=None, *, norm="layer", norm_first=True, norm_last=False, norm_unit_offset=False,
    epsilon=1e-5, activation="gelu_tanh", gated=False, memory_bias=None, num_heads, num_kv_heads=None,
    query_scale=None, score_cap=None, qk_norm=False, **attention_arguments,
):  # fmt: skip
    """An encoder or decoder block; with a memory it has a second attention in the middle."""
    offset = 1.0 if norm_unit_offset else 0.0
    heads = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "query_scale": query_scale,
        "score_cap": score_cap,
        "qk_norm": qk_norm,
        "epsilon": epsilon,
        "offset": offset,
    }

    def normalise(name, y):
        own = below(weights, name)
        return rms_norm(own, y, epsilon, offset) if norm == "rms" else layer_norm(own, y, epsilon)

    def attend(y):
        return multi_head_attention(below(weights, "attention"), y, **heads, **attention_arguments)

    def attend_to_memory(y):
        own = below(weights, "memory_attention")
        return multi_head_attention(own, y, memory, bias=memory_bias, **heads)

    def transform(y):
        network = gated_feed_forward if gated else feed_forward
        return network(below(weights, "feed_forward"), y, activation)

    steps = [("attention", attend)]
    if memory is not None:
        steps.append(("memory", attend_to_memory))
    steps.append(("feed_forward", transform))
    for name, step in steps:
        if norm_last:
            x = x + normalise(f"{name}_last_norm", step(normalise(f"{name}_norm", x)))
        elif norm_first:
            x = x + step(normalise(f"{name}_norm", x))
        else:
            x = normalise(f"{name}_norm", x + step(x))
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


# --- Llama and its kin: Touvron et al. (2023), section 2.2; Riviere et al., "Gemma 2" (2024), section 2 ---


def llama(
    weights, token_ids, *, layers, epsilon, embedding_scale=1.0, logit_cap=None, offset=False, **arguments
):
    """Logits `[batch, length, vocabulary_size]`; hidden states where there is no vocabulary to score.

    Args:
        layers: For each block the arguments in which it differs from the others.
        arguments: Of all blocks, see `block`.
    """
    table = weights["token_embedding/embeddings"]
    x = np.stack([[embedding_scale * table[token] for token in row] for row in token_ids])
    for number, own in enumerate(layers):
        x = block(
            below(weights, f"block_{number}"),
            x,
            norm="rms",
            norm_unit_offset=offset,
            gated=True,
            is_causal=True,
            epsilon=epsilon,
            **arguments,
            **own,
        )
    x = rms_norm(below(weights, "final_norm"), x, epsilon, 1.0 if offset else 0.0)
    logits = x @ weights.get("head/embeddings", table).T
    return logits if logit_cap is None else logit_cap * np.tanh(logits / logit_cap)


# --- BERT: Devlin et al. (2019), section 3; RoBERTa's positions as fairseq counts them ---


def bert_positions(token_ids, padding_id=None):
    """The row of the position table of each token."""
    rows = []
    for row in token_ids:
        positions = []
        for token in row:
            counted = sum(position != padding_id for position in positions)
            if padding_id is None:
                positions.append(len(positions))
            else:
                positions.append(padding_id if token == padding_id else padding_id + 1 + counted)
        rows.append(positions)
    return rows


def bert(
    weights, token_ids, token_type_ids=None, *, num_layers, num_heads, activation="gelu", epsilon=1e-12,
    padding_id=None, bias=None,
):  # fmt: skip
    """Hidden states `[batch, length, dim]`."""
    names = ("token", "position", "token_type")
    tables = {name: weights.get(f"{name}_embedding/embeddings") for name in names}
    rows = []
    for row, positions in enumerate(bert_positions(token_ids, padding_id)):
        vectors = []
        for place, position in enumerate(positions):
            vector = tables["token"][token_ids[row][place]] + tables["position"][position]
            if tables["token_type"] is not None:
                kind = 0 if token_type_ids is None else token_type_ids[row][place]
                vector = vector + tables["token_type"][kind]
            vectors.append(vector)
        rows.append(np.stack(vectors))
    x = layer_norm(below(weights, "embedding_norm"), np.stack(rows), epsilon)
    for number in range(num_layers):
        x = block(
            below(weights, f"block_{number}"),
            x,
            norm_first=False,
            num_heads=num_heads,
            activation=activation,
            epsilon=epsilon,
            bias=bias,
        )
    return x


def masked_token_scores(weights, x, *, activation="gelu", epsilon=1e-12):
    """Logits `[batch, length, vocabulary_size]` of hidden states; tied where the head has no matrix."""
    x = ACTIVATIONS[activation](dense(below(weights, "head_dense"), x))
    x = layer_norm(below(weights, "head_norm"), x, epsilon)
    matrix = weights.get("head/kernel", weights["token_embedding/embeddings"].T)
    return x @ matrix + weights["head_bias"]


# --- T5: Raffel et al. (2020), section 2.1 ---


def t5_stack(
    weights, token_ids, memory=None, *, name, num_layers, buckets, norm_epsilon, bias=None, **kwargs
):
    """Hidden states of the encoder or, with a memory, of the decoder."""
    x = weights["token_embedding/embeddings"][np.asarray(token_ids)]
    length = x.shape[1]
    position_bias = relative_bias(
        weights[f"{name}_position_bias/embeddings"], [range(length)], length, *buckets, memory is None
    )
    for number in range(num_layers):
        x = block(
            below(weights, f"{name}_block_{number}"),
            x,
            memory,
            norm="rms",
            epsilon=norm_epsilon,
            query_scale=1.0,
            bias=position_bias if bias is None else position_bias + bias,
            is_causal=memory is not None,
            **kwargs,
        )
    return rms_norm(below(weights, f"{name}_norm"), x, norm_epsilon)


def t5(weights, source_ids, token_ids, *, num_decoder_layers, source_mask=None, num_layers, **kwargs):
    """Memory `[batch, source_length, dim]` and logits `[batch, length, vocabulary_size]`."""
    hidden = None if source_mask is None else np.where(source_mask, 0.0, -np.inf)[:, None, None]
    memory = t5_stack(weights, source_ids, name="encoder", num_layers=num_layers, bias=hidden, **kwargs)
    x = t5_stack(
        weights,
        token_ids,
        memory,
        name="decoder",
        num_layers=num_decoder_layers,
        memory_bias=hidden,
        **kwargs,
    )
    if "head/kernel" in weights:
        return memory, x @ weights["head/kernel"]
    return memory, x @ weights["token_embedding/embeddings"].T / math.sqrt(x.shape[-1])
