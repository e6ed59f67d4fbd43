"""Prompt in, continuation out, as one TensorFlow graph: what is exported."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from kerasllm.generation.checks import after, check_batch, check_texts, rule
from kerasllm.generation.compiled import decode_compiled
from kerasllm.generation.config import GenerationConfig
from kerasllm.generation.decoding import append_token, decode, pad_to, prefill
from kerasllm.generation.padding import SHORTEST_LENGTH, bucket_in_graph
from kerasllm.generation.processors import RowSettings, settings_arrays
from kerasllm.generation.sampling import uniform_numbers
from kerasllm.generation.stops import LONGEST_STOP_STRING, MOST_STOP_STRINGS, StopWatch, read_stop_strings
from kerasllm.models import LanguageModel
from kerasllm.tokenizers import Tokenizer
from kerasllm.tokenizers.chat_graph import ChatEncoder

# What a request says of each prompt besides its text; with these names inputs of the exported signatures.
KNOBS = (
    tf.TensorSpec([None], tf.int32, name="max_new_tokens"),
    tf.TensorSpec([None], tf.float32, name="temperature"),
    tf.TensorSpec([None], tf.int32, name="top_k"),
    tf.TensorSpec([None], tf.float32, name="top_p"),
    tf.TensorSpec([None], tf.float32, name="min_p"),
    tf.TensorSpec([None], tf.float32, name="repetition_penalty"),
    tf.TensorSpec([None], tf.int32, name="seed"),
    tf.TensorSpec([None, None], tf.string, name="stop"),
)
# The inputs of `TextGenerator.generate_text`.
SIGNATURE = (tf.TensorSpec([None], tf.string, name="prompt"), *KNOBS)
_RULES = {
    "temperature": ("be at least 0 and finite", lambda v: (v >= 0) & (v < float("inf"))),
    "top_k": ("be at least 0", lambda v: v >= 0),
    "top_p": ("be above 0 and at most 1", lambda v: (v > 0) & (v <= 1)),
    "min_p": ("be at least 0 and at most 1", lambda v: (v >= 0) & (v <= 1)),
    "repetition_penalty": ("be above 0 and finite", lambda v: (v > 0) & (v < float("inf"))),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The most work that one request to an exported model may ask for.

    Args:
        max_batch_size: Most rows.
        max_prompt_tokens: Most tokens of a prompt. None: what the context has room for.
        max_new_tokens: Most new tokens of a row. None: what the context has room for.

    Raises:
        ValueError: If a limit is below 1.
    """

    max_batch_size: int = 256
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"`{field.name}` must be at least 1. Received: {field.name}={value}")

    def within(self, context_length: int) -> "Limits":
        """The same with a number for each, none above what the context has room for."""
        longest = context_length if self.max_prompt_tokens is None else self.max_prompt_tokens
        most = context_length if self.max_new_tokens is None else self.max_new_tokens
        return dataclasses.replace(
            self,
            max_prompt_tokens=min(longest, context_length),
            max_new_tokens=min(most, context_length),
        )


def batch_settings(config: GenerationConfig, count: int | tf.Tensor) -> dict[str, tf.Tensor]:
    """Repeats a configuration for each prompt of a batch.

    Args:
        config: The settings.
        count: Number of prompts.

    Returns:
        The inputs of `SIGNATURE` after the prompt, by name and in order: tensors `[count]`, and the stop
        strings `[count, any]`.
    """
    settings = {
        spec.name: tf.fill([count], tf.constant(getattr(config, spec.name), spec.dtype))
        for spec in KNOBS
        if spec.name != "stop"
    }
    stop = tf.constant([text.encode() for text in config.stop_strings], tf.string)
    return {**settings, "stop": tf.tile(stop[None], [count, 1])}


def check_vocabularies(model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Raises a ValueError if the tokenizer makes ids that the model does not have."""
    if tokenizer.vocabulary_size > model.config.vocabulary_size:
        raise ValueError(
            "The model's vocabulary must hold every id of the tokenizer. Received: a tokenizer of "
            f"{tokenizer.vocabulary_size} tokens, a model of {model.config.vocabulary_size}"
        )


class TextGenerator:
    """A causal language model and its tokenizer as graph functions from prompts to continuations.

    A row's result does not depend on its neighbours; but a row that breaks a rule, such as a prompt
    longer than the context, fails the whole batch. The functions share one graph for all but the way in.

    Args:
        model: The model.
        tokenizer: The tokenizer.
        config: What the signature has no input for, such as end tokens and penalties.
        limits: The most that a request may ask for.
        jit_compile: Whether XLA compiles the decoding, for each of a few lengths and numbers of rows.

    Raises:
        ValueError: If the tokenizer has more tokens than the model, or `config` asks for what such a
            graph does not do.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        config: GenerationConfig | None = None,
        limits: Limits | None = None,
        jit_compile: bool = False,
    ):
        check_vocabularies(model, tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.config = config or GenerationConfig()
        self.jit_compile = jit_compile
        self.limits = (limits or Limits()).within(model.config.context_length)
        # Guesses change no result, only the time.
        for name in ("num_beams", "penalty_alpha"):
            if (value := getattr(self.config, name)) != getattr(GenerationConfig, name):
                raise ValueError(f"A graph cannot hold `{name}`. Received: {name}={value!r}")
        stops = self.config.stop_strings
        longest = max((len(stop.encode()) for stop in stops), default=0)
        if len(stops) > MOST_STOP_STRINGS or longest > LONGEST_STOP_STRING:
            raise ValueError(
                f"A graph looks for at most {MOST_STOP_STRINGS} `stop_strings` of {LONGEST_STOP_STRING} "
                f"bytes. Received: stop_strings={stops!r}"
            )
        numbers, ids = tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, None], tf.int32)
        self._generate = tf.function(
            self._generate_ids, input_signature=[ids, numbers, *KNOBS], autograph=False
        )

    # The way in

    def encode_prompts(self, prompts: tf.Tensor) -> tf.RaggedTensor:
        """Tokenizes prompts and checks that the model can continue them.

        Text that looks like a special token is not one: prompts are not trusted. Special tokens that
        the tokenizer puts around a text, such as one for its beginning, are put there.

        Args:
            prompts: Strings `[batch]`, UTF-8.

        Returns:
            Int32 `[batch, None]`, ragged.
        """
        prompts = check_texts("prompt", prompts, self.longest_text())
        return self.check_prompts(self.tokenizer.tokenize(prompts, add_special_tokens=True))

    def longest_text(self) -> int:
        """The most bytes that are looked at of a text: longer ones cannot be short enough in tokens."""
        tokenizer = self.tokenizer
        longest = max(len(tokenizer.token_bytes(number)) for number in range(tokenizer.vocabulary_size))
        return self.limits.max_prompt_tokens * max(longest, 16)

    def check_prompts(self, token_ids: tf.RaggedTensor) -> tf.RaggedTensor:
        """Checks the lengths of prompts, int32 `[batch, None]`, and returns them."""
        lengths = tf.cast(token_ids.row_lengths(), tf.int32)
        context, limit = self.model.config.context_length, self.limits.max_prompt_tokens
        shorter = (
            f"shorter than the context of {context} tokens"
            if self._continues_prompts and limit >= context
            else f"of at most {limit} tokens"
        )
        fits = lengths < context if self._continues_prompts else lengths <= context
        rules = [
            rule(lengths > 0, "A prompt must hold at least one token. Received: an empty prompt."),
            rule(
                fits & (lengths <= limit),
                f"A prompt must be {shorter}. Received: a prompt of {{}} tokens.",
                tf.reduce_max(lengths),
            ),
        ]
        return after(rules, token_ids)

    # What an encoder-decoder does in another way

    _continues_prompts = True

    def _start(self, prompts: tf.Tensor, lengths: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, Mapping]:
        """What the new tokens follow, their number, and further tensors for each call of the model."""
        return prompts, lengths, {}

    # The graph

    def generate_text(self, prompt: tf.Tensor, **knobs: tf.Tensor) -> dict[str, tf.Tensor]:
        """Continues prompts.

        Args:
            prompt: Strings `[batch]`.
            **knobs: Those of `KNOBS`, all of them: `max_new_tokens`, `top_k` and `seed` int32 `[batch]`,
                `temperature`, `top_p`, `min_p` and `repetition_penalty` float32 `[batch]`, `stop` strings
                `[batch, any]`, see `read_stop_strings`.

        Returns:
            `text`: strings `[batch]`, the continuation without special tokens and the stop string;
            `token_ids`: int32 `[batch, longest]`, without the end token, up to the one that completed a
            stop string, filled up with -1; `num_tokens`: int32 `[batch]`; `finish_reason`: strings
            `[batch]`, "stop" or "length", as in `Completion`; `logprobs`: float32 `[batch, longest]`, of
            each token under the model itself, filled up with 0.
        """
        inputs = self.check_inputs({"prompt": prompt, **knobs})
        token_ids = self.encode_prompts(inputs.pop("prompt"))
        return self.continue_ids(token_ids, **inputs)

    def generate_with_defaults(self, prompt: tf.Tensor) -> dict[str, tf.Tensor]:
        """Continues prompts as the configuration says, or for as many tokens as there is room for.

        Args:
            prompt: Strings `[batch]`.

        Returns:
            As `generate_text`.
        """
        prompt = self.check_inputs({"prompt": prompt})["prompt"]
        token_ids = self.encode_prompts(prompt)
        return self.continue_ids(
            token_ids, **self.fit(token_ids, batch_settings(self.config, tf.size(prompt)))
        )

    def generate_alike(self, prompt: tf.Tensor, knobs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Continues prompts with the same settings for all.

        Args:
            prompt: Strings `[batch]`.
            knobs: Each of `KNOBS` without its first axis. 0 for `max_new_tokens` stands for as many as the
                configuration says and there is room for.

        Returns:
            As `generate_text`.
        """
        prompt = self.check_inputs({"prompt": prompt})["prompt"]
        knobs = {spec.name: tf.ensure_shape(knobs[spec.name], spec.shape[1:]) for spec in KNOBS}
        count = tf.size(prompt)
        knobs = {name: tf.repeat(value[None], count, axis=0) for name, value in knobs.items()}
        token_ids = self.encode_prompts(prompt)
        default = self.fit(token_ids, batch_settings(self.config, count))["max_new_tokens"]
        most = knobs["max_new_tokens"]
        return self.continue_ids(
            token_ids, **{**knobs, "max_new_tokens": tf.where(most == 0, default, most)}
        )

    def answer_chats(
        self, encoder: ChatEncoder, roles: tf.Tensor, contents: tf.Tensor, num_turns: tf.Tensor, **knobs
    ) -> dict[str, tf.Tensor]:
        """Answers in conversations.

        Args:
            encoder: The tokenizer's.
            roles: Strings `[batch, turns]`: who says each message.
            contents: Strings `[batch, turns]`, UTF-8: the messages, of which no part is ever taken for a
                special token.
            num_turns: Int32 `[batch]`: how many messages each conversation has; what stands behind them
                does not count, whatever it is.
            **knobs: As in `generate_text`.

        Returns:
            As `generate_text`.
        """
        inputs = {"roles": roles, "contents": contents, "num_turns": num_turns, **knobs}
        inputs = self.check_inputs(inputs, roles=2, contents=2)
        roles, contents, num_turns = (inputs.pop(name) for name in ("roles", "contents", "num_turns"))
        turns, width = tf.shape(roles)[1], tf.shape(contents)[1]
        message = "`roles` and `contents` must be of one shape. Received: {} and {} messages in a row."
        num_turns = after([rule(turns == width, message, turns, width)], num_turns)
        message = "`num_turns` must be from 1 to the messages that a row has room for, {}. Received: {}."
        rules = [rule((num_turns >= 1) & (num_turns <= turns), message, turns, num_turns)]
        contents = after(rules, check_texts("contents", contents, self.longest_text()))
        rules = [
            rule(holds, f"{text} Received: {{}}.", wrong)
            for holds, text, wrong in encoder.problems(roles, contents, num_turns)
        ]
        roles, contents, num_turns = after(rules, (roles, contents, num_turns))
        token_ids = self.check_prompts(encoder(roles, contents, num_turns))
        return self.continue_ids(token_ids, **inputs)

    def check_inputs(self, inputs: dict[str, tf.Tensor], **ranks: int) -> dict[str, tf.Tensor]:
        """Checks the shapes of a request's inputs, as `check_batch`."""
        return check_batch(inputs, self.limits.max_batch_size, {"stop": 2, **ranks})

    def fit(self, token_ids: tf.RaggedTensor, knobs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Lowers a `max_new_tokens` that the caller did not choose to what there is room for."""
        room = tf.fill([token_ids.nrows(tf.int32)], self.limits.max_new_tokens)
        if self._continues_prompts:
            lengths = tf.cast(token_ids.row_lengths(), tf.int32)
            room = tf.minimum(room, self.model.config.context_length - lengths)
        return {**knobs, "max_new_tokens": tf.minimum(knobs["max_new_tokens"], room)}

    def continue_ids(self, token_ids: tf.RaggedTensor, **knobs: tf.Tensor) -> dict[str, tf.Tensor]:
        """Continues tokenized prompts.

        Args:
            token_ids: Int32 `[batch, None]`, checked by `check_prompts`.
            **knobs: As in `generate_text`.

        Returns:
            As `generate_text`.
        """
        lengths = tf.cast(token_ids.row_lengths(), tf.int32)
        return self._generate(token_ids.to_tensor(0), lengths, *(knobs[spec.name] for spec in KNOBS))

    def _settings(self, count: tf.Tensor, knobs: Mapping[str, tf.Tensor]) -> RowSettings:
        """The knobs of `count` rows, and the configuration for what is none."""
        end_ids = self.config.end_ids(self.tokenizer.eos_id)
        # A penalty that is no neutral one brings in all settings that a graph may leave out.
        config = dataclasses.replace(self.config, repetition_penalty=2.0)
        arrays = settings_arrays([config], [end_ids], self.model.config.vocabulary_size)
        rows = RowSettings(*(None if a is None else tf.repeat(tf.constant(a), count, 0) for a in arrays))
        # The configuration's own number of tokens before which a text does not end is not above the limit.
        least = tf.minimum(rows.min_new_tokens, knobs["max_new_tokens"])
        return rows._replace(
            **{name: value for name, value in knobs.items() if name in RowSettings._fields},
            min_new_tokens=least,
        )

    def _rounded(self, length: tf.Tensor) -> tf.Tensor:
        """Rounds a length up for XLA, int32 `[]`."""
        return bucket_in_graph(length, SHORTEST_LENGTH, self.model.config.context_length)

    def _check_knobs(self, lengths: tf.Tensor, knobs: Mapping[str, tf.Tensor]) -> list[tf.Operation]:
        context, limit = self.model.config.context_length, self.limits.max_new_tokens
        most = knobs["max_new_tokens"]
        too_many = most > context - lengths  # a sum could overflow
        rules = [
            rule(
                ~too_many,
                f"Prompt and `max_new_tokens` together must fit into the context of {context} tokens. "
                "Received: a prompt of {} tokens, max_new_tokens={}.",
                tf.reduce_max(tf.where(too_many, lengths, 0)),
                tf.reduce_max(tf.where(too_many, most, 0)),
            ),
            rule(most >= 1, "`max_new_tokens` must be at least 1. Received: {}.", most),
            rule(most <= limit, f"`max_new_tokens` must be at most {limit}. Received: {{}}.", most),
        ]
        for name, (text, holds) in _RULES.items():
            message = f"`{name}` must {text}. Received: {{}}."
            rules.append(rule(holds(knobs[name]), message, knobs[name]))
        return rules

    def _generate_ids(
        self, prompts: tf.Tensor, prompt_lengths: tf.Tensor, *values: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """From ids `[batch, longest]` to what `generate_text` returns."""
        knobs = {spec.name: value for spec, value in zip(KNOBS, values, strict=True)}
        stops = read_stop_strings(knobs.pop("stop"))
        begin, lengths, extra = self._start(prompts, prompt_lengths)
        knobs = after(self._check_knobs(lengths, knobs), knobs)
        most = knobs["max_new_tokens"]
        steps = tf.reduce_max(most)
        room = tf.reduce_max(lengths + most)
        if self.jit_compile:
            room = self._rounded(room)
        uniform = uniform_numbers(knobs["seed"], room)
        settings = self._settings(tf.size(lengths), knobs)
        before = tf.RaggedTensor.from_tensor(
            begin, lengths=lengths if self._continues_prompts else 0 * lengths
        )
        watch = StopWatch(self.tokenizer.decoder, stops)

        logits, state = prefill(self.model, begin, lengths, room, num_log_probabilities=0, extra=extra)
        state = state._replace(texts=watch.start(before))
        state = watch.look(append_token(state, logits, settings, uniform), lengths)
        if self.jit_compile:
            state = decode_compiled(self.model, state, settings, uniform, steps, extra, watch)
        else:
            state = decode(self.model, state, settings, uniform, steps, extra, watch.look)

        end = watch.finish(state).end
        counts = state.lengths - lengths
        columns = tf.range(tf.reduce_max(counts))[None]
        places = tf.minimum(lengths[:, None] + columns, tf.shape(state.sequences)[1] - 1)
        is_new = columns < counts[:, None]
        token_ids = tf.where(is_new, tf.gather(state.sequences, places, batch_dims=1), -1)
        logprobs = tf.gather(state.log_probabilities.chosen, places, batch_dims=1)
        text = self.tokenizer.detokenize(token_ids, skip_special_tokens=True, after=before)
        sizes = tf.where(end < 0, tf.strings.length(text), end)
        ended = (end >= 0) | (counts < most)
        return {
            "text": tf.strings.substr(text, tf.zeros_like(sizes), sizes),
            "token_ids": token_ids,
            "num_tokens": counts,
            "finish_reason": tf.where(ended, "stop", "length"),
            "logprobs": tf.where(is_new, logprobs, 0.0),
        }


class AnswerGenerator(TextGenerator):
    """As `TextGenerator`, of an encoder-decoder: prompts are sources, and a new text answers each."""

    _continues_prompts = False

    def _start(
        self, prompts: tf.Tensor, lengths: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, Mapping[str, Any]]:
        if self.jit_compile:
            prompts = pad_to(prompts, self._rounded(tf.shape(prompts)[1]), axis=1)
        mask = tf.sequence_mask(lengths, tf.shape(prompts)[1], tf.int32)
        memory_cache = self.model.make_memory_cache(self.model.encode(prompts, mask))
        ones = tf.ones_like(lengths)
        start = ones[:, None] * self.model.config.decoder_start_id
        return start, ones, {"memory_cache": memory_cache, "memory_mask": mask}
