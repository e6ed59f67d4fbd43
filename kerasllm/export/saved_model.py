"""The SavedModel that reads text and writes text: the one place where its signatures are defined."""

import os
import pathlib

import tensorflow as tf

from kerasllm.files import new_folder, write_json
from kerasllm.generation import SIGNATURE, GenerationConfig, TextGenerator, batch_settings
from kerasllm.models import LanguageModel
from kerasllm.tokenizers import Tokenizer
from kerasllm.version import __version__


class CausalLMSignatures(tf.Module):
    """The functions of an exported causal language model.

    Args:
        model: The model.
        tokenizer: The tokenizer.
        config: Defaults of the generation.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, config: GenerationConfig):
        super().__init__()
        # TensorFlow saves what a module holds. Keras keeps its variables where tf.Module does not look.
        self.model_variables = [variable.value for variable in model.variables]
        self.tokenizer = tokenizer
        generator = TextGenerator(model, tokenizer, config)

        @tf.function(input_signature=SIGNATURE[:1], autograph=False)
        def serve(prompt):
            settings = batch_settings(config, tf.size(prompt))
            return {"text": generator.generate_text(prompt, **settings, fit_to_context=True)["text"]}

        generate = tf.function(generator.generate_text, input_signature=SIGNATURE, autograph=False)
        self.functions = {"serving_default": serve, "generate": generate}


def export_saved_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: str | os.PathLike,
    config: GenerationConfig | None = None,
) -> pathlib.Path:
    """Writes a SavedModel that turns prompts into continuations, tokenizer and generation inside.

    Signatures, all of them batched: `serving_default` (`prompt` → `text`), with the defaults of `config`;
    `generate` (`prompt`, `max_new_tokens`, `temperature`, `top_k`, `top_p`, `seed` → `text`, `token_ids`,
    `num_tokens`). The graph holds TensorFlow's core ops only, so a stock TensorFlow Serving runs it.
    `assets.extra/` holds the tokenizer, the generation defaults and a manifest.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        path: The folder to make; for TensorFlow Serving a version number below the model's folder, such
            as `served/my_model/1`.
        config: Defaults of the generation.

    Returns:
        The folder.

    Raises:
        FileExistsError: If `path` exists.
        ValueError: If the tokenizer has more tokens than the model.
    """
    config = config or GenerationConfig()
    module = CausalLMSignatures(model, tokenizer, config)
    with new_folder(path) as folder:
        tf.saved_model.save(module, str(folder), signatures=module.functions)
        extra = folder / "assets.extra"
        tokenizer.save(extra)
        manifest = {
            "kerasllm_version": __version__,
            "tensorflow_version": tf.__version__,
            "model_class": type(model).__name__,
            "model_config": model.config.to_dict(),
            "signatures": sorted(module.functions),
        }
        write_json(extra / "generation_config.json", config.to_huggingface(tokenizer.eos_id))
        write_json(extra / "kerasllm_manifest.json", manifest)
    return pathlib.Path(path)
