"""Models as folders in Hugging Face's layout: config.json, model.safetensors, tokenizer.json."""

from kerasllm.checkpoints.folder import load_folder, save_folder

__all__ = ["load_folder", "save_folder"]
