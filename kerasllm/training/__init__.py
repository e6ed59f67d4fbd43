"""Training: the step, the loss, the optimizer and the learning rate."""

from kerasllm.training.loss import next_token_loss
from kerasllm.training.optimizer import AdamW, cosine_schedule
from kerasllm.training.progress import TrainingProgress
from kerasllm.training.step import TokenWeightedTraining

__all__ = ["AdamW", "TokenWeightedTraining", "TrainingProgress", "cosine_schedule", "next_token_loss"]
