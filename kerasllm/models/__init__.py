"""Model families: one file each with its configuration, model and the names of Hugging Face."""

from typing import Any

from kerasllm.models.base import DecoderModel, LanguageModel, ModelConfig
from kerasllm.models.bert import Bert, BertConfig
from kerasllm.models.gpt2 import GPT2, GPT2Config
from kerasllm.models.llama import Llama, LlamaConfig
from kerasllm.models.t5 import T5, T5Config

FAMILIES: tuple[type[LanguageModel], ...] = (GPT2, Llama, Bert, T5)
# The only registry: a Hugging Face `model_type` to the family that loads it.
MODELS: dict[str, type[LanguageModel]] = {
    model_type: family for family in FAMILIES for model_type in family.config_class.dialects
}


def find_model_class(values: dict[str, Any]) -> type[LanguageModel]:
    """Finds the family of a Hugging Face `config.json`.

    Args:
        values: The parsed file.

    Returns:
        The class of the family.

    Raises:
        ValueError: If the `model_type` is not one of `MODELS`.
    """
    if (model_type := values.get("model_type")) not in MODELS:
        raise ValueError(f"`model_type` must be one of {sorted(MODELS)}. Received: {model_type!r}")
    return MODELS[model_type]


def find_head(values: dict[str, Any]) -> str | None:
    """Finds the head that a Hugging Face `config.json` names among its `architectures`.

    Args:
        values: The parsed file.

    Returns:
        The head; the family's default where the file names no architecture.

    Raises:
        ValueError: If the architecture is not one that the family loads.
    """
    family = find_model_class(values)
    architectures = values.get("architectures") or []
    known = family.config_class.dialects[values["model_type"]].architectures
    for head, architecture in known.items():
        if architecture in architectures:
            return head
    if architectures:
        raise ValueError(
            f"`architectures` of a {values['model_type']} must be one of {sorted(known.values())}. "
            f"Received: {architectures!r}"
        )
    return family.heads[0]


__all__ = [
    "FAMILIES",
    "GPT2",
    "MODELS",
    "T5",
    "Bert",
    "BertConfig",
    "DecoderModel",
    "GPT2Config",
    "LanguageModel",
    "Llama",
    "LlamaConfig",
    "ModelConfig",
    "T5Config",
    "find_head",
    "find_model_class",
]
