"""The SavedModels that read and write text: the one place where their signatures are defined.

Each input and output has a name, and rows along its first axis, so that a server may put requests together.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from kerasllm.export.batching import Batching
from kerasllm.export.extra import MANIFEST, write_extra
from kerasllm.export.graph import finish_graph
from kerasllm.export.signatures import CLASSIFY
from kerasllm.files import new_folder, write_json
from kerasllm.generation import (
    KNOBS,
    SIGNATURE,
    AnswerGenerator,
    AnswerScorer,
    CachedDecoder,
    GenerationConfig,
    Limits,
    SlotDecoder,
    TextGenerator,
    TextScorer,
    batch_settings,
    gains_from_xla,
)
from kerasllm.generation.checks import check_texts
from kerasllm.layers.precision import weights_widened_in_turn
from kerasllm.models import LanguageModel
from kerasllm.tokenizers import Tokenizer
from kerasllm.tokenizers.chat_graph import ChatEncoder
from kerasllm.version import __version__

Outputs = dict[str, tf.Tensor]


def _spec(name: str, dtype: tf.DType = tf.string, rank: int = 1) -> tf.TensorSpec:
    return tf.TensorSpec([None] * rank, dtype, name=name)


def _graph(function: Callable[..., Outputs], *specs: tf.TensorSpec, together: "_Together | None" = None):
    """A signature with these inputs, which the function gets by their names."""
    if together is not None:
        function = together.batching.put_together(function, specs, together.max_batch_size)

    def run(*values):
        return function(**{spec.name: value for spec, value in zip(specs, values, strict=True)})

    return tf.function(run, input_signature=specs, autograph=False)


# Signatures by name.
Functions = dict[str, Any]


class _Together(NamedTuple):
    """How calls at the same time are put together, and the most rows."""

    batching: Batching
    max_batch_size: int


def _together(batching: Batching | None, limits: Limits) -> _Together | None:
    return None if batching is None else _Together(batching, limits.max_batch_size)


class SavedModule(tf.Module):
    """What is saved besides the functions: variables, and the tokenizer's tables.

    Args:
        model: The model.
        tokenizer: The tokenizer.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer):
        super().__init__()
        # TensorFlow saves what a module holds. Keras keeps its variables where tf.Module does not look.
        self.model_variables = [variable.value for variable in model.variables]
        self.tokenizer = tokenizer


# The signatures of each task


def _generation_functions(
    generator: TextGenerator, scorer: TextScorer, together: _Together | None
) -> Functions:
    """Those of all models that write text."""
    tokenizer, config = generator.tokenizer, generator.config

    def serve(prompt):
        return {"text": generator.generate_with_defaults(prompt)["text"]}

    # A tensor as the default of an argument becomes the signature's default.
    default = {name: value[0] for name, value in batch_settings(config, 1).items()}

    def generate_scalar(
        prompt,
        max_new_tokens=tf.constant(0),  # noqa: B008
        temperature=default["temperature"],
        top_k=default["top_k"],
        top_p=default["top_p"],
        min_p=default["min_p"],
        repetition_penalty=default["repetition_penalty"],
        seed=default["seed"],
        stop=default["stop"],
    ):
        values = (max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop)
        return generator.generate_alike(prompt, dict(zip(names, values, strict=True)))

    names = [spec.name for spec in KNOBS]
    scalars = [tf.TensorSpec(spec.shape[1:], spec.dtype, name=spec.name) for spec in KNOBS]
    longest = generator.longest_text()

    def tokenize(text):
        text = generator.check_inputs({"text": text})["text"]
        ids = tokenizer.tokenize(check_texts("text", text, longest), add_special_tokens=True)
        return {"token_ids": ids.to_tensor(-1), "num_tokens": tf.cast(ids.row_lengths(), tf.int32)}

    def detokenize(token_ids, num_tokens):
        inputs = generator.check_inputs({"token_ids": token_ids, "num_tokens": num_tokens}, token_ids=2)
        counts = tf.sequence_mask(inputs["num_tokens"], tf.shape(inputs["token_ids"])[1])
        return {"text": tokenizer.detokenize(tf.where(counts, inputs["token_ids"], -1))}

    return {
        "serving_default": _graph(serve, SIGNATURE[0], together=together),
        "generate": _graph(generator.generate_text, *SIGNATURE, together=together),
        "generate_scalar": tf.function(
            generate_scalar, input_signature=[SIGNATURE[0], *scalars], autograph=False
        ),
        "score": _graph(scorer.score, SIGNATURE[0], _spec("continuation"), together=together),
        "tokenize": _graph(tokenize, _spec("text")),
        "detokenize": _graph(
            detokenize, _spec("token_ids", tf.int32, rank=2), _spec("num_tokens", tf.int32)
        ),
    }


def _chat_function(encoder: ChatEncoder, generator: TextGenerator):
    specs = [_spec("roles", rank=2), _spec("contents", rank=2), _spec("num_turns", tf.int32), *KNOBS]
    return _graph(lambda **inputs: generator.answer_chats(encoder, **inputs), *specs)


def _cached_functions(generator: TextGenerator) -> Functions:
    decoder = CachedDecoder(generator)
    numbers = [_spec(name, tf.int32) for name in ("num_tokens", "max_new_tokens")]
    step = [_spec(name, tf.int32) for name in ("token_id", "index")]
    return {
        "prefill": _graph(decoder.prefill, _spec("token_ids", tf.int32, rank=2), *numbers),
        "decode": _graph(decoder.decode, *step, *decoder.cache_specs().values()),
    }


# The exports


def export_saved_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: str | os.PathLike,
    config: GenerationConfig | None = None,
    *,
    slots: int = 0,
    slot_length: int | None = None,
    batching: Batching | None = None,
    jit_compile: bool | None = None,
    **limits: int | None,
) -> pathlib.Path:
    """Writes a SavedModel that turns prompts into continuations, tokenizer and generation inside.

    Signatures, of a model that continues texts:

    - `serving_default`: `prompt` → `text`, as `config` says.
    - `generate`: `prompt` and each of `KNOBS`, a value per prompt → what `TextGenerator.generate_text`
      returns. An empty string ends a row's list of `stop` strings.
    - `generate_scalar`: the same with one value for all prompts, which may be left out (over gRPC); 0 new
      tokens stand for as many as `config` says and there is room for.
    - `chat`: `roles` and `contents` `[batch, turns]`, `num_turns`, and the knobs → the same outputs.
      Left out, with a warning, where the tokenizer's template cannot be put into a graph.
    - `score`: `prompt`, `continuation` → see `TextScorer.score`.
    - `tokenize`: `text` → `token_ids`, `num_tokens`; `detokenize`: these → `text`.
    - `prefill`, `decode`: see `CachedDecoder`.

    An encoder-decoder has all but `chat`, `prefill` and `decode`. What breaks a rule is an INVALID_ARGUMENT
    that fails its whole batch. The graph holds TensorFlow's core ops only, so a stock TensorFlow Serving
    runs it; what XLA compiles has its XlaDynamicUpdateSlice besides. `assets.extra/` holds the tokenizer,
    the generation defaults and a manifest.

    Token ids of a row do not depend on the rows beside it, but where two tokens are as likely as each
    other to the last bits of float32: sums may be rounded in another way in a batch of another size.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        path: The folder to make; for TensorFlow Serving a version number below the model's folder, such
            as `served/my_model/1`.
        config: Defaults of the generation.
        slots: Rows of a `SlotDecoder` that `tf.saved_model.load` finds as `slots`; 0: there is none.
        slot_length: Most tokens of a row of it. None: the model's context.
        batching: Whether the graph puts calls of `serving_default`, `generate` and `score` together that
            come at the same time, for servers that do not.
        jit_compile: Whether XLA compiles the decoding, once for each of a few lengths and numbers of rows.
            A TensorFlow Serving on a CPU refuses calls of such a folder unless it is started with
            `--xla_cpu_compilation_enabled`, and one on a GPU has no XLA. The first call for each of them
            takes seconds; the warm-up requests make those of one prompt. None: that of the slots of a
            large model, which no TensorFlow Serving calls.
        **limits: Fields of `Limits`, the most that a request may ask for.

    Returns:
        The folder.

    Raises:
        FileExistsError: If `path` exists.
        ValueError: If the tokenizer has more tokens than the model, or an argument does not fit.
    """
    config = config or GenerationConfig()
    is_seq2seq = model.head == "seq2seq"
    kind, scorer = (AnswerGenerator, AnswerScorer) if is_seq2seq else (TextGenerator, TextScorer)
    generator = kind(model, tokenizer, config, Limits(**limits), bool(jit_compile))
    if slots and is_seq2seq:
        raise ValueError(f"Slots are for models that continue a text. Received: slots={slots}")
    module = SavedModule(model, tokenizer)
    functions = _generation_functions(generator, scorer(generator), _together(batching, generator.limits))
    omitted = {}
    if not is_seq2seq:
        functions |= _cached_functions(generator)
        try:
            module.chat_encoder = tokenizer.make_chat_encoder()
            functions["chat"] = _chat_function(module.chat_encoder, generator)
        except ValueError as error:
            omitted["chat"] = str(error)
            logging.getLogger(__name__).warning("No signature `chat`: %s", error)
    hidden = {}
    if slots:
        compiled = gains_from_xla(model) if jit_compile is None else jit_compile
        module.slots = SlotDecoder(generator, slots, slot_length, compiled)
        # So that a server needs to load the folder only once.
        hidden = {f"slots_{name}": function for name, function in module.slots.functions().items()}
    return _write(
        module,
        functions,
        model,
        path,
        generator.limits,
        files={"generation_config.json": config.to_huggingface(tokenizer.eos_id)},
        more={"omitted_signatures": omitted, "slots": slots, "jit_compile": bool(jit_compile)},
        hidden=hidden,
    )


def export_masked_lm(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: str | os.PathLike,
    fill: Callable[[tf.Tensor, tf.Tensor], Outputs],
    limits: Limits,
    batching: Batching | None = None,
) -> pathlib.Path:
    """Writes a SavedModel that fills the masks of texts.

    Signatures: `fill`: `text`, `top_k` → `tokens`, `token_ids`, `probabilities`, `num_masks`;
    `serving_default`: the same from `text` with 5 tokens for each mask.

    Args:
        model, tokenizer, path: As in `export_saved_model`.
        fill: From texts and numbers `[batch]` to the outputs.
        limits: The most that a request may ask for.
        batching: Whether the graph puts calls together.

    Returns:
        The folder.
    """
    graph = functools.partial(_graph, together=_together(batching, limits))
    functions = {
        "serving_default": graph(lambda text: fill(text, tf.fill([tf.size(text)], 5)), _spec("text")),
        "fill": graph(fill, _spec("text"), _spec("top_k", tf.int32)),
    }
    return _write(SavedModule(model, tokenizer), functions, model, path, limits)


def export_classifier(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: str | os.PathLike,
    classify: Callable[..., Outputs],
    limits: Limits,
    batching: Batching | None = None,
) -> pathlib.Path:
    """Writes a SavedModel that classifies texts.

    Signatures: `serving_default`: `text` → `label`, `probabilities`, or of a regression `scores`;
    `classify_pairs`: the same from `text` and `second_text`; `classify`: serialized tf.Examples with a
    feature `text` → `classes`, `scores`, for the Classify call of TensorFlow Serving.

    Args:
        model, tokenizer, path: As in `export_saved_model`.
        classify: From texts, and perhaps second texts, `[batch]` to the outputs.
        limits: The most that a request may ask for.
        batching: Whether the graph puts calls together.

    Returns:
        The folder.
    """
    labels = tf.constant([label.encode() for label in model.config.labels])

    def classify_examples(inputs):
        parsed = tf.io.parse_example(inputs, {"text": tf.io.FixedLenFeature([], tf.string)})
        outputs = classify(parsed["text"])
        scores = outputs["probabilities"] if "probabilities" in outputs else outputs["scores"]
        return {"classes": tf.tile(labels[None], [tf.shape(scores)[0], 1]), "scores": scores}

    graph = functools.partial(_graph, together=_together(batching, limits))
    functions = {
        "serving_default": graph(classify, _spec("text")),
        "classify_pairs": graph(classify, _spec("text"), _spec("second_text")),
        "classify": graph(classify_examples, _spec("inputs")),
    }
    methods = {"classify": CLASSIFY}
    return _write(SavedModule(model, tokenizer), functions, model, path, limits, methods)


def export_embedder(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: str | os.PathLike,
    embed: Callable[[tf.Tensor], Outputs],
    limits: Limits,
    more: Mapping[str, Any],
    batching: Batching | None = None,
) -> pathlib.Path:
    """Writes a SavedModel that turns texts into vectors.

    Signatures: `embed` and `serving_default`: `text` → `embedding`, and `normalized_embedding` of length 1.

    Args:
        model, tokenizer, path: As in `export_saved_model`.
        embed: From texts `[batch]` to the outputs.
        limits: The most that a request may ask for.
        more: Entries of the manifest that say how the vectors are made.
        batching: Whether the graph puts calls together.

    Returns:
        The folder.
    """
    graph = functools.partial(_graph, together=_together(batching, limits))
    functions = {"serving_default": graph(embed, _spec("text")), "embed": graph(embed, _spec("text"))}
    return _write(SavedModule(model, tokenizer), functions, model, path, limits, more=more)


def _write(
    module: SavedModule,
    functions: Functions,
    model: LanguageModel,
    path: str | os.PathLike,
    limits: Limits,
    methods: Mapping[str, str] | None = None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    more: Mapping[str, Any] | None = None,
    hidden: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes the folder: the SavedModel, and what describes it in `assets.extra/`."""
    hidden = hidden or {}
    manifest = {
        "kerasllm_version": __version__,
        "tensorflow_version": tf.__version__,
        "model_class": type(model).__name__,
        "model_config": model.config.to_dict(),
        "signatures": sorted(functions),
        "limits": dataclasses.asdict(limits),
        "weight_bytes": _count_bytes(model),
        **(more or {}),
    }
    with new_folder(path) as folder:
        with _narrow_weights(model):
            # The gradients of functions that have their own would be saved too; nobody takes them here.
            options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
            tf.saved_model.save(module, str(folder), signatures={**functions, **hidden}, options=options)
        finish_graph(folder, methods or {}, hidden)
        extra = folder / "assets.extra"
        module.tokenizer.save(extra)
        for name, content in {**(files or {}), MANIFEST: manifest}.items():
            write_json(extra / name, content)
        write_extra(folder, model, module.tokenizer)
    return pathlib.Path(path)


def _narrow_weights(model: LanguageModel) -> contextlib.AbstractContextManager:
    """In which graphs are traced that do not widen all narrow weights at once."""
    if all(variable.dtype == model.compute_dtype for variable in model.variables):
        return contextlib.nullcontext()
    return weights_widened_in_turn(lambda tensor: tf.control_dependencies([tensor]))


def _count_bytes(model: LanguageModel) -> dict[str, int]:
    """The size of the weights of each precision."""
    sizes: collections.Counter[str] = collections.Counter()
    for variable in model.variables:
        sizes[variable.dtype] += variable.value.dtype.size * variable.value.shape.num_elements()
    return dict(sizes)
