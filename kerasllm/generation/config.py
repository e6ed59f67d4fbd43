"""The settings of a generation, with Hugging Face's names."""

import dataclasses
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# What Hugging Face takes for settings that a file with `do_sample` leaves out.
_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
# Settings that only count where tokens are drawn.
_SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "typical_p")
# Settings that are not offered, with the values at which they do nothing.
_NEUTRAL = {
    "begin_suppress_tokens": ([],),
    "diversity_penalty": (0.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
}
# Names that do not change the tokens, or are looked at elsewhere.
_WITHOUT_EFFECT = frozenset(
    "_from_model_config assistant_confidence_threshold bos_token_id cache_implementation chat_format "
    "decoder_start_token_id do_sample low_memory max_length max_matching_ngram_size "
    "num_assistant_tokens_schedule output_attentions output_hidden_states output_logits output_scores "
    "pad_token_id return_dict_in_generate token_healing transformers_version use_cache".split()
)


def _at_least(minimum: float) -> tuple[str, Callable[[Any], bool]]:
    return f"must be at least {minimum}", lambda value: minimum <= value < math.inf


_FINITE = ("must be a finite number", math.isfinite)
_FRACTION = ("must be above 0 and at most 1", lambda value: 0 < value <= 1)
_RULES = {
    "max_new_tokens": _at_least(1),
    "min_new_tokens": _at_least(0),
    "temperature": _at_least(0),
    "top_k": _at_least(0),
    "top_p": _FRACTION,
    "min_p": ("must be at least 0 and at most 1", lambda value: 0 <= value <= 1),
    "typical_p": _FRACTION,
    "repetition_penalty": ("must be above 0", lambda value: 0 < value < math.inf),
    "presence_penalty": _FINITE,
    "frequency_penalty": _FINITE,
    "no_repeat_ngram_size": _at_least(0),
    "num_beams": _at_least(1),
    "length_penalty": _FINITE,
    "penalty_alpha": ("must be at least 0 and at most 1", lambda value: 0 <= value <= 1),
    "prompt_lookup_num_tokens": _at_least(0),
    "num_assistant_tokens": _at_least(1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a model continues a prompt when the caller does not say.

    The scores of the next token are changed in Hugging Face's order: logit bias, repetition penalty,
    presence and frequency penalty, n-grams, suppressed tokens, end tokens before `min_new_tokens`, then
    where tokens are drawn temperature, top-k, top-p, min-p, typical. Equal scores count as if the lower
    id were the likelier.

    Args:
        max_new_tokens: Most tokens to generate.
        min_new_tokens: No end token before so many new tokens.
        temperature: 0 takes the most likely token each time; above 0 the scores are divided by it and a
            token is drawn.
        top_k: Draw among this many most likely tokens only; 0: among all. In contrastive search the
            number of candidates.
        top_p: Draw among the fewest most likely tokens whose probabilities reach this sum (Holtzman et
            al., "The Curious Case of Neural Text Degeneration", 2019).
        min_p: Draw among the tokens at least this likely, as a fraction of the likeliest's probability
            (Nguyen et al., "Turning Up the Heat", 2024).
        typical_p: Draw among the tokens whose surprise is nearest to the entropy, the fewest that reach
            this sum (Meister et al., "Locally Typical Sampling", 2022).
        repetition_penalty: Scores of tokens in the text so far, prompt included, are divided by it where
            they are positive and multiplied where negative (Keskar et al., "CTRL", 2019); 1: off.
        presence_penalty: Subtracted from the score of each token among the new ones.
        frequency_penalty: Subtracted once for each time a token is among the new ones.
        no_repeat_ngram_size: No sequence of so many tokens occurs twice; 0: off.
        logit_bias: Token id to a number that is added to its score.
        suppress_tokens: Ids that are never generated.
        eos_token_id: Ids that end a text. None: the tokenizer's end token; (): none.
        stop_token_ids: Ids that end a text besides.
        stop_strings: A text ends before the first of these.
        num_beams: Beams of a beam search; 1: no beam search.
        length_penalty: A beam's score is its log-probability divided by its length to this power.
        early_stopping: When a beam search ends, as in transformers: True: as soon as there are
            `num_beams` finished texts; False: when better ones are unlikely; "never": when there can be
            no better ones.
        penalty_alpha: Weight of the degeneration penalty of contrastive search (Su et al., "A
            Contrastive Framework for Neural Text Generation", 2022); 0: no contrastive search.
        prompt_lookup_num_tokens: Guess so many tokens at a time from what followed the last tokens
            earlier in the text, and check them in one step: faster where the text repeats its prompt,
            with the same result; 0: off.
        num_assistant_tokens: How many tokens a draft model guesses at a time.
        seed: Start of the random numbers; the same seed draws the same tokens.

    Raises:
        ValueError: If a value is out of range.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()
    eos_token_id: tuple[int, ...] | int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    penalty_alpha: float = 0.0
    prompt_lookup_num_tokens: int = 0
    num_assistant_tokens: int = 5
    seed: int = 0

    def __post_init__(self):
        self._put("logit_bias", _read_bias(self.logit_bias))
        self._put("stop_strings", _tuple_of(str, "stop_strings", self.stop_strings))
        for name in ("suppress_tokens", "stop_token_ids"):
            self._put(name, _tuple_of(int, name, getattr(self, name)))
        if self.eos_token_id is not None:
            self._put("eos_token_id", _tuple_of(int, "eos_token_id", self.eos_token_id))
        for name, (rule, holds) in _RULES.items():
            value, kind = getattr(self, name), type(getattr(type(self), name))
            if kind is int:
                self._put(name, value := _integer(name, value))
            try:
                valid = bool(holds(value))
            except TypeError:
                valid = False
            if not valid:
                raise ValueError(f"`{name}` {rule}. Received: {name}={value!r}")
        self._put("seed", _integer("seed", self.seed))
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ValueError(
                f'`early_stopping` must be True, False or "never". Received: {self.early_stopping!r}'
            )
        if "" in self.stop_strings:
            raise ValueError(f"`stop_strings` must not be empty. Received: {self.stop_strings!r}")
        self._check_combination()

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_combination(self) -> None:
        """Refuses settings of which one would be ignored for the other."""
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                "`min_new_tokens` must be at most `max_new_tokens`. Received: "
                f"{self.min_new_tokens} and {self.max_new_tokens}"
            )
        modes = {
            "num_beams": self.num_beams > 1,
            "penalty_alpha": self.penalty_alpha > 0,
            "prompt_lookup_num_tokens": self.prompt_lookup_num_tokens > 0,
        }
        chosen = [name for name, is_on in modes.items() if is_on]
        if len(chosen) > 1:
            raise ValueError(f"These exclude each other: {sorted(modes)}. Received: {chosen}")
        if chosen and chosen != ["prompt_lookup_num_tokens"] and self.temperature > 0:
            raise ValueError(
                f"`{chosen[0]}` needs temperature=0, for nothing is drawn. "
                f"Received: temperature={self.temperature}"
            )
        if self.num_beams > 1 and self.stop_strings:
            raise ValueError(
                "A beam search has no `stop_strings`. "
                f"Received: num_beams={self.num_beams}, stop_strings={self.stop_strings}"
            )
        if self.penalty_alpha > 0 and self.top_k < 1:
            raise ValueError(
                "`penalty_alpha` needs `top_k`, the number of candidates. Received: "
                f"penalty_alpha={self.penalty_alpha}, top_k={self.top_k}"
            )

    def end_ids(self, eos_id: int | None) -> tuple[int, ...]:
        """Returns the ids that end a text.

        Args:
            eos_id: The tokenizer's end token, or None.
        """
        own = self.eos_token_id
        if own is None:
            own = () if eos_id is None else (eos_id,)
        return tuple(dict.fromkeys(own + self.stop_token_ids))

    def to_huggingface(self, eos_id: int | None) -> dict[str, Any]:
        """Returns the content of a `generation_config.json`.

        Args:
            eos_id: Id of the token that ends a text where the config does not say, or None.

        Returns:
            A dictionary that transformers reads.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # What is written always, and besides what differs from its default.
        always = {"max_new_tokens", "seed", "temperature", "top_k", "top_p"}
        default = GenerationConfig()
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if name in always or value != getattr(default, name)
        }
        if self.eos_token_id is not None:
            eos_id = self.eos_token_id[0] if len(self.eos_token_id) == 1 else list(self.eos_token_id)
        if "logit_bias" in values:
            bias = values.pop("logit_bias")
            values["sequence_bias"] = [[[token], number] for token, number in bias.items()]
        return {
            **values,
            "do_sample": self.temperature > 0,
            "eos_token_id": eos_id,
            "temperature": self.temperature or 1.0,
        }

    @classmethod
    def from_huggingface(cls, values: Mapping[str, Any]) -> "GenerationConfig":
        """Reads the content of a `generation_config.json`; what is not there has its default.

        `max_length` is left out: it is transformers' 20 tokens or the context, prompt included.

        Args:
            values: The parsed file.

        Returns:
            The config. Of a file that asks for beams of drawn tokens, which are not offered, one that
            draws without beams; a warning says so.

        Raises:
            ValueError: If the file asks for something else that would change the tokens and is not
                offered.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in values.items() if value is not None}
        known = {name: given.pop(name) for name in names & set(given)}
        if words := given.pop("bad_words_ids", None):
            if any(len(word) != 1 for word in words):
                raise ValueError(
                    "`bad_words_ids` of a generation_config.json must be single tokens. "
                    f"Received: {words!r}"
                )
            known["suppress_tokens"] = [*known.get("suppress_tokens", ()), *(word[0] for word in words)]
        if biases := given.pop("sequence_bias", None):
            pairs = list(biases.items()) if isinstance(biases, Mapping) else biases
            if any(len(tokens) != 1 for tokens, _ in pairs):
                raise ValueError(
                    "`sequence_bias` of a generation_config.json must be of single tokens. "
                    f"Received: {biases!r}"
                )
            known["logit_bias"] = {tokens[0]: number for tokens, number in pairs}
        for name, value in given.items():
            if name not in _WITHOUT_EFFECT and value not in _NEUTRAL.get(name, ()):
                raise ValueError(
                    "A generation_config.json must not ask for what is not offered here. "
                    f"Received: {name}={value!r}"
                )
        if given.get("do_sample", False):
            known = {**_SAMPLING_DEFAULTS, **known}
            known.pop("penalty_alpha", None)  # transformers does not look at it either
            beams = known.get("num_beams")
            if isinstance(beams, int) and beams > 1:
                del known["num_beams"]
                warnings.warn(
                    "A generation_config.json asks for beams of drawn tokens, which are not offered here: "
                    "tokens are drawn, and `num_beams` is left out. "
                    f"Received: do_sample=True, num_beams={beams}",
                    stacklevel=2,
                )
        else:  # then transformers looks at none of them, but for contrastive search's candidates
            for name in _SAMPLING_NAMES:
                if name != "top_k" or not known.get("penalty_alpha"):
                    known.pop(name, None)
        return cls(**known)


def _integer(name: str, value: Any) -> int:
    """A whole number of any kind, NumPy's too, as the tensors hold them."""
    number = _whole_number(value)
    if number is None or not -(2**31) <= number < 2**31:
        raise ValueError(f"`{name}` must be an integer of 32 bits. Received: {name}={value!r}")
    return number


def _whole_number(value: Any) -> int | None:
    """Python's integer for one of any kind; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _tuple_of(kind: type, name: str, values: Any) -> tuple:
    """One value or several as a tuple."""
    read = _whole_number if kind is int else _text
    is_sequence = isinstance(values, Iterable) and not isinstance(values, (str, bytes))
    several = [values] if read(values) is not None or not is_sequence else values
    result = tuple(map(read, several))
    if None in result:
        raise ValueError(f"`{name}` must hold {kind.__name__} values. Received: {name}={values!r}")
    if kind is int and any(value < 0 for value in result):
        raise ValueError(f"`{name}` must hold ids, which are not negative. Received: {name}={values!r}")
    return result


def _read_bias(bias: Mapping | None) -> dict[int, float] | None:
    if not bias:
        return None
    try:
        read = {int(token): float(number) for token, number in bias.items()}
    except (AttributeError, TypeError, ValueError):
        read = {-1: 0.0}
    if any(token < 0 or math.isnan(number) or number == math.inf for token, number in read.items()):
        raise ValueError(f"`logit_bias` must map token ids to numbers. Received: logit_bias={bias!r}")
    return read
