"""The settings of a generation, with Hugging Face's names."""

import dataclasses
from typing import Any

# What Hugging Face takes for settings that a file with `do_sample` leaves out.
_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
# Settings that are not offered, with the value at which they do nothing.
_NEUTRAL = {
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "repetition_penalty": 1.0,
    "typical_p": 1.0,
}
# Names that do not change the tokens, or are looked at elsewhere (the end token).
_WITHOUT_EFFECT = frozenset(
    "_from_model_config bos_token_id do_sample early_stopping eos_token_id output_attentions "
    "output_hidden_states output_scores pad_token_id return_dict_in_generate transformers_version "
    "use_cache".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a model continues a prompt when the caller does not say.

    Args:
        max_new_tokens: Most tokens to generate.
        temperature: 0 takes the most likely token each time; above 0 the scores are divided by it and a
            token is drawn.
        top_k: Draw among this many most likely tokens only; 0: among all.
        top_p: Draw among the fewest most likely tokens whose probabilities reach this sum.
        seed: Start of the random numbers; the same seed draws the same tokens.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        rules = {
            "max_new_tokens": ("must be at least 1", self.max_new_tokens >= 1),
            "temperature": ("must be at least 0", self.temperature >= 0),
            "top_k": ("must be at least 0", self.top_k >= 0),
            "top_p": ("must be above 0 and at most 1", 0 < self.top_p <= 1),
        }
        for name, (rule, holds) in rules.items():
            if not holds:
                raise ValueError(f"`{name}` {rule}. Received: {name}={getattr(self, name)}")

    def to_huggingface(self, eos_id: int | None) -> dict[str, Any]:
        """Returns the content of a `generation_config.json`.

        Args:
            eos_id: Id of the token that ends a text, or None.

        Returns:
            A dictionary that transformers reads.
        """
        return {
            "do_sample": self.temperature > 0,
            "eos_token_id": eos_id,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "temperature": self.temperature or 1.0,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }

    @classmethod
    def from_huggingface(cls, values: dict[str, Any]) -> "GenerationConfig":
        """Reads the content of a `generation_config.json`; what is not there has its default.

        Args:
            values: The parsed file.

        Returns:
            The config.

        Raises:
            ValueError: If the file asks for something that would change the tokens and is not offered.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in values.items() if value is not None}
        for name, value in given.items():
            neutral = _NEUTRAL.get(name, value if name in names | _WITHOUT_EFFECT else None)
            if value != neutral:
                raise ValueError(
                    "A generation_config.json must not ask for what is not offered here. "
                    f"Received: {name}={value!r}"
                )
        known = {name: given[name] for name in names & set(given)}
        if given.get("do_sample", False):
            known = {**_SAMPLING_DEFAULTS, **known}
        else:
            known["temperature"] = 0.0
        return cls(**known)
