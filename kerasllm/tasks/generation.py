"""What the tasks that write text have in common."""

import contextlib
import dataclasses
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kerasllm.checkpoints import Checkpoint
from kerasllm.generation import Completion, ConstraintFactory, Engine, GenerationConfig, Row, run, run_beams
from kerasllm.models import LanguageModel
from kerasllm.tasks.base import Task, require_tensorflow
from kerasllm.tokenizers import Tokenizer

Prompt = str | Sequence[int] | np.ndarray

_HALF_PAIR = re.compile("[\ud800-\udfff]")
# What transformers calls settings that are here under another name.
_OTHER_NAMES = {
    "do_sample": "`temperature`, 0 to draw nothing",
    "max_length": "`max_new_tokens`, which does not count the prompt",
    "min_length": "`min_new_tokens`, which does not count the prompt",
    "num_return_sequences": "`n`",
    "streamer": "`stream=True`",
}


class GeneratingTask(Task):
    """A task that generates text.

    Args:
        model: The network.
        tokenizer: The tokenizer; without one, only token ids go in and out.
        generation_config: How to generate when the caller does not say.
    """

    # Whether what is generated goes on where the prompt ends, or is an answer of its own.
    continues_prompts = True

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ):
        super().__init__(model, tokenizer, **kwargs)
        self.generation_config = generation_config or GenerationConfig()
        self._engine: Engine | None = None
        self._constraint_factories: dict = {}

    # Files

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "generation_config": dataclasses.asdict(self.generation_config)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GeneratingTask":
        generation = GenerationConfig(**config["generation_config"])
        return super().from_config({**config, "generation_config": generation})

    def _generation_settings(self) -> dict[str, Any]:
        eos_id = None if self.tokenizer is None else self.tokenizer.eos_id
        return self.generation_config.to_huggingface(eos_id)

    @classmethod
    def _from_checkpoint(cls, checkpoint: Checkpoint) -> "GeneratingTask":
        config = GenerationConfig.from_huggingface(checkpoint.generation)
        tokenizer = checkpoint.tokenizer
        if tokenizer is not None and config.eos_token_id == (tokenizer.eos_id,):
            config = dataclasses.replace(config, eos_token_id=None)  # nothing but what goes without saying
        return cls(checkpoint.model, tokenizer, config)

    # Generation

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        *,
        n: int = 1,
        stream: bool = False,
        **settings,
    ) -> str | list[str] | list[list[str]] | Iterator[str] | Iterator[tuple[int, str]]:
        """Generates text from one prompt or several.

        Args:
            prompts: A text, or token ids (a list or an array), or several of these. They may differ in
                length; each result is what the prompt alone would give. A special token or a chat's mark
                that is spelled out in a text is plain text there, for prompts are not trusted; messages
                are for `chat`.
            max_new_tokens: Most tokens to generate. None: the config's number, or less where the
                context ends before.
            n: How many results for each prompt: as many draws, or the best beams of a beam search.
            stream: Whether to return the text in pieces as it comes.
            **settings: Fields of `GenerationConfig`; what is not given, or None, comes from
                `generation_config`. `seed` may be a list with a number for each prompt. And at most one
                of the following, which the texts then keep to if `max_new_tokens` leaves room to end
                (see `generate_tokens` for how to tell):
                `json_schema`: a JSON schema, as a dictionary or text;
                `regex`: a regular expression that all of the text matches;
                `grammar`: a grammar in Lark's syntax;
                `choices`: a list of texts, of which the result is one;
                `constraints`: for each prompt one of these by its name, such as `{"regex": "[0-9]+"}`,
                or None.
                And `assistant_model`: a smaller task with the same vocabulary that guesses tokens for
                this one to check, which is faster and changes no result.

        Returns:
            The text without the prompt and without special tokens: a string for one prompt, a list for
            several; with `n` above 1 a list of `n` for each prompt. With `stream`, an iterator of
            pieces of text, for several prompts or results of pairs (number of the result, piece).

        Raises:
            ValueError: If a prompt is empty or does not fit into the context, or a setting is out of
                range.
        """
        prompts = _to_python(prompts)
        single = _is_single(prompts)
        generation = self._generation(prompts, max_new_tokens, n=n, stream=stream, **settings)
        self._require_tokenizer()
        if stream:
            pieces = ((row, piece) for row, piece in generation if piece)
            return (piece for _, piece in pieces) if single and n == 1 else pieces
        texts = [completion.text for completion in _finish(generation)]
        if n > 1:
            texts = [texts[start : start + n] for start in range(0, len(texts), n)]
        return texts[0] if single else texts

    def generate_tokens(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        *,
        n: int = 1,
        logprobs: int | None = None,
        **settings,
    ) -> list[Completion]:
        """As `generate`, but says more of each result.

        Args:
            prompts, max_new_tokens, n, **settings: As in `generate`.
            logprobs: How many alternatives to give the log-probabilities of, besides that of the tokens
                themselves; None: none at all.

        Returns:
            A `Completion` for each result: text, token ids, why it ended, log-probabilities. The `n` of
            one prompt follow each other.
        """
        prompts = _to_python(prompts)
        return _finish(self._generation(prompts, max_new_tokens, n=n, logprobs=logprobs, **settings))

    def _generation(
        self,
        prompts,
        max_new_tokens=None,
        *,
        n=1,
        stream=False,
        logprobs=None,
        json_schema=None,
        regex=None,
        grammar=None,
        choices=None,
        constraints=None,
        assistant_model=None,
        **settings,
    ) -> Generator[tuple[int, str], None, list[Completion]]:
        prompts = [prompts] if _is_single(prompts) else list(prompts)
        if n < 1 or (logprobs is not None and logprobs < 0):
            raise ValueError(
                "`n` must be at least 1, and `logprobs` at least 0 or None. "
                f"Received: n={n}, logprobs={logprobs}"
            )
        configs = self._configs(len(prompts), max_new_tokens, settings)
        ids = self._encode_prompts(prompts)
        starts = self._starts(ids)
        rows = [
            Row(
                start,
                self._fit(config, start, max_new_tokens),
                self._end_ids(config),
                continues_text=self.continues_prompts,
            )
            for start, config in zip(starts, configs, strict=True)
        ]
        if assistant_model is not None and any(config.prompt_lookup_num_tokens for config in configs):
            raise ValueError(
                "Guesses come from an `assistant_model` or from the text. Received both: "
                "prompt_lookup_num_tokens is not 0"
            )
        given = {"json_schema": json_schema, "regex": regex, "grammar": grammar, "choices": choices}
        wanted = self._wanted_constraints(len(prompts), given, constraints)
        if configs[0].num_beams > 1:
            unused = {"stream": stream, "logprobs": logprobs is not None, "constraints": any(wanted)}
            unused["assistant_model"] = assistant_model is not None
            if n > configs[0].num_beams or any(unused.values()):
                raise ValueError(
                    f"A beam search has at most `num_beams` results and none of {list(unused)}. Received: "
                    f"num_beams={configs[0].num_beams}, n={n}, {[k for k, v in unused.items() if v]}"
                )
            return _beams(self._get_engine(), self.tokenizer, rows, n, self._extra(ids))
        if n > 1 and not all(config.temperature > 0 for config in configs):
            raise ValueError(
                "`n` results that differ need a temperature above 0 or a beam search. "
                f"Received: n={n}, temperature={configs[0].temperature}"
            )
        rows = [dataclasses.replace(row, copy=copy) for row in rows for copy in range(n)]
        return run(
            self._get_engine(),
            self.tokenizer,
            rows,
            constraints=self._make_constraints(rows, wanted, n),
            logprobs=logprobs,
            stream=stream,
            extra=self._extra([row for row in ids for _ in range(n)]),
            draft=self._draft(assistant_model),
        )

    # What a kind of task may change

    def _encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt; text that looks like a special token is not one."""
        if not prompts or not all(_is_prompt(prompt) for prompt in prompts):
            raise ValueError(
                f"`prompts` must be one text or a list of texts, or token ids. Received: {prompts!r}"
            )
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if halves := [text for text in texts if _HALF_PAIR.search(text)]:
            raise ValueError(f"A text must not hold half of a surrogate pair. Received: {halves[0]!r}")
        encoded = iter(self._encode_texts(texts) if texts else ())
        return [next(encoded) if isinstance(prompt, str) else list(prompt) for prompt in prompts]

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        """With the special tokens that the tokenizer puts around a text, such as one at its beginning."""
        return self._require_tokenizer().encode(texts, add_special_tokens=True)

    def _starts(self, prompts: list[list[int]]) -> list[list[int]]:
        """What the generated tokens follow."""
        return prompts

    def _extra(self, prompts: list[list[int]]) -> Mapping[str, Any]:
        """Further tensors `[rows, ...]` for each call of the model."""
        return {}

    # The parts of a call

    def _draft(self, assistant_model: Task | None) -> LanguageModel | None:
        if assistant_model is None:
            return None
        if not isinstance(assistant_model, GeneratingTask):
            raise TypeError(
                "`assistant_model` must be a task that generates, such as CausalLM.from_pretrained gives. "
                f"Received: {assistant_model!r}"
            )
        own, other = self._require_tokenizer(), assistant_model._require_tokenizer()
        if own is not other and not _same_tokens(own, other):
            raise ValueError(
                "`assistant_model` must have the same tokens with the same ids. Received: a tokenizer of "
                f"{other.vocabulary_size} tokens beside one of {own.vocabulary_size}, or unlike tokens"
            )
        return assistant_model.model

    def _get_engine(self) -> Engine:
        require_tensorflow("Generating text")
        if self._engine is None or self._engine.model is not self.model:
            self._engine = Engine(self.model)
        return self._engine

    @contextlib.contextmanager
    def decoding_compiled(self, jit_compile: bool) -> Iterator[None]:
        """While this is open, XLA compiles the decoding, or does not, whatever the size of the model.

        Args:
            jit_compile: Whether it does.
        """
        before, self._engine = self._engine, Engine(self.model, jit_compile)
        try:
            yield
        finally:
            self._engine = before

    def _configs(self, count: int, max_new_tokens, settings) -> list[GenerationConfig]:
        """A configuration for each prompt."""
        names = {field.name for field in dataclasses.fields(GenerationConfig)}
        if unknown := sorted(set(settings) - names):
            hints = [f"for `{name}`: {_OTHER_NAMES[name]}" for name in unknown if name in _OTHER_NAMES]
            hint = f" ({'; '.join(hints)})" if hints else ""
            raise TypeError(f"The settings are {sorted(names)}. Received: {unknown}{hint}")
        given = {name: value for name, value in settings.items() if value is not None}
        if given.get("num_beams", 1) > 1 or given.get("penalty_alpha", 0) > 0:
            given.setdefault("temperature", 0)  # Whoever asks for these wants nothing drawn.
        if max_new_tokens is not None:
            given["max_new_tokens"] = max_new_tokens
        seeds = given.pop("seed", self.generation_config.seed)
        config = dataclasses.replace(self.generation_config, **given)
        if config.temperature == 0 and config.penalty_alpha == 0 and "temperature" not in given:
            neutral = GenerationConfig()
            names = [name for name in ("top_k", "top_p", "min_p", "typical_p") if name in given]
            if idle := {name: given[name] for name in names if given[name] != getattr(neutral, name)}:
                raise ValueError(
                    "These choose among tokens that are drawn, which needs a `temperature` above 0. "
                    f"Received: {idle}, temperature=0"
                )
        seeds = _to_python(seeds)
        seeds = seeds if isinstance(seeds, list) else [seeds] * count
        if len(seeds) != count:
            raise ValueError(
                f"`seed` must be one number, or one for each prompt. Received: {len(seeds)} seeds, "
                f"{count} prompts"
            )
        return [dataclasses.replace(config, seed=seed) for seed in seeds]

    def _fit(self, config: GenerationConfig, start: list[int], max_new_tokens) -> GenerationConfig:
        """Lowers a `max_new_tokens` that the caller did not choose to what the context has room for."""
        room = self.model.config.context_length - len(start)
        if max_new_tokens is not None or not 0 < room < config.max_new_tokens:
            return config
        return dataclasses.replace(
            config, max_new_tokens=room, min_new_tokens=min(room, config.min_new_tokens)
        )

    def _end_ids(self, config: GenerationConfig) -> tuple[int, ...]:
        return config.end_ids(None if self.tokenizer is None else self.tokenizer.eos_id)

    @staticmethod
    def _wanted_constraints(count: int, given: dict[str, Any], constraints):
        """A pair (kind, value) for each prompt, or None."""
        named = [(kind, value) for kind, value in given.items() if value is not None]
        if len(named) + (constraints is not None) > 1:
            raise ValueError(
                f"At most one of {[*given, 'constraints']} may be given. Received: {[k for k, _ in named]}"
            )
        if constraints is None:
            return [named[0] if named else None] * count
        if len(constraints) != count or any(c is not None and len(c) != 1 for c in constraints):
            raise ValueError(
                '`constraints` must hold for each prompt None or one such as {"regex": "…"}. '
                f"Received: {count} prompts, constraints={constraints!r}"
            )
        return [None if c is None else next(iter(c.items())) for c in constraints]

    def _make_constraints(self, rows: Sequence[Row], wanted, n: int):
        """A new constraint for each row, or None where no row has one."""
        if not any(wanted):
            return None
        tokenizer, vocabulary = self._require_tokenizer(), self.model.config.vocabulary_size
        made = []
        for number, row in enumerate(rows):
            if (one := wanted[number // n]) is None:
                made.append(None)
                continue
            key = (id(tokenizer), row.end_ids)
            if key not in self._constraint_factories:
                self._constraint_factories[key] = ConstraintFactory(tokenizer, row.end_ids, vocabulary)
            made.append(self._constraint_factories[key].make(*one))
        return made


def _same_tokens(first: Tokenizer, second: Tokenizer) -> bool:
    if first.vocabulary_size != second.vocabulary_size:
        return False
    return all(first.id_to_token(id) == second.id_to_token(id) for id in range(first.vocabulary_size))


def _to_python(values):
    """Arrays and tensors of prompts or seeds, also in a list, and NumPy's numbers, as Python's."""
    if isinstance(values, list | tuple):
        return [_to_python(value) for value in values]
    if isinstance(values, np.ndarray | np.integer | tf.Tensor):
        return np.asarray(values).tolist()
    return values


def _is_single(prompts) -> bool:
    """Whether this is one prompt: a text, or token ids."""
    if not isinstance(prompts, Sequence):
        raise TypeError(f"`prompts` must be one text, a list of texts, or token ids. Received: {prompts!r}")
    return isinstance(prompts, str) or (len(prompts) > 0 and not isinstance(prompts[0], (str, list, tuple)))


def _is_prompt(prompt) -> bool:
    return isinstance(prompt, str) or (
        isinstance(prompt, (list, tuple)) and all(isinstance(id, int) for id in prompt)
    )


def _beams(engine, tokenizer, rows, count, extra) -> Generator[tuple[int, str], None, list[Completion]]:
    """A beam search as a generation that has nothing to say before its end."""
    yield from ()
    return run_beams(engine, tokenizer, rows, count, extra)


def _finish(generation: Generator[Any, None, list[Completion]]) -> list[Completion]:
    """Lets a generation run to its end."""
    while True:
        try:
            next(generation)
        except StopIteration as end:
            return end.value
