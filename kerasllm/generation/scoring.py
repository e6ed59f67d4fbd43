"""How likely a model finds a text, as a TensorFlow graph."""

import tensorflow as tf

from kerasllm.generation.checks import after, check_texts, rule
from kerasllm.generation.generate import TextGenerator
from kerasllm.tokenizers.unicode import PYTHON_SPACES

# Tokens that the head is applied to at once: the scores of all tokens of a batch would fill the memory.
_CHUNK = 256
_SPACES = "".join(f"\\x{{{ord(space):x}}}" for space in PYTHON_SPACES)


class TextScorer:
    """Sums the log-likelihoods of continuations.

    Tokens are counted as lm-evaluation-harness does it (Gao et al., "A framework for few-shot language
    model evaluation"): the space at the end of a prompt belongs to the continuation; prompt and
    continuation are tokenized as one text, and all tokens but as many as the prompt alone has belong to the
    continuation. An encoder-decoder reads the prompt alone, and the continuation has its own tokens.

    Args:
        generator: The model with its tokenizer and limits.
    """

    def __init__(self, generator: TextGenerator):
        self._generator = generator
        self.tokenizer, self.model = generator.tokenizer, generator.model
        marked = tf.RaggedTensor.from_row_lengths(tf.constant([-1]), [1])
        self._ids_before = []
        for token_id in self.tokenizer.with_special_tokens(marked)[0].values.numpy().tolist():
            if token_id == -1:
                break
            self._ids_before.append(token_id)

    def score(self, prompt: tf.Tensor, continuation: tf.Tensor) -> dict[str, tf.Tensor]:
        """Scores continuations.

        Args:
            prompt: Strings `[batch]`. An empty one stands for the beginning of a text, of which a token
                (of the beginning, or else of the end) has to be known.
            continuation: Strings `[batch]`, at least one token each.

        Returns:
            `logprob`: float32 `[batch]`, the sum over the tokens of the continuation; `num_tokens`: int32
            `[batch]`; `is_greedy`: booleans `[batch]`, whether each token is the likeliest at its place;
            `token_ids`: int32 `[batch, longest]`, filled up with -1; `logprobs`: float32
            `[batch, longest]`, of each token, filled up with 0.
        """
        inputs = self._generator.check_inputs({"prompt": prompt, "continuation": continuation})
        longest = self._generator.longest_text()
        prompt, continuation = (check_texts(name, text, longest) for name, text in inputs.items())
        sequences, starts, extra = self._encode(prompt, continuation)
        lengths = tf.cast(sequences.row_lengths(), tf.int32)
        context = self.model.config.context_length
        rules = [
            rule(
                starts >= 1,
                "An empty `prompt` needs a tokenizer with a token for the beginning or the end of a text.",
            ),
            rule(lengths > starts, "A `continuation` must add at least one token. Received: none."),
            rule(
                lengths - 1 <= context,
                f"Prompt and continuation together must fit into the context of {context} tokens. "
                "Received: {} tokens.",
                tf.reduce_max(lengths),
            ),
        ]
        sequences, lengths = after(rules, (sequences, lengths))
        ids = sequences.to_tensor(0)
        hidden = self.model(ids[:, :-1], with_head=False, **extra)
        places = tf.range(tf.shape(ids)[1] - 1)[None]
        scored = (places >= starts[:, None] - 1) & (places < lengths[:, None] - 1)
        targets = tf.boolean_mask(ids[:, 1:], scored)
        logprobs, is_best = self._score_tokens(tf.boolean_mask(hidden, scored), targets)
        counts = lengths - starts
        as_rows = lambda values: tf.RaggedTensor.from_row_lengths(values, counts)  # noqa: E731
        return {
            "logprob": tf.reduce_sum(as_rows(logprobs), axis=1),
            "num_tokens": counts,
            "is_greedy": tf.reduce_min(as_rows(tf.cast(is_best, tf.int32)), axis=1) == 1,
            "token_ids": as_rows(targets).to_tensor(-1),
            "logprobs": as_rows(logprobs).to_tensor(0.0),
        }

    def _encode(self, prompt, continuation) -> tuple[tf.RaggedTensor, tf.Tensor, dict[str, tf.Tensor]]:
        """Whole sequences, the place of the first token to be scored, further inputs of the model."""
        whole = self.tokenizer.tokenize(prompt + continuation)
        known = self.tokenizer.tokenize(tf.strings.regex_replace(prompt, f"[{_SPACES}]+$", ""))
        counts = tf.cast(known.row_lengths(), tf.int32)
        if self._ids_before:
            before = tf.repeat(tf.constant([self._ids_before]), tf.size(counts), axis=0)
            before = tf.RaggedTensor.from_tensor(before)
        else:
            first = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
            needed = tf.cast((counts == 0) & (first is not None), tf.int32)
            begin = tf.fill([tf.reduce_sum(needed)], first or 0)
            before = tf.RaggedTensor.from_row_lengths(begin, needed)
        starts = counts + tf.cast(before.row_lengths(), tf.int32)
        before = before.with_row_splits_dtype(tf.int64)
        return tf.concat([before, whole.with_row_splits_dtype(tf.int64)], axis=1), starts, {}

    def _score_tokens(self, hidden: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Hidden states `[tokens, dim]` and ids `[tokens]` to log-likelihoods, and which are the best."""
        count = tf.shape(targets)[0]
        padding = -count % _CHUNK
        hidden = tf.reshape(tf.pad(hidden, [[0, padding], [0, 0]]), [-1, _CHUNK, hidden.shape[-1]])
        ids = tf.reshape(tf.pad(targets, [[0, padding]]), [-1, _CHUNK])

        def score(chunk):
            states, wanted = chunk
            scores = tf.nn.log_softmax(tf.cast(self.model.score_tokens(states), tf.float32))
            best = tf.argmax(scores, axis=-1, output_type=tf.int32)
            return tf.gather(scores, wanted, batch_dims=1), best == wanted

        specs = tf.TensorSpec([_CHUNK], tf.float32), tf.TensorSpec([_CHUNK], tf.bool)
        results = tf.map_fn(score, (hidden, ids), fn_output_signature=specs, parallel_iterations=1)
        return tuple(tf.reshape(result, [-1])[:count] for result in results)


class AnswerScorer(TextScorer):
    """As `TextScorer`, of an encoder-decoder."""

    def _encode(self, prompt, continuation):
        sources = self._generator.encode_prompts(prompt)
        lengths = tf.cast(sources.row_lengths(), tf.int32)
        mask = tf.sequence_mask(lengths, tf.reduce_max(lengths), tf.int32)
        targets = self.tokenizer.tokenize(continuation).with_row_splits_dtype(tf.int64)
        ones = tf.ones_like(lengths)
        start = tf.RaggedTensor.from_tensor(ones[:, None] * self.model.config.decoder_start_id)
        extra = {"source_ids": sources.to_tensor(0), "memory_mask": mask}
        return tf.concat([start.with_row_splits_dtype(tf.int64), targets], axis=1), ones, extra
