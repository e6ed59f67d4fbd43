"""Attention, from its simplest form up to the multi-head layer that the models use.

The first three layers are a ladder for learners; each adds one idea to the one before and all of them,
`MultiHeadAttention` included, end in the same `dot_product_attention`.
"""

import functools
import math
import operator
from typing import Any

import keras
from keras import ops

from kerasllm.layers.dense import Dense
from kerasllm.layers.dropout import Dropout
from kerasllm.layers.gradient import forget_inside
from kerasllm.layers.norm import RMSNorm
from kerasllm.layers.position import RotaryEmbedding
from kerasllm.layers.precision import widen
from kerasllm.layers.shapes import flatten
from kerasllm.layers.xla import is_traced_for_xla

# Added to a score that must not count. Large enough that its exponential is exactly 0 in float32, and
# small enough that two of them may meet without an overflow.
MASKED = -1e9
# How many columns of a cache are looked at at once, where XLA decodes in one of known length.
_BLOCK = 256


def dot_product_attention(query, keys, values, bias=None, dropout=None, score_cap=None):
    """Weights the values by the softmax of the query-key products.

    Vaswani et al.: "Attention Is All You Need" (2017), section 3.2.1. The caller scales the query.

    Args:
        query: Floats `[..., queries, head_dim]`, already multiplied by `1 / sqrt(head_dim)`.
        keys: Floats `[..., keys, head_dim]`.
        values: Floats `[..., head_dim, keys]`, transposed, as the cache holds them.
        bias: Float32, broadcastable to `[..., queries, keys]`, added to the scores; `MASKED` hides a
            key. None hides nothing.
        dropout: Function applied to the attention weights, or None.
        score_cap: Bound that the scores approach, as `score_cap * tanh(score / score_cap)`, before the
            bias is added; None: no bound.

    Returns:
        Floats `[..., queries, head_dim]` and the weights `[..., queries, keys]` before dropout.
    """
    scores = _score(query, ops.swapaxes(keys, -1, -2), score_cap)
    if bias is not None:
        scores = scores + ops.cast(bias, scores.dtype)
    # The softmax over a single key is 1, and Keras warns of it.
    weights = ops.ones_like(scores) if scores.shape[-1] == 1 else ops.softmax(scores, axis=-1)
    weights = ops.cast(weights, query.dtype)
    dropped = weights if dropout is None else dropout(weights)
    return ops.matmul(dropped, ops.swapaxes(values, -1, -2)), weights


def _score(query, keys, score_cap):
    """The products of queries and transposed keys `[..., head_dim, keys]`, bounded if they shall be."""
    scores = widen(ops.matmul(query, keys))
    if score_cap is not None:
        scores = score_cap * ops.tanh(scores / score_cap)
    return scores


def _attend_in_blocks(query, cache, index, sliding_window, score_cap):
    """Lets one query of each row look at a cache, of which no more is read than the longest row has filled.

    XLA knows fixed shapes only, and a product with the whole cache reads all of it for each token. The
    softmax is put together from those of the blocks; Milakov and Gimelshein: "Online normalizer calculation
    for softmax" (2018).

    Args:
        query: Floats `[batch, kv_heads, group, head_dim]`, scaled.
        cache: Transposed keys `[rows, kv_heads, head_dim, length]` and values
            `[rows, kv_heads, length, head_dim]`, of which the first `batch` rows count.
        index: Int32 `[batch]`, each query's place.
        sliding_window: As in `causal_bias`.
        score_cap: As in `dot_product_attention`.

    Returns:
        Floats as `query`.
    """
    batch, (_, heads, width, length) = ops.shape(index)[0], cache[0].shape

    def add_block(number, carried):
        highest, total, mixed = carried
        first = number * _BLOCK
        begin = ops.minimum(first, length - _BLOCK)  # the last block begins in the one before
        keys = ops.slice(cache[0], ops.stack([0, 0, 0, begin]), (batch, heads, width, _BLOCK))
        values = ops.slice(cache[1], ops.stack([0, 0, begin, 0]), (batch, heads, _BLOCK, width))
        scores = _score(query, keys, score_cap)
        bias = causal_bias(index - begin, _BLOCK, sliding_window)
        bias = ops.where(ops.arange(_BLOCK, dtype="int32") < first - begin, MASKED, bias)
        scores = scores + ops.cast(bias, scores.dtype)[:, None, None]
        new_highest = ops.maximum(highest, ops.max(scores, axis=-1, keepdims=True))
        weights, faded = ops.exp(scores - new_highest), ops.exp(highest - new_highest)
        products = ops.matmul(weights, widen(values))  # sums of them are too large for float16
        total = total * faded + ops.sum(weights, axis=-1, keepdims=True)
        return new_highest, total, mixed * faded + products

    zeros = ops.zeros_like(widen(query))
    start = (zeros[..., :1] + 2 * MASKED, zeros[..., :1], zeros)
    oldest = 0 if sliding_window is None else ops.maximum(ops.min(index) - sliding_window + 1, 0)
    begin, end = oldest // _BLOCK, ops.max(index) // _BLOCK + 1
    _, total, mixed = ops.fori_loop(begin, end, add_block, start)
    return ops.cast(mixed / total, query.dtype)


def causal_bias(query_index, key_length, sliding_window=None):
    """Bias that hides the keys after each query, and those too far before it.

    Args:
        query_index: Integers `[..., queries]`, each query's place in the sequence.
        key_length: Number of keys.
        sliding_window: Number of keys that a query sees, itself included; None: all before it.

    Returns:
        Float32 `[..., queries, key_length]`: 0 where a key may be seen, `MASKED` elsewhere.
    """
    query_index = ops.expand_dims(ops.cast(query_index, "int32"), -1)
    keys = ops.arange(key_length, dtype="int32")
    visible = keys <= query_index
    if sliding_window is not None:
        visible = ops.logical_and(visible, keys > query_index - sliding_window)
    return ops.where(visible, 0.0, MASKED)


def mask_bias(mask):
    """Turns an attention mask into a bias `[batch, 1 or heads, 1 or queries, keys]` in float32.

    Args:
        mask: `[batch, keys]`, `[batch, queries, keys]` or `[batch, 1 or heads, queries, keys]`.
            Integers or booleans: zero hides a key. Floats: added to the scores, minus infinity as
            `MASKED`, so that a query without any key gives no NaN.

    Returns:
        The bias.

    Raises:
        ValueError: If the rank is none of these.
    """
    rank = len(mask.shape)
    if rank == 2:
        mask = mask[:, None, None, :]
    elif rank == 3:
        mask = mask[:, None]
    elif rank != 4:
        raise ValueError(
            "`attention_mask` must be [batch, keys], [batch, queries, keys] or "
            f"[batch, heads, queries, keys]. Received: shape={tuple(mask.shape)}"
        )
    if keras.backend.is_float_dtype(keras.backend.standardize_dtype(mask.dtype)):
        return ops.maximum(widen(mask), MASKED)
    return ops.where(ops.not_equal(ops.cast(mask, "int32"), 0), 0.0, MASKED)


def swap_cache_layout(cache):
    """Turns a cache as `make_cache` lays it out to one for functions that are traced for XLA, and back.

    There the keys are transposed and the values are not, for so XLA multiplies with them as they lie.

    Args:
        cache: Tensors `[..., a, b]` in any structure.

    Returns:
        The structure with tensors `[..., b, a]`.
    """
    return keras.tree.map_structure(lambda part: ops.swapaxes(part, -1, -2), cache)


def cache_length(cache):
    """Returns the number of tokens that a layer's key-value cache can hold."""
    return ops.shape(cache[0])[3 if is_traced_for_xla() else 2]


def _write_cache(cache, keys, values, index):
    """Writes keys and transposed values into the cache from column `index` on.

    Returns:
        The cache; its keys and its transposed values, of as many first rows as are written.
    """
    new = (ops.cast(keys, cache[0].dtype), ops.cast(values, cache[1].dtype))
    axes, in_xla = (2, 3), is_traced_for_xla()
    if in_xla:
        new, axes = swap_cache_layout(new), (3, 2)
    if in_xla and not isinstance(index, int) and len(index.shape) == 1:
        # XLA writes single tokens in place. Elsewhere that copies the cache, and `_write` is quicker.
        cache = _write_rows(cache, new, index)
        return cache, *swap_cache_layout(tuple(part[: ops.shape(index)[0]] for part in cache))
    cache = tuple(_write(*pair, index, axis) for *pair, axis in zip(cache, new, axes, strict=True))
    return cache, *(swap_cache_layout(cache) if in_xla else cache)


def _first_columns(keys, values, mask):
    """Leaves out the columns of the cache that lie behind those of the mask, where shapes are static."""
    width = None if mask is None else mask.shape[-1]
    if isinstance(width, int) and isinstance(keys.shape[2], int) and width < keys.shape[2]:
        return keys[:, :, :width], values[:, :, :, :width]
    return keys, values


def _write(cache, new, index, axis):
    """Writes `new` into `cache` from column `index` of `axis` on."""
    if isinstance(index, int) or (len(index.shape) == 0 and cache.shape[axis] is None):
        # Known when the graph is made, or nothing is: plain slices, which run everywhere.
        end, room = index + ops.shape(new)[axis], cache.shape[axis]
        is_known = isinstance(index, int)
        if is_known and (index < 0 or (isinstance(end, int) and room is not None and end > room)):
            raise ValueError(
                "Tokens must be written inside the cache. "
                f"Received: cache_index={index}, {new.shape[axis]} tokens, cache length={room}"
            )
        everything = (slice(None),) * axis
        before = [] if is_known and not index else [cache[(*everything, slice(None, index))]]
        return ops.concatenate([*before, new, cache[(*everything, slice(end, None))]], axis=axis)
    if len(index.shape) == 0:
        start = [0, 0, 0, 0]
        start[axis] = index
        updated = ops.slice_update(cache, ops.stack([ops.cast(s, "int32") for s in start]), new)
        # The update loses the static shape, which a converter to fixed-shape runtimes needs.
        return ops.reshape(updated, ops.shape(cache))
    column_shape = [1, 1, 1, 1]
    column_shape[axis] = -1
    columns = ops.reshape(ops.arange(ops.shape(cache)[axis], dtype="int32"), column_shape)
    index = ops.reshape(index, (-1, 1, 1, 1))
    if new.shape[axis] == 1:
        return ops.where(columns == index, new, cache)
    # A product with zeros and ones brings each token to its column: exact, and cheaper than a gather.
    count = ops.shape(new)[axis]
    if axis == 2:
        own = columns - index == ops.arange(count, dtype="int32")  # [batch, 1, columns, tokens]
        moved = ops.matmul(ops.cast(own, cache.dtype), new)
    else:
        own = columns - index == ops.arange(count, dtype="int32")[:, None]  # [batch, 1, tokens, columns]
        moved = ops.matmul(new, ops.cast(own, cache.dtype))
    written = ops.logical_and(columns >= index, columns < index + count)
    return ops.where(written, moved, cache)


def _write_rows(cache, new, index):
    """Writes transposed keys and values row by row, from each row's own column on."""
    shapes = [ops.shape(part) for part in cache]

    def write(row, parts):
        column = ops.take(index, row)
        updated = []
        for part, tokens, shape, start in zip(
            parts, new, shapes, ([row, 0, 0, column], [row, 0, column, 0]), strict=True
        ):
            own = ops.slice(tokens, ops.stack([row, 0, 0, 0]), (1, *tokens.shape[1:]))
            updated.append(ops.reshape(ops.slice_update(part, ops.stack(start), own), shape))
        return tuple(updated)

    # All rows, but XLA must not know: it would unroll a single row, and then copy the cache.
    rows = ops.sum(ops.cast(index >= 0, "int32"))
    return ops.fori_loop(0, rows, write, tuple(cache))


@keras.saving.register_keras_serializable(package="kerasllm")
class SimplifiedSelfAttention(keras.layers.Layer):
    """First rung: every token looks at every token by the plain products of their vectors.

    There are no weights: queries, keys and values are the inputs themselves.
    """

    def call(self, x):
        """Mixes the vectors of a sequence.

        Args:
            x: Floats `[..., length, dim]`.

        Returns:
            Floats `[..., length, dim]`.
        """
        return dot_product_attention(x, x, ops.swapaxes(x, -1, -2))[0]

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable(package="kerasllm")
class SelfAttention(keras.layers.Layer):
    """Second rung: trained matrices make queries, keys and values, and the products are scaled.

    Args:
        head_dim: Width of queries, keys, values and the result.
        use_bias: Whether the three matrices have biases.
    """

    def __init__(self, head_dim: int, use_bias: bool = False, **kwargs):
        super().__init__(**kwargs)
        if head_dim < 1:
            raise ValueError(f"`head_dim` must be at least 1. Received: head_dim={head_dim}")
        self.head_dim = head_dim
        self.use_bias = use_bias
        self.query, self.key, self.value = (
            keras.layers.Dense(head_dim, use_bias=use_bias, name=name, dtype=self.dtype_policy)
            for name in ("query", "key", "value")
        )

    def build(self, input_shape):
        for layer in (self.query, self.key, self.value):
            layer.build(input_shape)

    def _bias(self, x):
        return None

    def call(self, x):
        """Mixes the vectors of a sequence.

        Args:
            x: Floats `[..., length, dim]`.

        Returns:
            Floats `[..., length, head_dim]`.
        """
        query = self.query(x) * (1.0 / math.sqrt(self.head_dim))
        values = ops.swapaxes(self.value(x), -1, -2)
        return dot_product_attention(query, self.key(x), values, self._bias(x))[0]

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.head_dim)


@keras.saving.register_keras_serializable(package="kerasllm")
class CausalSelfAttention(SelfAttention):
    """Third rung: self-attention in which no token sees a later one.

    Args:
        head_dim: Width of queries, keys, values and the result.
        use_bias: Whether the three matrices have biases.
    """

    def _bias(self, x):
        length = ops.shape(x)[-2]
        return causal_bias(ops.arange(length), length)


@keras.saving.register_keras_serializable(package="kerasllm")
class MultiHeadAttention(keras.layers.Layer):
    """Several attentions side by side: self or cross, causal or not, with or without a cache.

    With `num_kv_heads < num_heads`, consecutive query heads share a key-value head (grouped-query
    attention; 1 is multi-query). Vaswani et al. (2017); Shazeer: "Fast Transformer Decoding" (2019);
    Ainslie et al.: "GQA" (2023).

    Args:
        dim: Width of the output.
        num_heads: Number of query heads.
        num_kv_heads: Number of key-value heads, a divisor of `num_heads`. None: `num_heads`.
        head_dim: Width of a head. None: `dim / num_heads`.
        query_scale: Multiplies the queries. None: `1 / sqrt(head_dim)`.
        score_cap: Bound that the scores approach, see `dot_product_attention`; None: no bound.
        causal: Whether a query sees only keys up to its own place. Self-attention only.
        sliding_window: Number of keys that a query of causal attention sees, its own place included;
            None: all up to there.
        rotary_wavelength: `max_wavelength` of a rotary embedding on queries and keys; None: no rotary
            embedding. Self-attention only.
        rotary_scaling: `scaling` of that embedding, see `RotaryEmbedding`.
        rotary_fraction: `fraction` of that embedding.
        qk_norm: Whether an `RMSNorm` over each head of queries and keys comes before the rotation.
        norm_epsilon: Epsilon of those norms.
        norm_unit_offset: `unit_offset` of those norms.
        use_bias: Whether queries, keys and values have biases.
        output_bias: Whether the output matrix has a bias. None: as `use_bias`.
        dropout: Fraction of the outputs set to zero while training.
        attention_dropout: The same for the attention weights. None: as `dropout`.
        initializer_range: Standard deviation of the normal initialisation.
        output_initializer_range: The same for the output matrix; None takes `initializer_range`.

    Raises:
        ValueError: If the heads do not divide as above, or arguments do not fit together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        query_scale: float | None = None,
        score_cap: float | None = None,
        causal: bool = False,
        sliding_window: int | None = None,
        rotary_wavelength: float | None = None,
        rotary_scaling: dict[str, Any] | None = None,
        rotary_fraction: float = 1.0,
        qk_norm: bool = False,
        norm_epsilon: float = 1e-6,
        norm_unit_offset: bool = False,
        use_bias: bool = True,
        output_bias: bool | None = None,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        initializer_range: float = 0.02,
        output_initializer_range: float | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (("dim", dim), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}")
        if num_heads % num_kv_heads:
            raise ValueError(
                "`num_kv_heads` must divide `num_heads`. "
                f"Received: num_kv_heads={num_kv_heads}, num_heads={num_heads}"
            )
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(
                    "`num_heads` must divide `dim`, or `head_dim` must be given. "
                    f"Received: num_heads={num_heads}, dim={dim}"
                )
            head_dim = dim // num_heads
        if head_dim < 1:
            raise ValueError(f"`head_dim` must be at least 1. Received: head_dim={head_dim}")
        if sliding_window is not None and (sliding_window < 1 or not causal):
            raise ValueError(
                "`sliding_window` must be at least 1 and needs `causal` to be True. "
                f"Received: sliding_window={sliding_window}, causal={causal}"
            )
        for name, value in (("query_scale", query_scale), ("score_cap", score_cap)):
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive or None. Received: {name}={value}")
        if rotary_wavelength is None and (rotary_scaling is not None or rotary_fraction != 1.0):
            raise ValueError(
                "`rotary_scaling` and `rotary_fraction` need a `rotary_wavelength`. Received: "
                f"rotary_scaling={rotary_scaling}, rotary_fraction={rotary_fraction}"
            )
        self.dim = dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.query_scale = 1.0 / math.sqrt(head_dim) if query_scale is None else query_scale
        self.score_cap = score_cap
        self.causal = causal
        self.sliding_window = sliding_window
        self.rotary_wavelength = rotary_wavelength
        self.rotary_scaling = rotary_scaling
        self.rotary_fraction = rotary_fraction
        self.qk_norm = qk_norm
        self.norm_epsilon = norm_epsilon
        self.norm_unit_offset = norm_unit_offset
        self.use_bias = use_bias
        self.output_bias = use_bias if output_bias is None else output_bias
        self.dropout = dropout
        self.attention_dropout = dropout if attention_dropout is None else attention_dropout
        self.initializer_range = initializer_range
        self.output_initializer_range = (
            initializer_range if output_initializer_range is None else output_initializer_range
        )

        def dense(name, units, use_bias, initializer_range):
            return Dense(
                units,
                use_bias=use_bias,
                kernel_initializer=keras.initializers.RandomNormal(stddev=initializer_range),
                name=name,
                dtype=self.dtype_policy,
            )

        self.query = dense("query", num_heads * head_dim, use_bias, initializer_range)
        self.key = dense("key", num_kv_heads * head_dim, use_bias, initializer_range)
        self.value = dense("value", num_kv_heads * head_dim, use_bias, initializer_range)
        self.output_dense = dense("output", dim, self.output_bias, self.output_initializer_range)
        self.query_norm = self.key_norm = None
        if qk_norm:
            self.query_norm, self.key_norm = (
                RMSNorm(norm_epsilon, norm_unit_offset, name=name, dtype=self.dtype_policy)
                for name in ("query_norm", "key_norm")
            )
        self.rotary = None
        if rotary_wavelength is not None:
            self.rotary = RotaryEmbedding(
                head_dim, rotary_wavelength, rotary_scaling, rotary_fraction, dtype=self.dtype_policy
            )
        self.weight_dropout = Dropout(self.attention_dropout, dtype=self.dtype_policy)
        self.output_dropout = Dropout(dropout, dtype=self.dtype_policy)

    def build(self, x_shape, memory_shape=None):
        self.query.build(x_shape)
        for layer in (self.key, self.value):
            layer.build(memory_shape or x_shape)
        if self.qk_norm:
            for layer in (self.query_norm, self.key_norm):
                layer.build((None, None, None, self.head_dim))
        self.output_dense.build((None, None, self.num_heads * self.head_dim))

    def _heads(self, dense, flat, num_heads, length):
        """Projects vectors `[batch * length, width]` to heads `[batch, length, heads, head_dim]`."""
        return ops.reshape(dense(flat), (-1, length, num_heads, self.head_dim))

    def _place(self, heads, norm, waves):
        """Normalises queries or keys `[batch, length, heads, head_dim]` and rotates them."""
        if norm is not None:
            heads = norm(heads)
        return heads if waves is None else self.rotary.rotate(heads, *waves)

    def _keys_and_values(self, flat, length, waves=None):
        """Projects vectors to keys `[batch, kv_heads, length, head_dim]` and transposed values."""
        keys = self._heads(self.key, flat, self.num_kv_heads, length)
        keys = self._place(keys, self.key_norm, waves)
        values = self._heads(self.value, flat, self.num_kv_heads, length)
        return ops.transpose(keys, (0, 2, 1, 3)), ops.transpose(values, (0, 2, 3, 1))

    def make_cache(self, batch_size: int, length: int):
        """Makes an empty key-value cache.

        Args:
            batch_size: Number of rows.
            length: Number of tokens it can hold.

        Returns:
            Zeros: keys `[batch, kv_heads, length, head_dim]` and transposed values
            `[batch, kv_heads, head_dim, length]`, in the compute dtype.
        """
        heads, width, dtype = self.num_kv_heads, self.head_dim, self.compute_dtype
        return (
            ops.zeros((batch_size, heads, length, width), dtype),
            ops.zeros((batch_size, heads, width, length), dtype),
        )

    def memory_cache(self, memory):
        """Projects an encoder's output once, for use as the read-only cache of cross-attention.

        Args:
            memory: Floats `[batch, memory_length, memory_dim]`.

        Returns:
            Keys and transposed values, as `make_cache` lays them out.
        """
        self._require_cross()
        return self._keys_and_values(flatten(memory), ops.shape(memory)[1])

    def _require_cross(self):
        if self.causal or self.rotary is not None:
            raise ValueError(
                "Cross-attention has no order between queries and memory: `causal` must be False and "
                f"`rotary_wavelength` None. Received: causal={self.causal}, "
                f"rotary_wavelength={self.rotary_wavelength}"
            )

    def call(
        self,
        x,
        memory=None,
        attention_mask=None,
        position_bias=None,
        positions=None,
        cache=None,
        cache_index=None,
        training: bool = False,
    ):
        """Attends.

        Args:
            x: Floats `[batch, length, width]`: where the queries come from.
            memory: Floats `[batch, memory_length, memory_width]`: where keys and values come from.
                None: from `x` (self-attention).
            attention_mask: Which keys count, see `mask_bias`; combined with the causal rule. One with
                fewer columns than the cache has reads that many columns only.
            position_bias: Floats `[batch or 1, num_heads, length, keys]` added to the scores, see
                `RelativePositionBias`.
            positions: Integers `[length]` or `[batch, length]` for the rotary embedding. None: the
                places of the tokens, from `cache_index` on.
            cache: Keys and values as `make_cache` or `memory_cache` gave them. With `cache_index` the
                keys and values of `x` are written into it first; without, it is only read, which is
                cross-attention over memory projected before. Where XLA decodes with a `cache_index` for
                each row, one with more rows than `x` keeps those behind as they are.
            cache_index: The column of the first token of `x`, which is also that token's place in the
                causal rule: a Python int, an integer tensor `[]`, or integers `[batch]`, one per row.
                All tokens must lie inside the cache, which only an int lets us check.
            training: Whether dropout is on.

        Returns:
            Floats `[batch, length, dim]`; with `cache_index` also the updated cache.
        """
        if memory is not None and cache is not None:
            raise ValueError(
                "`memory` and `cache` exclude each other; project the memory once with "
                "`memory_cache` and pass that. Received both"
            )
        if cache_index is not None and cache is None:
            raise ValueError("`cache_index` needs a `cache` to index. Received: cache=None")
        length = ops.shape(x)[1]
        flat = flatten(x)

        offsets = ops.arange(length, dtype="int32")
        if cache_index is not None:
            if not isinstance(cache_index, int):
                cache_index = ops.cast(cache_index, "int32")
            offsets = ops.expand_dims(cache_index, -1) + offsets
        positions = offsets if positions is None else positions
        waves = None if self.rotary is None else self.rotary.waves(positions)

        query = self._heads(self.query, flat, self.num_heads, length)
        query = self._place(query, self.query_norm, waves)
        if memory is not None:
            keys, values = self.memory_cache(memory)
        elif cache is not None and cache_index is None:
            self._require_cross()
            keys, values = cache
        else:
            keys, values = self._keys_and_values(flat, length, waves)
            if cache is not None:
                cache, keys, values = _write_cache(cache, keys, values, cache_index)
                keys, values = _first_columns(keys, values, attention_mask)

        # b batch, k key-value heads, g query heads per key-value head, q queries, h head width.
        # The g heads of a group are consecutive, and stacking them along the queries lets one product
        # serve the group without a copy of the keys.
        group = self.num_heads // self.num_kv_heads
        query = query * self.query_scale
        query = ops.reshape(query, (-1, length, self.num_kv_heads, group, self.head_dim))
        query = ops.transpose(query, (0, 2, 3, 1, 4))  # b k g q h
        query = ops.reshape(query, (-1, self.num_kv_heads, group * length, self.head_dim))

        if attention_mask is None and position_bias is None and self._decodes_in_blocks(cache, offsets):
            mixed = _attend_in_blocks(query, cache, cache_index, self.sliding_window, self.score_cap)
        else:
            key_length = ops.shape(keys)[2]
            bias = self._bias(offsets, length, key_length, attention_mask, position_bias, group)
            mixed = forget_inside(
                lambda *inputs: dot_product_attention(
                    *inputs,
                    dropout=lambda weights: self.weight_dropout(weights, training=training),
                    score_cap=self.score_cap,
                )[0],
                query,
                keys,
                values,
                *([] if bias is None else [bias]),
            )
        mixed = ops.reshape(mixed, (-1, self.num_heads, length, self.head_dim))
        mixed = ops.transpose(mixed, (0, 2, 1, 3))
        mixed = self.output_dense(ops.reshape(mixed, (-1, self.num_heads * self.head_dim)))
        output = self.output_dropout(ops.reshape(mixed, (-1, length, self.dim)), training=training)
        return output if cache_index is None else (output, cache)

    def _decodes_in_blocks(self, cache, offsets) -> bool:
        """Whether single tokens, each at a place of its own, look at a cache that XLA knows to be long."""
        if not (self.causal and cache is not None and is_traced_for_xla()):
            return False
        length = cache[0].shape[3]
        return len(offsets.shape) == 2 and offsets.shape[1] == 1 and length is not None and length > _BLOCK

    def _bias(self, query_index, length, key_length, attention_mask, position_bias, group):
        """The sum of all that is added to the scores, laid out as the stacked scores are."""
        terms = []
        if self.causal:  # [q, keys] or [b, q, keys]
            bias = causal_bias(query_index, key_length, self.sliding_window)
            terms.append(ops.reshape(bias, (-1, 1, length, key_length)))
        if attention_mask is not None:
            terms.append(mask_bias(attention_mask))
        if position_bias is not None:
            position_bias = widen(position_bias)
            terms = [*(ops.cast(term, position_bias.dtype) for term in terms), position_bias]
        bias = functools.reduce(operator.add, terms) if terms else None
        if bias is None or group == 1:
            return bias
        rows, heads, queries, _ = ops.shape(bias)
        if heads == 1 and isinstance(length, int) and length == 1:
            return bias  # one row for all heads of all groups
        if heads == 1:  # the same for all heads of a group: repeat it along the stacked queries
            bias = ops.broadcast_to(ops.expand_dims(bias, 2), (rows, 1, group, length, key_length))
            return ops.reshape(bias, (rows, 1, group * length, key_length))
        bias = ops.broadcast_to(bias, (rows, heads, length, key_length))
        return ops.reshape(bias, (rows, self.num_kv_heads, group * length, key_length))
