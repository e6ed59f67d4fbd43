"""The settings of a generation, with Hugging Face's names."""

import dataclasses
from typing import Any


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
        """Reads the content of a `generation_config.json`; fields that are not there keep defaults.

        Args:
            values: The parsed file.

        Returns:
            The config.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: values[name] for name in names & set(values) if values[name] is not None}
        if not values.get("do_sample", False):
            known["temperature"] = 0.0
        return cls(**known)
