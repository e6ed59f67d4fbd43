"""Training: the step, the loss, the optimizer and the learning rate."""

from kerasllm.training.checkpoint import Checkpoints
from kerasllm.training.loss import next_token_loss
from kerasllm.training.optimizer import Adafactor, AdamW, Lion, Muon, make_optimizer
from kerasllm.training.progress import TrainingProgress
from kerasllm.training.schedules import Schedule, cosine_schedule, make_schedule
from kerasllm.training.step import TokenTraining, Training
from kerasllm.training.strategy import make_strategy

__all__ = [
    "Adafactor",
    "AdamW",
    "Checkpoints",
    "Lion",
    "Muon",
    "Schedule",
    "TokenTraining",
    "Training",
    "TrainingProgress",
    "cosine_schedule",
    "make_optimizer",
    "make_schedule",
    "make_strategy",
    "next_token_loss",
]
