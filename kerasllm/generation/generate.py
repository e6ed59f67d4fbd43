"""Prompt in, continuation out, as one TensorFlow graph: what is exported."""

import tensorflow as tf

from kerasllm.generation.config import GenerationConfig
from kerasllm.generation.decoding import append_token, decode, prefill
from kerasllm.generation.processors import RowSettings, settings_arrays
from kerasllm.generation.sampling import uniform_numbers
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
    """A causal language model and its tokenizer as graph functions from prompts to continuations.

    A row's result does not depend on its neighbours; but a row that breaks a rule, such as a prompt
    longer than the context, fails the whole batch.

    Args:
        model: The model.
        tokenizer: The tokenizer.
        config: What the signature has no input for, such as end tokens and penalties.

    Raises:
        ValueError: If the tokenizer has more tokens than the model, or `config` asks for what such a
            graph does not do.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, config: GenerationConfig | None = None):
        super().__init__()
        check_vocabularies(model, tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.config = config or GenerationConfig()
        for name in ("stop_strings", "num_beams", "penalty_alpha"):
            if (value := getattr(self.config, name)) != getattr(GenerationConfig, name):
                raise ValueError(f"A graph cannot hold `{name}`. Received: {name}={value!r}")

    def encode_prompts(self, prompts: tf.Tensor) -> tf.RaggedTensor:
        """Tokenizes prompts and checks that the model can continue them.

        Text that looks like a special token is not one: prompts are not trusted. Special tokens that
        the tokenizer puts around a text, such as one for its beginning, are put there.

        Args:
            prompts: Strings `[batch]`.

        Returns:
            Int32 `[batch, None]`, ragged.
        """
        token_ids = self.tokenizer.tokenize(prompts, add_special_tokens=True)
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
        text = self.tokenizer.detokenize(ragged, skip_special_tokens=True, after=token_ids)
        return {"text": text, "token_ids": generated, "num_tokens": num_tokens}

    def _settings(self, count: tf.Tensor) -> RowSettings:
        """The configuration for each of `count` rows."""
        end_ids = self.config.end_ids(self.tokenizer.eos_id)
        arrays = settings_arrays([self.config], [end_ids], self.model.config.vocabulary_size)
        return RowSettings(*(None if a is None else tf.repeat(tf.constant(a), count, 0) for a in arrays))

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
        prompts = token_ids.to_tensor(0)
        settings = self._settings(tf.size(lengths))._replace(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p
        )
        logits, state = prefill(self.model, prompts, lengths, tf.shape(prompts)[1] + steps)
        state = append_token(state, logits, settings, uniform)
        state = decode(self.model, state, settings, uniform, steps)

        counts = state.lengths - lengths
        columns = tf.range(tf.reduce_max(counts))[None]
        places = tf.minimum(lengths[:, None] + columns, tf.shape(state.sequences)[1] - 1)
        generated = tf.gather(state.sequences, places, batch_dims=1)
        return tf.where(columns < counts[:, None], generated, -1), counts
