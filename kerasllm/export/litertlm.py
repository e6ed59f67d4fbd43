"""The `.litertlm` that Google's LiteRT-LM runs: model, tokenizer, stop tokens and chat template in one."""

import importlib.util
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from sentencepiece import SentencePieceProcessor

from kerasllm.export.litert import converted
from kerasllm.files import new_file, write_json
from kerasllm.generation import GenerationConfig
from kerasllm.models import LanguageModel
from kerasllm.tokenizers import Tokenizer
from kerasllm.tokenizers.sentencepiece import MARK
from kerasllm.version import __version__

# The runtime gives each message's content as a list of parts; the templates of checkpoints expect a text.
# Of what a template may look at besides, these are kept.
_JOIN_PARTS = """\
{%- set kept = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set joined = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set joined.text = message['content'] -%}
{%- elif message['content'] -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{%- set joined.text = joined.text ~ part['text'] -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['tool_calls'] -%}
{%- set text_message = {'role': message['role'], 'content': joined.text, \
'tool_calls': message['tool_calls']} -%}
{%- else -%}
{%- set text_message = {'role': message['role'], 'content': joined.text} -%}
{%- endif -%}
{%- set kept.messages = kept.messages + [text_message] -%}
{%- endfor -%}
{%- set messages = kept.messages -%}
"""
# The least share of lines with the same tokens, of those on which a SentencePiece model and the tokenizer
# are compared: where two cuts are equally likely, SentencePiece's choice is not always that of others.
_EQUAL_LINES = 0.99
_WORDS_OF_A_LINE = 8
# For a model that was not made for chats: it goes on from what was said.
_NO_TEMPLATE = "{%- for message in messages -%}{{ message['content'] }}{%- endfor -%}"


def chat_template_for_parts(tokenizer: Tokenizer, with_bos: bool = True) -> str:
    """Makes a tokenizer's chat template take messages whose content is a list of parts.

    Args:
        tokenizer: The tokenizer; one without a template gets one that writes the contents one after
            another.
        with_bos: Whether the template's `bos_token` is the tokenizer's; otherwise it is empty.

    Returns:
        A Jinja template that has the tokenizer's named tokens in it.
    """
    named = {
        name: getattr(tokenizer, name)
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if getattr(tokenizer, name) is not None
    }
    if not with_bos:
        named["bos_token"] = ""
    lines = [
        f"{{%- set {name} = {json.dumps(token, ensure_ascii=False)} -%}}\n" for name, token in named.items()
    ]
    return "".join(lines) + _JOIN_PARTS + (tokenizer.chat_template or _NO_TEMPLATE)


def _beginning(tokenizer: Tokenizer) -> tuple[list[int], str]:
    """What the runtime shall put before each text, and the chat template that goes with it.

    The runtime puts its start token before a rendered chat too, so a template must not write one itself.
    """
    around = tokenizer.encode("", add_special_tokens=True)
    begins = tokenizer.encode("a", add_special_tokens=True)[: len(around)] == around
    if len(around) > 1 or not begins:
        raise ValueError(
            "LiteRT-LM puts at most one special token before a text and none behind it. Received: a "
            f"tokenizer that puts {around} around a text"
        )
    template = chat_template_for_parts(tokenizer)
    if not around:
        return [], template
    without = chat_template_for_parts(tokenizer, with_bos=False)
    chat, token = [{"role": "user", "content": "a"}], tokenizer.id_to_token(around[0])
    begins_chat = tokenizer.chat_template is None or tokenizer.render_chat(chat).startswith(token)
    if begins_chat and not tokenizer.render_chat(chat, chat_template=without).startswith(token):
        return around, without
    return [], template  # the template writes it out, or chats have none: then texts have none either


def llm_metadata(
    model: LanguageModel, tokenizer: Tokenizer, config: GenerationConfig, cache_length: int
) -> Any:
    """Makes the message that tells LiteRT-LM how to talk to a model.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        config: Defaults of the generation.
        cache_length: Most tokens of prompt and continuation.

    Returns:
        An `LlmMetadata`.

    Raises:
        ValueError: If nothing ends a text, or the tokenizer puts more around a text than the runtime can.
    """
    from litert_lm_builder.runtime.proto import llm_metadata_pb2, sampler_params_pb2

    message = llm_metadata_pb2.LlmMetadata(max_num_tokens=cache_length)
    end_ids = config.end_ids(tokenizer.eos_id)
    if not end_ids:
        raise ValueError(
            "A .litertlm needs a token that ends a text: set `eos_token_id` of the generation config. "
            "Received: a tokenizer without an end token"
        )
    for id in end_ids:
        message.stop_tokens.add().token_ids.ids.append(id)
    start, message.jinja_prompt_template = _beginning(tokenizer)
    if start:
        message.start_token.token_ids.ids.extend(start)
    message.llm_model_type.generic_model.SetInParent()
    message.supports_thinking = message.supports_function_calling = False
    kinds = sampler_params_pb2.SamplerParameters
    sampler = message.sampler_params
    if config.temperature > 0:
        sampler.type = kinds.TOP_P
        # The runtime draws among the k likeliest only, and k must be a number of tokens.
        sampler.k = config.top_k or model.config.vocabulary_size
        sampler.p, sampler.temperature = config.top_p, config.temperature
    else:
        sampler.type, sampler.k, sampler.p, sampler.temperature = kinds.TOP_P, 1, 1.0, 1.0
    sampler.seed = config.seed
    message.suppress_tokens.ids.extend(config.suppress_tokens)
    return message


def export_litertlm(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: str | os.PathLike,
    config: GenerationConfig | None = None,
    prefill_lengths: Sequence[int] = (8, 32, 128, 512),
    cache_length: int | None = None,
    quantize: str | None = "int8",
    texts: Sequence[str] = (),
    calibration_texts: Sequence[str] = (),
    largest_divergence: float | None = None,
    force: bool = False,
    verbose: bool = True,
    sentencepiece_model: str | os.PathLike | None = None,
) -> pathlib.Path:
    """Writes a `.litertlm`: one file that LiteRT-LM loads on Android, iOS and desktops.

    It holds the model as `export_litert` makes it, the tokenizer, the tokens that end a text, the
    defaults of the sampler and the chat template. A report lies beside it, as `<name>.report.json`.

    Args:
        model, tokenizer, config, prefill_lengths, cache_length, texts, calibration_texts,
        largest_divergence, force, verbose:
            As in `export_litert`. With one long prefill only, the runtime could not read a short turn near
            the end of the cache. Each token costs as much time as a full cache would: with 2,048 places
            twice that of 512.
        path: The file to write, ending in `.litertlm`.
        quantize: As in `export_litert`.
        sentencepiece_model: The SentencePiece model that the tokenizer was read from, such as a
            checkpoint's `tokenizer.model`. It is put into the file instead of the tokenizer.json, and must
            cut texts and chats as the tokenizer does.

    Returns:
        The file.

    Raises:
        ValueError, MemoryError, RuntimeError: As in `export_litert`, or if nothing ends a text, the
            defaults of the generation ask for what the runtime does not do, or the SentencePiece model is
            damaged or another one than the tokenizer's.
        FileExistsError: If `path` or its report exists.
        FileNotFoundError: If there is no `sentencepiece_model`.
        ModuleNotFoundError: If the extra `litert` is not installed.
    """
    path, config = pathlib.Path(path), config or GenerationConfig()
    report_path = path.with_suffix(".report.json")
    if path.suffix != ".litertlm":
        raise ValueError(f"A LiteRT-LM model's name must end in .litertlm. Received: {path}")
    for file in (path, report_path):
        if file.exists():
            raise FileExistsError(f"An export never overwrites; choose a new name. Received: {file}")
    if importlib.util.find_spec("litert_lm_builder") is None:
        raise ModuleNotFoundError(
            "This export needs an extra: pip install 'kerasllm[litert]'. There is no litert_lm_builder."
        )
    _check_settings(config)
    pieces = None
    if sentencepiece_model is not None:
        pieces = pathlib.Path(sentencepiece_model).read_bytes()
        _check_sentencepiece(pieces, tokenizer, texts)
    llm_metadata(model, tokenizer, config, 1)  # refuses what it must before the minutes are spent
    with converted(
        model,
        tokenizer,
        path,
        prefill_lengths=prefill_lengths,
        cache_length=cache_length,
        short_lengths=(),  # of several calls that decode, the runtime knows one
        quantize=quantize,
        texts=texts,
        calibration_texts=calibration_texts,
        largest_divergence=largest_divergence,
        force=force,
        verbose=verbose,
    ) as (file, report):
        metadata = llm_metadata(model, tokenizer, config, report["cache_length"])
        _bundle(file, path, pieces or tokenizer, metadata)
        report["bundle_bytes"] = path.stat().st_size
        write_json(report_path, report)
    return path


def _check_settings(config: GenerationConfig) -> None:
    """Refuses defaults that the runtime would leave out in silence."""
    default = GenerationConfig()
    known = {
        *("max_new_tokens", "temperature", "top_k", "top_p", "seed"),
        *("eos_token_id", "stop_token_ids", "suppress_tokens", "num_assistant_tokens"),
    }
    given = {name for name in vars(config) if getattr(config, name) != getattr(default, name)}
    if unknown := sorted(given - known):
        raise ValueError(
            f"Of the settings of a generation, LiteRT-LM has {sorted(known)}. Received: {unknown}"
        )


def _check_sentencepiece(content: bytes, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Refuses a SentencePiece model that would have the runtime read other tokens than the tokenizer's."""
    try:
        processor = SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ValueError(
            f"`sentencepiece_model` must be a SentencePiece model. Received: {error}"
        ) from error
    pieces = [processor.id_to_piece(id) for id in range(processor.vocab_size())]
    tokens = [tokenizer.id_to_token(id) for id in range(tokenizer.vocabulary_size)]
    if pieces != tokens:
        different = next((i for i, (a, b) in enumerate(zip(pieces, tokens, strict=False)) if a != b), None)
        different = min(len(pieces), len(tokens)) if different is None else different
        raise ValueError(
            "`sentencepiece_model` must have the tokenizer's tokens. Received: "
            f"{len(pieces)} tokens, of a tokenizer with {len(tokens)}; the first that differs has the id "
            f"{different}"
        )
    words = [piece[1:] for piece in pieces if piece.startswith(MARK)]
    lines = [" ".join(words[i : i + _WORDS_OF_A_LINE]) for i in range(0, len(words), _WORDS_OF_A_LINE)]
    lines += [line for text in texts for line in text.splitlines()]
    pairs = zip(lines, tokenizer.encode(lines), processor.encode(lines), strict=True)
    unequal = [line for line, wanted, got in pairs if wanted != got]
    if len(unequal) > (1 - _EQUAL_LINES) * len(lines):
        raise ValueError(
            "`sentencepiece_model` must cut texts as the tokenizer does. Received: one that cuts "
            f"{len(unequal)} of {len(lines)} lines otherwise, such as {unequal[0][:80]!r}"
        )
    if tokenizer.chat_template is None:
        return
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = tokenizer.render_chat(chat, chat_template=_beginning(tokenizer)[1])
    if tokenizer.encode(rendered, parse_special=True) != processor.encode(rendered):
        raise ValueError(
            "`sentencepiece_model` must cut chats as the tokenizer does: the template's tokens must be "
            "user-defined ones, and no space be put before the first (`add_dummy_prefix`). Received: a "
            f"template that gives {rendered!r}"
        )


def _bundle(
    model_file: pathlib.Path, path: pathlib.Path, tokenizer: Tokenizer | bytes, metadata: Any
) -> None:
    """Puts the parts into one file; the tokenizer may be the content of a SentencePiece model."""
    from litert_lm_builder import litertlm_builder

    work = model_file.parent
    (work / "metadata.pb").write_bytes(metadata.SerializeToString(deterministic=True))
    builder = litertlm_builder.LitertLmFileBuilder()
    kind = litertlm_builder.DType.STRING
    builder.add_system_metadata(
        litertlm_builder.Metadata(key="Authors", value=f"kerasllm {__version__}", dtype=kind)
    )
    builder.add_llm_metadata(str(work / "metadata.pb"))
    if isinstance(tokenizer, bytes):
        (work / "tokenizer.model").write_bytes(tokenizer)
        builder.add_sentencepiece_tokenizer(str(work / "tokenizer.model"))
    else:
        (work / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        builder.add_hf_tokenizer(str(work / "tokenizer.json"))
    builder.add_tflite_model(str(model_file), litertlm_builder.TfLiteModelType.PREFILL_DECODE)
    with new_file(path) as temporary, open(temporary, "wb") as file:
        builder.build(file)
