"""Continuous batching: rows that come and go, on variables inside of the module."""

import contextlib
import functools
from typing import Any, NamedTuple

import tensorflow as tf
from keras import ops

from kerasllm.generation.checks import after, rule
from kerasllm.generation.compiled import look_back
from kerasllm.generation.decoding import DecodeState, decode, first_state, pad_to
from kerasllm.generation.generate import KNOBS, TextGenerator
from kerasllm.generation.processors import RowSettings
from kerasllm.generation.sampling import uniform_numbers
from kerasllm.generation.stops import (
    LONGEST_STOP_STRING,
    MOST_STOP_STRINGS,
    StopStrings,
    StopWatch,
    read_stop_strings,
)
from kerasllm.layers.attention import swap_cache_layout
from kerasllm.layers.xla import traced_for_xla

# The most alternatives to a token whose log-probabilities are kept, as many as OpenAI's API may ask for.
MOST_ALTERNATIVES = 20
# XLA compiles a step for each of these numbers of rows. Of SmolLM2, 4 rows take 1.6 times as long as one,
# 8 take 2.1 times and 16 take 2.8 times.
_STEP_ROWS = (1, 4, 8, 16, 32, 64)
# What `insert` takes beside `KNOBS`. No end of the text comes before `min_new_tokens`.
FURTHER = (
    tf.TensorSpec([None], tf.float32, name="presence_penalty"),
    tf.TensorSpec([None], tf.float32, name="frequency_penalty"),
    tf.TensorSpec([None], tf.int32, name="min_new_tokens"),
    tf.TensorSpec([None, None], tf.int32, name="bias_ids"),
    tf.TensorSpec([None, None], tf.float32, name="bias_values"),
)


class _Memory(NamedTuple):
    """What is known of the slots, `[slots, ...]`, or of one row, `[1, ...]`."""

    state: DecodeState
    settings: RowSettings
    stops: StopStrings
    uniform: tf.Tensor

    def flat(self) -> list:
        """The tensors in the order of the variables."""
        return tf.nest.flatten(self._replace(settings=_without_none(self.settings)))


class SlotDecoder(tf.Module):
    """Rows of a batch that are filled, stepped and freed one by one.

    `reset` comes first and makes the memory, which no file holds. `read` reads prompts, or parts of them,
    all but their last tokens, and `copy` takes one over from another slot. `insert` begins a row whose
    prompt has been read so, and `step` makes its tokens, beside those of the others. `reset`, `insert`,
    `step` and `free` return the same report of all slots: `active`: booleans `[slots]`; `num_tokens`:
    int32 `[slots]`, new tokens so far; `token_ids`: int32 `[slots, longest]`, these, filled up with -1;
    `logprobs`: float32 `[slots, longest]`, theirs under the model itself, filled up with 0;
    `finish_reason`: strings `[slots]`, empty while a slot is active or free; `text`: strings `[slots]`, of
    an active slot what is final, which a stop string may yet end before.

    `step` takes besides which tokens may come next in some of the slots: `masked` int32 `[any]`, the slots,
    and `allowed` int32 `[any, vocabulary / 32]`, as in `RowSettings`; in the others each token may come.

    What a server needs besides: `alternatives` returns the likeliest tokens at each place of a slot's new
    text, `token_texts` the bytes of tokens, `encode_chat` the ids of a rendered chat (where the tokenizer
    can tell its special tokens from text that spells one), and `sizes` how large all this is.

    Args:
        generator: The model with its tokenizer, configuration and limits.
        slots: How many rows.
        length: Most tokens of prompt and continuation in a slot. None: the model's context.
        jit_compile: Whether XLA compiles the steps, which then change the memory where it lies.

    Raises:
        ValueError: If a number does not fit.
    """

    def __init__(
        self, generator: TextGenerator, slots: int, length: int | None = None, jit_compile: bool = False
    ):
        super().__init__()
        context = generator.model.config.context_length
        length = context if length is None else length
        if slots < 1 or not 2 <= length <= context:
            raise ValueError(
                f"There must be at least one slot, of 2 to {context} tokens. "
                f"Received: slots={slots}, slot_length={length}"
            )
        self._plain = (generator, slots, length)  # Out of TensorFlow's object tracking.
        # For those who load a folder and keep only the slots.
        self.model_variables = [variable.value for variable in generator.model.variables]
        self._jit_compile = jit_compile
        specs = self._trace()
        # No rows until `reset`, so that a file has none of them.
        self.memory = [
            tf.Variable(tf.zeros([0, *spec.shape[1:]], spec.dtype), shape=[None, *spec.shape[1:]])
            if spec.dtype != tf.string
            else tf.Variable(tf.fill([0], ""), shape=[None])
            for spec in specs
        ]
        scalar = tf.TensorSpec([], tf.int32, name="slot")
        knobs = [tf.TensorSpec(knob.shape[1:], knob.dtype, name=knob.name) for knob in KNOBS + FURTHER]
        self.reset = tf.function(self._reset, input_signature=[], autograph=False)
        ids = tf.TensorSpec([None], tf.int32, name="token_ids")
        self.insert = tf.function(self._insert, input_signature=[scalar, ids, *knobs], autograph=False)
        parts = [
            tf.TensorSpec([None], tf.int32, name="slots"),
            tf.TensorSpec([None, None], tf.int32, name="token_ids"),
            tf.TensorSpec([None], tf.int32, name="counts"),
            tf.TensorSpec([], tf.int32, name="start"),
        ]
        self.read = tf.function(self._read_parts, input_signature=parts, autograph=False)
        source, count = (tf.TensorSpec([], tf.int32, name=name) for name in ("source", "count"))
        self.copy = tf.function(self._copy, input_signature=[source, scalar, count], autograph=False)
        steps = tf.TensorSpec([], tf.int32, name="steps")
        masked = tf.TensorSpec([None], tf.int32, name="masked")
        allowed = tf.TensorSpec([None, None], tf.int32, name="allowed")
        self.step = tf.function(self._step, input_signature=[steps, masked, allowed], autograph=False)
        self.free = tf.function(self._free, input_signature=[scalar], autograph=False)
        self.alternatives = tf.function(self._alternatives, input_signature=[scalar], autograph=False)
        self.token_texts = tf.function(self._token_texts, input_signature=[ids], autograph=False)
        self.sizes = tf.function(self._sizes, input_signature=[], autograph=False)
        if generator.tokenizer.can_be_shielded:
            text = tf.TensorSpec([], tf.string, name="text")
            self.encode_chat = tf.function(self._encode_chat, input_signature=[text], autograph=False)

    def functions(self) -> dict[str, Any]:
        """Returns the functions by their names."""
        names = ("reset", "insert", "read", "copy", "step", "free", "alternatives", "token_texts", "sizes")
        functions = {name: getattr(self, name) for name in names}
        if self._plain[0].tokenizer.can_be_shielded:
            functions["encode_chat"] = self.encode_chat
        return functions

    # The memory is a flat list of variables.

    def _begin(self, token_ids: tf.Tensor, *values: tf.Tensor) -> _Memory:
        """A row before its first token, without its cache, from the prompt and its settings."""
        generator, _, length = self._plain
        knobs = {spec.name: value[None] for spec, value in zip(KNOBS + FURTHER, values, strict=True)}
        stops = read_stop_strings(knobs.pop("stop"))
        bias = self._bias(knobs.pop("bias_ids"), knobs.pop("bias_values"))
        least = knobs.pop("min_new_tokens")
        lengths = tf.shape(token_ids)  # one row
        rules = [
            rule(tf.math.is_finite(knobs[name]), f"`{name}` must be finite. Received: {{}}.", knobs[name])
            for name in ("presence_penalty", "frequency_penalty")
        ]
        rules.append(rule(least >= 0, "`min_new_tokens` must be at least 0. Received: {}.", least))
        knobs = after([*generator._check_knobs(lengths, knobs), *rules], knobs)
        uniform = uniform_numbers(knobs["seed"], tf.constant(length))
        settings = generator._settings(tf.constant(1), knobs)
        settings = settings._replace(
            min_new_tokens=tf.maximum(settings.min_new_tokens, tf.minimum(least, knobs["max_new_tokens"])),
            logit_bias=settings.logit_bias + bias,
        )
        before = tf.RaggedTensor.from_tensor(token_ids[None])
        watch = StopWatch(generator.tokenizer.decoder, stops, always=True)
        state = first_state(token_ids[None], lengths, tf.constant(length), (), self._most_alternatives())
        state = state._replace(texts=watch.start(before))
        padded = pad_to(stops.bytes, tf.constant(LONGEST_STOP_STRING), axis=2)
        most = tf.constant(MOST_STOP_STRINGS)
        stops = StopStrings(pad_to(padded, most, axis=1), pad_to(stops.lengths, most, axis=1))
        return _Memory(state, settings, stops, uniform)

    def _laid_out(self, cache):
        """A cache of the model as the memory has it."""
        return swap_cache_layout(cache) if self._jit_compile else cache

    def _most_alternatives(self) -> int:
        return min(MOST_ALTERNATIVES, self._plain[0].model.config.vocabulary_size)

    def _bias(self, ids: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
        """What is added to the scores of one row, `[1, vocabulary]`."""
        vocabulary = self._plain[0].model.config.vocabulary_size
        count, numbers = tf.size(ids), tf.size(values)
        rules = [
            rule(
                count == numbers,
                "`bias_ids` and `bias_values` must be as many. Received: {} and {}.",
                count,
                numbers,
            ),
            rule(
                (ids >= 0) & (ids < vocabulary),
                f"`bias_ids` must be from 0 to {vocabulary - 1}. Received: {{}}.",
                ids,
            ),
            rule(tf.math.is_finite(values), "`bias_values` must be finite. Received: {}.", values),
        ]
        ids, values = after(rules, (ids, values))
        return tf.scatter_nd(ids[0][:, None], values[0], [vocabulary])[None]

    def _mask_words(self) -> int:
        return -(-self._plain[0].model.config.vocabulary_size // 32)

    def _trace(self) -> list[tf.TensorSpec]:
        """The specs of the memory, in order."""
        knobs = [tf.TensorSpec(knob.shape[1:], knob.dtype) for knob in KNOBS + FURTHER]
        begin = tf.function(self._begin, autograph=False)
        generator, slots, length = self._plain
        traced = begin.get_concrete_function(tf.TensorSpec([None], tf.int32), *knobs)
        begun = traced.structured_outputs
        state, _, stops, uniform = begun
        shapes = {
            id(state.sequences): [length],
            id(state.log_probabilities.chosen): [length],
            id(state.log_probabilities.top_ids): [length, self._most_alternatives()],
            id(state.log_probabilities.top): [length, self._most_alternatives()],
            id(stops.bytes): [MOST_STOP_STRINGS, LONGEST_STOP_STRING],
            id(stops.lengths): [MOST_STOP_STRINGS],
            id(uniform): [length],
        }

        def spec(tensor: tf.Tensor) -> tf.TensorSpec:
            shape = shapes.get(id(tensor), list(tensor.shape[1:]))
            return tf.TensorSpec([slots, *shape], tensor.dtype)

        cache = self._laid_out(generator.model.make_cache(1, length))
        begun = begun._replace(settings=_without_none(begun.settings))
        specs = tf.nest.map_structure(spec, begun._replace(state=state._replace(cache=cache)))
        self._structure = lambda: specs  # A module would make lists of its own of the lists in it.
        return tf.nest.flatten(specs)

    def _read(self) -> _Memory:
        with tf.control_dependencies([self._check_ready()]):
            return self._packed([variable.read_value() for variable in self.memory])

    def _packed(self, values: list[tf.Tensor | tf.Variable | None]) -> _Memory:
        memory = tf.nest.pack_sequence_as(self._structure(), values)
        return memory._replace(settings=RowSettings(**memory.settings))

    def _specs(self) -> list[list[int]]:
        slots = self._plain[1]
        return [[slots, *variable.shape[1:]] for variable in self.memory]

    def _write(self, memory: _Memory, before: _Memory | None = None) -> None:
        """Writes the memory, but what is the very tensor that was there before."""
        values = memory.flat()
        known = [None] * len(values) if before is None else before.flat()
        for variable, value, old in zip(self.memory, values, known, strict=True):
            if before is None or value is not old:
                variable.assign(value)

    # The functions

    def _reset(self) -> dict[str, tf.Tensor]:
        """Makes the memory, and frees all slots."""
        empty = [
            tf.fill(shape, "") if variable.dtype == tf.string else tf.zeros(shape, variable.dtype)
            for variable, shape in zip(self.memory, self._specs(), strict=True)
        ]
        memory = self._packed(empty)
        ones = tf.ones_like(memory.state.lengths)  # Each row has a token, for it is computed along.
        memory = memory._replace(state=memory.state._replace(lengths=ones, prompt_lengths=ones))
        self._write(memory)
        return self._report(memory)

    def _insert(
        self,
        slot: tf.Tensor,
        token_ids: tf.Tensor,
        max_new_tokens: tf.Tensor,
        temperature: tf.Tensor,
        top_k: tf.Tensor,
        top_p: tf.Tensor,
        min_p: tf.Tensor,
        repetition_penalty: tf.Tensor,
        seed: tf.Tensor,
        stop: tf.Tensor,
        presence_penalty: tf.Tensor,
        frequency_penalty: tf.Tensor,
        min_new_tokens: tf.Tensor,
        bias_ids: tf.Tensor,
        bias_values: tf.Tensor,
    ) -> dict[str, tf.Tensor]:
        """Begins a row in a slot that is free or has ended.

        The slot holds the prompt's tokens but the last already, as `read`, `copy` or an earlier row left
        them; a step reads the last one.
        """
        length = self._plain[2]
        token_ids = tf.ensure_shape(token_ids, [None])
        count, most = tf.size(token_ids), max_new_tokens
        rules = [
            self._check_free(after([self._check_slot(slot)], slot)),
            rule(count >= 1, "A prompt must hold at least one token. Received: an empty prompt."),
            rule(
                (most <= length) & (count <= length - most),
                f"Prompt and `max_new_tokens` together must fit into a slot of {length} tokens. "
                "Received: a prompt of {} tokens, max_new_tokens={}.",
                count,
                most,
            ),
            self._check_ids(token_ids),
            self._check_read(slot, token_ids),
        ]
        slot, token_ids = after(rules, (slot, token_ids))
        drawing = (temperature, top_k, top_p, min_p, repetition_penalty)
        further = (presence_penalty, frequency_penalty, min_new_tokens, bias_ids, bias_values)
        row = self._begin(token_ids, max_new_tokens, *drawing, seed, stop, *further)
        kept = self._packed(self.memory)
        kept = kept._replace(state=kept.state._replace(cache=()))
        written = [
            variable.scatter_update(tf.IndexedSlices(value, slot[None]))
            for variable, value in zip(kept.flat(), row.flat(), strict=True)
        ]
        with tf.control_dependencies(written):
            return self._report(self._read())

    def _read_parts(
        self, slots: tf.Tensor, token_ids: tf.Tensor, counts: tf.Tensor, start: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Reads some tokens of each of some prompts into slots that are free or have ended.

        Args:
            slots: Int32 `[rows]`, which differ. What they hold before `start` must be the prompts'
                beginnings.
            token_ids: Int32 `[rows, longest]`, filled up with any token.
            counts: Int32 `[rows]`, how many tokens of each row count.
            start: Int32 `[]`, the place of the first tokens in their prompts.
        """
        length, (rows, longest) = self._plain[2], tf.unstack(tf.shape(token_ids))
        slots = after([self._check_slot(slots)], slots)
        rules = [
            self._check_free(slots),
            rule(
                tf.size(tf.unique(slots).y) == tf.size(slots), "`slots` must differ. Received: {}.", slots
            ),
            rule(
                (tf.size(slots) == rows) & (tf.size(counts) == rows),
                "`slots` and `counts` must be as many as there are rows. Received: {} and {}.",
                tf.size(slots),
                tf.size(counts),
            ),
            rule(
                (counts >= 1) & (counts <= longest),
                "`counts` must be from 1 to {}, the length of the rows. Received: {}.",
                longest,
                counts,
            ),
            rule(
                (start >= 0) & (start <= length - longest),
                f"Tokens must lie in a slot of {length}. Received: {{}} tokens from {{}} on.",
                longest,
                start,
            ),
            self._check_ids(token_ids),
        ]
        slots, token_ids, counts, start = after(rules, (slots, token_ids, counts, start))
        written = self._read_tokens(slots, token_ids, start)
        places = tf.stack(tf.meshgrid(slots, tf.range(start, start + longest), indexing="ij"), axis=-1)
        written.append(self._packed(self.memory).state.sequences.scatter_nd_update(places, token_ids))
        end = start + counts
        with tf.control_dependencies([*written, *self._hold(slots, end)]):
            return {"num_read": tf.identity(end)}

    def _copy(self, source: tf.Tensor, slot: tf.Tensor, count: tf.Tensor) -> dict[str, tf.Tensor]:
        """Takes over the first tokens of another slot into one that is free or has ended.

        Args:
            source: Int32 `[]`: the other slot, which may be active.
            slot: Int32 `[]`.
            count: Int32 `[]`: how many tokens, less than the other slot has.
        """
        state, length = self._packed(self.memory).state, self._plain[2]
        checked = [self._check_slot(source), self._check_slot(slot)]
        source, slot = after(checked, (source, slot))
        rules = [
            rule(source != slot, "A slot cannot be copied to itself. Received: slot {}.", slot),
            self._check_free(slot),
            rule(
                (count >= 1) & (count <= length),
                f"`count` must be from 1 to {length}. Received: {{}}.",
                count,
            ),
        ]
        source, slot, count = after(rules, (source, slot, count))
        written = []
        variables = (state.sequences, *tf.nest.flatten(state.cache))
        axes = (1, *tf.nest.flatten(self._column_axes(state.cache)))
        for variable, axis in zip(variables, axes, strict=True):
            # Zeros behind, as `read` leaves them.
            row = _columns(variable.sparse_read(source[None]), axis, 0, count)
            row = pad_to(row, tf.constant(length), axis)
            written.append(variable.scatter_update(tf.IndexedSlices(row, slot[None])))
        with tf.control_dependencies([*written, *self._hold(slot[None], count[None])]):
            return {"num_read": tf.identity(count)}

    def _read_tokens(self, slots: tf.Tensor, token_ids: tf.Tensor, start: tf.Tensor) -> list[tf.Operation]:
        """Reads tokens `[rows, count]` into slots' caches; returns what has then been written."""
        generator, _, length = self._plain
        kept = self._packed(self.memory).state.cache
        variables = tf.nest.flatten(kept)
        axes = tf.nest.flatten(self._column_axes(kept))
        rows, count = tf.unstack(tf.shape(token_ids))
        end, is_fresh = start + count, start <= 0

        def known() -> list[tf.Tensor]:
            parts = [variable.sparse_read(slots) for variable in variables]
            return [_columns(part, axis, 0, start) for part, axis in zip(parts, axes, strict=True)]

        def nothing() -> list[tf.Tensor]:
            shapes = [[rows, *variable.shape[1:]] for variable in variables]
            for shape, axis in zip(shapes, axes, strict=True):
                shape[axis] = 0
            return [tf.zeros(s, variable.dtype) for s, variable in zip(shapes, variables, strict=True)]

        before = tf.cond(is_fresh, nothing, known)
        before = [
            tf.ensure_shape(pad_to(part, end, axis), _without_columns(part.shape, axis))
            for part, axis in zip(before, axes, strict=True)
        ]
        _, cache = generator.model(
            token_ids,
            cache=self._laid_out(tf.nest.pack_sequence_as(kept, before)),
            cache_index=start,
            with_head=False,
        )
        read = tf.nest.flatten(self._laid_out(cache))

        def write_whole() -> tf.Operation:
            # Zeros behind, for what an earlier row left there may be no number, which counts though hidden.
            return tf.group(
                *(
                    variable.scatter_update(
                        tf.IndexedSlices(pad_to(part, tf.constant(length), axis), slots)
                    )
                    for variable, part, axis in zip(variables, read, axes, strict=True)
                )
            )

        def write_new() -> tf.Operation:
            new = [_columns(part, axis, start, count) for part, axis in zip(read, axes, strict=True)]

            def write(row: tf.Tensor) -> tf.Tensor:
                updates = []
                for variable, part, axis in zip(variables, new, axes, strict=True):
                    where = [slice(None)] * 4
                    where[axis] = slice(start, end)
                    updates.append(variable[(slots[row], *where[1:])].assign(part[row]))
                with tf.control_dependencies(updates):
                    return row + 1

            first, condition = tf.constant(0), lambda row: row < rows
            return tf.group(tf.while_loop(condition, write, [first], parallel_iterations=1))

        return [tf.cond(is_fresh, write_whole, write_new)]

    def _column_axes(self, cache):
        """Which axis of each part of a cache stands for the places of the text."""
        return [(3, 2) if self._jit_compile else (2, 3) for _ in cache]

    def _hold(self, slots: tf.Tensor, counts: tf.Tensor) -> list[tf.Operation]:
        """Notes that slots hold tokens though they are free.

        A step computes them along: their last token once more at its own place, which changes nothing.
        """
        memory = self._packed(self.memory)
        return [
            variable.scatter_update(tf.IndexedSlices(numbers, slots))
            for variable, numbers in (
                (memory.state.lengths, counts),
                (memory.state.prompt_lengths, counts),
                (memory.settings.max_new_tokens, tf.zeros_like(counts)),
            )
        ]

    def _step(self, steps: tf.Tensor, masked: tf.Tensor, allowed: tf.Tensor) -> dict[str, tf.Tensor]:
        """Makes at most so many tokens for each active slot; one, where it is said which may come."""
        rules = [
            rule(steps >= 1, "`steps` must be at least 1. Received: {}.", steps),
            self._check_slot(masked),
        ]
        message = "`steps` must be 1 where tokens are masked. Received: {}."
        rules.append(rule((steps == 1) | (tf.size(masked) == 0), message, steps))
        count, width = tf.size(masked), tf.shape(allowed)
        message = (
            f"`allowed` must be {self._mask_words()} numbers for each of `masked`. Received: {{}} of {{}}."
        )
        fits = (count == 0) | ((width[0] == count) & (width[1] == self._mask_words()))
        rules.append(rule(fits, message, width[0], width[1]))
        steps, masked, allowed = after(rules, (steps, masked, allowed))
        allowed = self._allowed_of_all(masked, allowed)
        state = self._read().state
        before = state.lengths
        used = tf.reduce_max(tf.where(state.active, tf.range(tf.size(before)) + 1, 0))
        with tf.control_dependencies([before]):
            made = self._advance(used, steps, allowed)
        with tf.control_dependencies([made]):
            memory = self._read()
        texts, state = look_back(self._watch(memory.stops), memory.state.texts, memory.state, before)
        memory, known = memory._replace(state=state._replace(texts=texts)), memory
        self._write(memory, known)
        return self._report(memory)

    def _step_rows(self) -> list[int]:
        """The numbers of first slots that a step is made for, in order."""
        slots = self._plain[1]
        return [*(size for size in _STEP_ROWS if size < slots and self._jit_compile), slots]

    def _allowed_of_all(self, masked: tf.Tensor, allowed: tf.Tensor) -> tf.Tensor:
        """Which tokens may come in each slot, `[slots, vocabulary / 32]`."""
        words = self._mask_words()
        every = tf.fill([self._plain[1], words], -1)
        allowed = tf.reshape(allowed, [tf.size(masked), words])
        return tf.tensor_scatter_nd_update(every, masked[:, None], allowed)

    def _advance(self, used: tf.Tensor, steps: tf.Tensor, allowed: tf.Tensor) -> tf.Tensor:
        """Makes tokens in so many first slots, or in some more: XLA compiles for a few numbers only."""
        sizes = self._step_rows()
        functions = [
            tf.function(decode, autograph=False, jit_compile=self._jit_compile)
            for decode in (functools.partial(self._decode, size) for size in sizes)
        ]
        number = tf.reduce_sum(tf.cast(tf.constant(sizes) < used, tf.int32))
        return tf.switch_case(
            number, [functools.partial(function, steps, allowed) for function in functions]
        )

    def _decode(self, size: int, steps: tf.Tensor, allowed: tf.Tensor) -> tf.Tensor:
        """Makes tokens in the first slots, without a look at the texts, of which XLA knows nothing.

        Args:
            size: How many slots.
            steps: Most tokens for each.
            allowed: Which may come, `[slots, vocabulary / 32]`.

        Returns:
            Int32 `[]`, how many were made.
        """
        whole = [None if part.dtype == tf.string else part.read_value() for part in self.memory]
        memory = self._packed([None if part is None else part[:size] for part in whole])
        # The cache is used where it lies; to take some rows out and put them back would take half a step.
        state = memory.state._replace(cache=self._packed(whole).state.cache)
        memory = memory._replace(state=state)
        settings = memory.settings._replace(allowed=allowed[:size])
        with traced_for_xla() if self._jit_compile else contextlib.nullcontext():
            made = decode(self._plain[0].model, state._replace(texts=()), settings, memory.uniform, steps)
        new = memory._replace(state=made._replace(texts=state.texts)).flat()
        for variable, value, old, all_rows in zip(self.memory, new, memory.flat(), whole, strict=True):
            if value is not old:
                is_whole = size == self._plain[1] or old is all_rows  # the cache
                start = [0] * len(value.shape)
                variable.assign(value if is_whole else ops.slice_update(all_rows, start, value))
        return tf.reduce_sum(made.lengths - state.lengths)

    def _watch(self, stops: StopStrings) -> StopWatch:
        return StopWatch(self._plain[0].tokenizer.decoder, _trimmed(stops), always=True)

    def _free(self, slot: tf.Tensor) -> dict[str, tf.Tensor]:
        """Ends a slot before its time, or forgets what it holds."""
        slot = after([self._check_slot(slot)], slot)
        known = self._read()
        state, settings = known.state, known.settings
        is_freed = tf.range(self._plain[1]) == slot
        state = state._replace(
            active=state.active & ~is_freed,
            lengths=tf.where(is_freed, state.prompt_lengths, state.lengths),
        )
        settings = settings._replace(max_new_tokens=tf.where(is_freed, 0, settings.max_new_tokens))
        memory = known._replace(state=state, settings=settings)
        self._write(memory, known)
        return self._report(memory)

    def _alternatives(self, slot: tf.Tensor) -> dict[str, tf.Tensor]:
        """The likeliest tokens of each place of a slot's new text, `[new tokens, alternatives]`."""
        slot = after([self._check_slot(slot)], slot)
        state = self._read().state
        begin, end = state.prompt_lengths[slot], state.lengths[slot]
        kept = state.log_probabilities
        return {"token_ids": kept.top_ids[slot, begin:end], "logprobs": kept.top[slot, begin:end]}

    def _token_texts(self, token_ids: tf.Tensor) -> dict[str, tf.Tensor]:
        """The bytes that tokens stand for inside of a text, of special ones their names; `[any]`."""
        tokenizer = self._plain[0].tokenizer
        texts = [tokenizer.token_bytes(number) for number in range(tokenizer.vocabulary_size)]
        for token, number in tokenizer.special_tokens.items():
            texts[number] = token.encode()
        ids = tf.where((token_ids >= 0) & (token_ids < len(texts)), token_ids, len(texts))
        return {"text": tf.gather(tf.constant([*texts, b""]), ids)}

    def _encode_chat(self, text: tf.Tensor) -> dict[str, tf.Tensor]:
        """The ids of a rendered chat, `[any]`, with `Shield.MARK` in what is no special token."""
        return {"token_ids": self._plain[0].tokenizer.tokenize_shielded(text[None]).values}

    def _sizes(self) -> dict[str, tf.Tensor]:
        """How many slots, tokens in one and of the vocabulary, alternatives, rows in a step; end tokens."""
        generator, slots, length = self._plain
        numbers = {
            "slots": slots,
            "length": length,
            "vocabulary": generator.model.config.vocabulary_size,
            "alternatives": self._most_alternatives(),
            "step_rows": self._step_rows(),
            "end_ids": list(generator.config.end_ids(generator.tokenizer.eos_id)),
        }
        return {name: tf.constant(number, tf.int32) for name, number in numbers.items()}

    def _check_ids(self, token_ids: tf.Tensor) -> tf.Operation:
        vocabulary = self._plain[0].model.config.vocabulary_size
        return rule(
            (token_ids >= 0) & (token_ids < vocabulary),
            f"Token ids must be from 0 to {vocabulary - 1}. Received: {{}}.",
            token_ids,
        )

    def _check_ready(self) -> tf.Operation:
        return rule(
            tf.shape(self.memory[0])[0] == self._plain[1],
            "The slots must be made by `reset` before they are used.",
        )

    def _check_free(self, slots: tf.Tensor) -> tf.Operation:
        with tf.control_dependencies([self._check_ready()]):
            active = self._packed(self.memory).state.active.read_value()
        is_free = ~tf.gather(active, slots)
        return rule(is_free, "A slot must be free or have ended. Received: slot {}.", slots)

    def _check_read(self, slot: tf.Tensor, token_ids: tf.Tensor) -> tf.Operation:
        """Checks that a slot was given a prompt's tokens but the last."""
        with tf.control_dependencies([self._check_ready(), self._check_slot(slot)]):
            held = self._packed(self.memory).state.sequences.read_value()[slot]
        known = token_ids[: self._plain[2]][:-1]
        message = "The slot must hold the prompt, but for its last token. Received: slot {}."
        return rule(held[: tf.size(known)] == known, message, slot)

    def _check_slot(self, slot: tf.Tensor) -> tf.Operation:
        last = self._plain[1] - 1
        return rule((slot >= 0) & (slot <= last), f"`slot` must be from 0 to {last}. Received: {{}}.", slot)

    def _report(self, memory: _Memory) -> dict[str, tf.Tensor]:
        state, settings = memory.state, memory.settings
        counts = state.lengths - state.prompt_lengths
        has_ended = ~state.active & (settings.max_new_tokens > 0)  # 0: the slot is free
        rows = self._watch(memory.stops).finish(state)
        columns = tf.range(tf.reduce_max(counts))[None]
        places = tf.minimum(state.prompt_lengths[:, None] + columns, tf.shape(state.sequences)[1] - 1)
        is_new = columns < counts[:, None]
        ids = tf.where(is_new, tf.gather(state.sequences, places, batch_dims=1), -1)
        logprobs = tf.gather(state.log_probabilities.chosen, places, batch_dims=1)
        end = tf.where(rows.end < 0, tf.strings.length(rows.text), rows.end)
        is_stopped = (rows.end >= 0) | (counts < settings.max_new_tokens)
        whole = tf.strings.substr(rows.text, tf.zeros_like(end), end)
        return {
            "active": state.active,
            "num_tokens": counts,
            "token_ids": ids,
            "logprobs": tf.where(is_new, logprobs, 0.0),
            "text": tf.where(has_ended, whole, tf.where(state.active, state.texts.text, "")),
            "finish_reason": tf.where(has_ended, tf.where(is_stopped, "stop", "length"), ""),
        }


def _trimmed(stops: StopStrings) -> StopStrings:
    """Without what no row uses."""
    count = tf.maximum(tf.reduce_max(tf.reduce_sum(tf.cast(stops.lengths > 0, tf.int32), axis=1)), 1)
    longest = tf.maximum(tf.reduce_max(stops.lengths), 1)
    return StopStrings(stops.bytes[:, :count, :longest], stops.lengths[:, :count])


def _columns(tensor: tf.Tensor, axis: int, begin: tf.Tensor | int, size: tf.Tensor) -> tf.Tensor:
    where, sizes = [0] * len(tensor.shape), [-1, *tensor.shape[1:]]
    where[axis], sizes[axis] = begin, size
    return tf.slice(tensor, where, sizes)


def _without_columns(shape: tf.TensorShape, axis: int) -> list[int | None]:
    return [None if number == axis else size for number, size in enumerate(shape)]


def _without_none(settings: RowSettings) -> dict[str, tf.Tensor]:
    return {name: value for name, value in settings._asdict().items() if value is not None}
