"""Training: the step, the loss, the optimizer and the learning rate."""

from kerasllm.training.checkpoint import Checkpoints
from kerasllm.training.jax_step import bytes_per_device, lower_train_step
from kerasllm.training.layouts import make_distribution
from kerasllm.training.loss import next_token_loss
from kerasllm.training.optimizer import Adafactor, AdamW, Lion, Muon, make_optimizer
from kerasllm.training.progress import TrainingProgress
from kerasllm.training.report import write_report
from kerasllm.training.samples import Samples
from kerasllm.training.schedules import Schedule, cosine_schedule, make_schedule
from kerasllm.training.step import TokenTraining, Training
from kerasllm.training.strategy import make_strategy
from kerasllm.training.tensorboard import TensorBoardLog
from kerasllm.training.throughput import Throughput, training_flops

__all__ = [
    "Adafactor",
    "AdamW",
    "Checkpoints",
    "Lion",
    "Muon",
    "Samples",
    "Schedule",
    "TensorBoardLog",
    "Throughput",
    "TokenTraining",
    "Training",
    "TrainingProgress",
    "bytes_per_device",
    "cosine_schedule",
    "lower_train_step",
    "make_distribution",
    "make_optimizer",
    "make_schedule",
    "make_strategy",
    "next_token_loss",
    "training_flops",
    "write_report",
]
