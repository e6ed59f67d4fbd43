"""Text generation: prefill and a decode loop over a key-value cache, compiled once and used again."""

from kerasllm.generation.cached import CachedDecoder, cache_names
from kerasllm.generation.config import GenerationConfig
from kerasllm.generation.constraints import Constraint, ConstraintFactory
from kerasllm.generation.engine import Engine, Row, gains_from_xla
from kerasllm.generation.generate import (
    KNOBS,
    SIGNATURE,
    AnswerGenerator,
    Limits,
    TextGenerator,
    batch_settings,
    check_vocabularies,
)
from kerasllm.generation.run import Completion, run, run_beams
from kerasllm.generation.scoring import AnswerScorer, TextScorer
from kerasllm.generation.slots import SlotDecoder

__all__ = [
    "KNOBS",
    "SIGNATURE",
    "AnswerGenerator",
    "AnswerScorer",
    "CachedDecoder",
    "Completion",
    "Constraint",
    "ConstraintFactory",
    "Engine",
    "GenerationConfig",
    "Limits",
    "Row",
    "SlotDecoder",
    "TextGenerator",
    "TextScorer",
    "batch_settings",
    "cache_names",
    "check_vocabularies",
    "gains_from_xla",
    "run",
    "run_beams",
]
