"""Text generation: prefill and a decode loop over a key-value cache, compiled once and used again."""

from kerasllm.generation.config import GenerationConfig
from kerasllm.generation.constraints import Constraint, ConstraintFactory
from kerasllm.generation.engine import Engine, Row
from kerasllm.generation.generate import SIGNATURE, TextGenerator, batch_settings, check_vocabularies
from kerasllm.generation.run import Completion, run, run_beams

__all__ = [
    "SIGNATURE",
    "Completion",
    "Constraint",
    "ConstraintFactory",
    "Engine",
    "GenerationConfig",
    "Row",
    "TextGenerator",
    "batch_settings",
    "check_vocabularies",
    "run",
    "run_beams",
]
