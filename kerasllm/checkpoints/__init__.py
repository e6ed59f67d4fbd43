"""Models in files: Hugging Face folders, and what can be read besides."""

from kerasllm.checkpoints.folder import Checkpoint, load_folder, save_folder
from kerasllm.checkpoints.load import convert, load_checkpoint

__all__ = ["Checkpoint", "convert", "load_checkpoint", "load_folder", "save_folder"]
