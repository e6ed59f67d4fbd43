"""Prefill and decode one call at a time, with the cache as tensors: for programs that schedule."""

import tensorflow as tf

from kerasllm.generation.checks import after, rule
from kerasllm.generation.generate import TextGenerator


def cache_names(number: int) -> tuple[str, str]:
    """What the keys and the values of a layer are called."""
    return f"kv_cache_k_{number}", f"kv_cache_v_{number}"


class CachedDecoder:
    """A causal language model as two functions of tensors.

    Args:
        generator: The model with its limits.
    """

    def __init__(self, generator: TextGenerator):
        self._generator = generator
        self.model = generator.model

    def cache_specs(self) -> dict[str, tf.TensorSpec]:
        """The cache's tensors by name, of any number of rows and any length."""
        specs = {}
        for number, pair in enumerate(self.model.make_cache(1, 1)):
            shapes = ([None, pair[0].shape[1], None, pair[0].shape[3]], [None, *pair[1].shape[1:3], None])
            for name, array, shape in zip(cache_names(number), pair, shapes, strict=True):
                specs[name] = tf.TensorSpec(shape, array.dtype, name=name)
        return specs

    def prefill(
        self, token_ids: tf.Tensor, num_tokens: tf.Tensor, max_new_tokens: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Reads prompts.

        Args:
            token_ids: Int32 `[batch, length]`; what stands behind a row's tokens does not count.
            num_tokens: Int32 `[batch]`, the tokens of each row.
            max_new_tokens: Int32 `[batch]`, for how many the cache shall have room.

        Returns:
            `logits`: float32 `[batch, vocabulary]`, of the next token; and the cache by the names of
            `cache_specs`.
        """
        inputs = {"token_ids": token_ids, "num_tokens": num_tokens, "max_new_tokens": max_new_tokens}
        inputs = self._generator.check_inputs(inputs, token_ids=2)
        token_ids, num_tokens, max_new_tokens = inputs.values()
        width, context = tf.shape(token_ids)[1], self.model.config.context_length
        limits = self._generator.limits
        rules = [
            rule(
                (num_tokens >= 1) & (num_tokens <= width),
                "`num_tokens` must be from 1 to the length of `token_ids`, {}. Received: {}.",
                width,
                num_tokens,
            ),
            rule(
                num_tokens <= limits.max_prompt_tokens,
                f"A prompt must be of at most {limits.max_prompt_tokens} tokens. Received: {{}}.",
                num_tokens,
            ),
            rule(
                (max_new_tokens >= 1) & (max_new_tokens <= limits.max_new_tokens),
                f"`max_new_tokens` must be from 1 to {limits.max_new_tokens}. Received: {{}}.",
                max_new_tokens,
            ),
        ]
        num_tokens, max_new_tokens = after(rules, (num_tokens, max_new_tokens))
        token_ids = tf.where(tf.sequence_mask(num_tokens, width), token_ids, 0)
        room = tf.reduce_max(num_tokens + max_new_tokens)
        rules = [
            self._check_ids(token_ids),
            rule(
                room <= context,
                f"Prompt and `max_new_tokens` together must fit into the context of {context} tokens. "
                "Received: {} tokens.",
                room,
            ),
        ]
        # Columns behind the longest row's tokens are left out: they would need room in the cache.
        token_ids = after(rules, token_ids[:, : tf.reduce_max(num_tokens)])
        cache = self.model.make_cache(tf.shape(token_ids)[0], room)
        logits, cache = self.model(token_ids, cache=cache, cache_index=0, last_index=num_tokens - 1)
        return self._outputs(logits, cache)

    def decode(self, token_id: tf.Tensor, index: tf.Tensor, **cache: tf.Tensor) -> dict[str, tf.Tensor]:
        """Reads one more token of each row.

        Args:
            token_id: Int32 `[batch]`.
            index: Int32 `[batch]`, how many tokens each row has in the cache: the place of this one.
            **cache: As `prefill` and `decode` return it.

        Returns:
            As `prefill`.
        """
        inputs = {"token_id": token_id, "index": index, **cache}
        inputs = self._generator.check_inputs(inputs, **dict.fromkeys(cache, 4))
        token_id, index = inputs.pop("token_id"), inputs.pop("index")
        lengths = [tf.shape(inputs[name])[2 + axis] for name, axis in self._axes()]
        length = lengths[0]
        rules = [
            self._check_ids(token_id),
            rule(tf.stack(lengths) == length, "The caches must be of one length. Received: {}.", lengths),
            rule(
                (index >= 0) & (index < length) & (index < self.model.config.context_length),
                "`index` must be a place in the cache, which has {}. Received: {}.",
                length,
                index,
            ),
        ]
        token_id, index, inputs = after(rules, (token_id, index, inputs))
        pairs = [tuple(inputs[name] for name in cache_names(n)) for n in range(len(inputs) // 2)]
        logits, updated = self.model(token_id[:, None], cache=pairs, cache_index=index)
        return self._outputs(logits, updated)

    def _axes(self):
        """The names of the cache's tensors and which of the last two axes is the length."""
        for number in range(len(self.cache_specs()) // 2):
            yield from zip(cache_names(number), (0, 1), strict=True)

    def _check_ids(self, token_ids: tf.Tensor) -> tf.Operation:
        vocabulary = self.model.config.vocabulary_size
        return rule(
            (token_ids >= 0) & (token_ids < vocabulary),
            f"Token ids must be from 0 to {vocabulary - 1}. Received: {{}} to {{}}.",
            tf.reduce_min(token_ids),
            tf.reduce_max(token_ids),
        )

    @staticmethod
    def _outputs(logits, cache) -> dict[str, tf.Tensor]:
        outputs = {
            name: array
            for number, pair in enumerate(cache)
            for name, array in zip(cache_names(number), pair, strict=True)
        }
        return {"logits": tf.cast(logits[:, 0], tf.float32), **outputs}
