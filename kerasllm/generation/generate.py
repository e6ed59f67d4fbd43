"""Prompt in, continuation out, as one TensorFlow graph."""

import tensorflow as tf

from kerasllm.generation.config import GenerationConfig
from kerasllm.generation.sampling import choose_tokens, uniform_numbers
from kerasllm.models import LanguageModel
from kerasllm.tokenizers import Tokenizer

# The inputs of `TextGenerator.generate_text`, and with these names of the exported signature.
SIGNATURE = (
    tf.TensorSpec([None], tf.string, name="prompt"),
    tf.TensorSpec([None], tf.int32, name="max_new_tokens"),
    tf.TensorSpec([None], tf.float32, name="temperature"),
    tf.TensorSpec([None], tf.int32, name="top_k"),
    tf.TensorSpec([None], tf.float32, name="top_p"),
    tf.TensorSpec([None], tf.int32, name="seed"),
)


def batch_settings(config: GenerationConfig, count: int | tf.Tensor) -> dict[str, tf.Tensor]:
    """Repeats a configuration for each prompt of a batch.

    Args:
        config: The settings.
        count: Number of prompts.

    Returns:
        The inputs of `SIGNATURE` after the prompt, by name and in order: tensors `[count]`.
    """
    return {
        spec.name: tf.fill([count], tf.constant(getattr(config, spec.name), spec.dtype))
        for spec in SIGNATURE[1:]
    }


def check_vocabularies(model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Raises a ValueError if the tokenizer makes ids that the model does not have."""
    if tokenizer.vocabulary_size > model.config.vocabulary_size:
        raise ValueError(
            "The model's vocabulary must hold every id of the tokenizer. Received: a tokenizer of "
            f"{tokenizer.vocabulary_size} tokens, a model of {model.config.vocabulary_size}"
        )


def _rule(condition: tf.Tensor, message: str, *values: tf.Tensor) -> tf.Operation:
    """Makes an op that fails with INVALID_ARGUMENT and one readable line unless all is true."""
    text = tf.strings.format(message, values) if values else message
    return tf.debugging.Assert(tf.reduce_all(condition), [text], summarize=-1)


def _after(rules: list[tf.Operation], tensor):
    """Returns `tensor` once the rules hold; without this, ops that need it would race the check."""
    with tf.control_dependencies(rules):
        return tf.nest.map_structure(tf.identity, tensor, expand_composites=True)


class TextGenerator(tf.Module):
    """A causal language model and its tokenizer as functions from prompts to continuations.

    Prompts of one batch may differ in length. They are padded on the right; columns of the cache are
    positions of the text, each row decodes at its own position, and what stands behind a row's last
    token is hidden from it until it is overwritten. So a row's result does not depend on its neighbours;
    but a row that breaks a rule, such as a prompt longer than the context, fails the whole batch.

    Args:
        model: The model.
        tokenizer: The tokenizer.
        config: The settings that `generate_text` uses where none are given.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, config: GenerationConfig | None = None):
        super().__init__()
        check_vocabularies(model, tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.config = config or GenerationConfig()

    def encode_prompts(self, prompts: tf.Tensor) -> tf.RaggedTensor:
        """Tokenizes prompts and checks that the model can continue them.

        Text that looks like a special token is not one: prompts are not trusted.

        Args:
            prompts: Strings `[batch]`.

        Returns:
            Int32 `[batch, None]`, ragged.
        """
        token_ids = self.tokenizer.tokenize(prompts)
        lengths = tf.cast(token_ids.row_lengths(), tf.int32)
        context = self.model.config.context_length
        rules = [
            _rule(lengths > 0, "A prompt must hold at least one token. Received: an empty prompt."),
            _rule(
                lengths < context,
                f"A prompt must be shorter than the context of {context} tokens. "
                "Received: a prompt of {} tokens.",
                tf.reduce_max(lengths),
            ),
        ]
        return _after(rules, token_ids)

    def generate_text(
        self,
        prompts: tf.Tensor,
        max_new_tokens: tf.Tensor,
        temperature: tf.Tensor,
        top_k: tf.Tensor,
        top_p: tf.Tensor,
        seed: tf.Tensor,
        fit_to_context: bool = False,
    ) -> dict[str, tf.Tensor]:
        """Continues prompts.

        Args:
            prompts: Strings `[batch]`.
            max_new_tokens: Int32 `[batch]`.
            temperature: Float32 `[batch]`.
            top_k: Int32 `[batch]`.
            top_p: Float32 `[batch]`.
            seed: Int32 `[batch]`.
            fit_to_context: Whether a `max_new_tokens` for which the context has no room is lowered to
                what it has, and not an error. For numbers that the caller did not choose.

        Returns:
            `text`: strings `[batch]`, the continuation without special tokens; `token_ids`: int32
            `[batch, longest]`, filled up with -1; `num_tokens`: int32 `[batch]`.
        """
        count = tf.size(prompts)
        settings = (max_new_tokens, temperature, top_k, top_p, seed)
        rules = [_rule(count > 0, "There must be at least one prompt. Received: none.")]
        for spec, value in zip(SIGNATURE[1:], settings, strict=True):
            rule = f"`{spec.name}` must have one value per prompt. Received: {{}} values, {{}} prompts."
            rules.append(_rule(tf.size(value) == count, rule, tf.size(value), count))
        prompts, settings = _after(rules, (prompts, settings))
        max_new_tokens, temperature, top_k, top_p, seed = settings

        token_ids = self.encode_prompts(prompts)
        if fit_to_context:
            lengths = tf.cast(token_ids.row_lengths(), tf.int32)
            max_new_tokens = tf.minimum(max_new_tokens, self.model.config.context_length - lengths)
        generated, num_tokens = self.generate_ids(
            token_ids, max_new_tokens, temperature, top_k, top_p, seed
        )
        ragged = tf.RaggedTensor.from_tensor(generated, lengths=num_tokens)
        text = self.tokenizer.detokenize(ragged, skip_special_tokens=True)
        return {"text": text, "token_ids": generated, "num_tokens": num_tokens}

    def generate_ids(
        self,
        token_ids: tf.RaggedTensor,
        max_new_tokens: tf.Tensor,
        temperature: tf.Tensor,
        top_k: tf.Tensor,
        top_p: tf.Tensor,
        seed: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Continues tokenized prompts until the end token or the row's `max_new_tokens`.

        Args:
            token_ids: Int32 `[batch, None]`, ragged.
            max_new_tokens: Int32 `[batch]`.
            temperature: Float32 `[batch]`.
            top_k: Int32 `[batch]`.
            top_p: Float32 `[batch]`.
            seed: Int32 `[batch]`.

        Returns:
            New ids, int32 `[batch, longest]`, without the end token, filled up with -1; and the number
            of new ids of each row, int32 `[batch]`.
        """
        lengths = tf.cast(token_ids.row_lengths(), tf.int32)
        context = self.model.config.context_length
        too_many = max_new_tokens > context - lengths  # a sum could overflow
        rules = [
            _rule(
                ~too_many,
                f"Prompt and `max_new_tokens` together must fit into the context of {context} tokens. "
                "Received: a prompt of {} tokens, max_new_tokens={}.",
                tf.reduce_max(tf.where(too_many, lengths, 0)),
                tf.reduce_max(tf.where(too_many, max_new_tokens, 0)),
            )
        ]
        for name, value, holds, rule in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "be at least 1"),
            ("temperature", temperature, temperature >= 0, "be at least 0"),
            ("top_k", top_k, top_k >= 0, "be at least 0"),
            ("top_p", top_p, (top_p > 0) & (top_p <= 1), "be above 0 and at most 1"),
        ):
            rules.append(_rule(holds, f"`{name}` must {rule}. Received: {{}}.", value))
        token_ids, max_new_tokens = _after(rules, (token_ids, max_new_tokens))

        steps = tf.reduce_max(max_new_tokens)
        uniform = uniform_numbers(seed, steps)
        prompt = token_ids.to_tensor(0)
        batch, prompt_length = tf.shape(prompt)[0], tf.shape(prompt)[1]
        logits, cache = self.model(
            prompt,
            cache=self.model.make_cache(batch, prompt_length + steps),
            cache_index=0,
            last_index=lengths - 1,
        )
        columns = tf.range(steps)[None]

        def choose(step, logits):
            number = tf.gather(uniform, step, axis=1)
            return choose_tokens(logits[:, 0], number, temperature, top_k, top_p)

        def accept(step, token, active, output, count):
            """Appends the chosen token to the rows that go on, and ends rows."""
            if self.tokenizer.eos_id is not None:
                active &= token != self.tokenizer.eos_id
            output = tf.where((columns == step) & active[:, None], token[:, None], output)
            count += tf.cast(active, tf.int32)
            return active & (count < max_new_tokens), output, count

        def decode(step, token, active, output, count, cache):
            # A row that has ended is computed along, at a place of its own that exists.
            index = tf.where(active, lengths + step, lengths)
            logits, cache = self.model(token[:, None], cache=cache, cache_index=index)
            step += 1
            token = choose(step, logits)
            active, output, count = accept(step, token, active, output, count)
            return step, token, active, output, count, cache

        step = tf.constant(0)
        token = choose(step, logits)
        active, output, count = accept(
            step,
            token,
            tf.ones([batch], tf.bool),
            tf.fill([batch, steps], -1),
            tf.zeros([batch], tf.int32),
        )
        state = tf.while_loop(
            lambda step, token, active, *rest: tf.reduce_any(active),
            decode,
            [step, token, active, output, count, cache],
        )
        output, count = state[3], state[4]
        return output[:, : tf.reduce_max(count)], count
