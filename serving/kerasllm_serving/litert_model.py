"""A language model in a `.tflite` or `.litertlm` file: the second engine, for one row at a time."""

import functools
import logging
import re
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import tokenizers

from kerasllm_serving.chat import MARK, ChatTemplate
from kerasllm_serving.engine import Report, RowRequest
from kerasllm_serving.errors import StartupError, invalid_argument, unimplemented
from kerasllm_serving.language_model import read_chat_template, read_json
from kerasllm_serving.litert import (
    CachedModel,
    Text,
    choose_token,
    penalize_repetition,
    read_settings,
    read_tokenizer,
    uniform_numbers,
)
from kerasllm_serving.model import LITERT_SUFFIXES, SAVED_MODEL_FILE
from kerasllm_serving.tool_calls import CallForm, find_call_form

_MOST_ALTERNATIVES = 20
_FORBIDDEN = np.finfo("float32").min
_logger = logging.getLogger(__name__)


def find_litert_file(version: Path) -> Path | None:
    """Returns the model file that a version is or holds; None: it is a SavedModel's folder."""
    if version.is_file():
        return version
    files = [file for file in sorted(version.iterdir()) if file.suffix in LITERT_SUFFIXES]
    return files[0] if len(files) == 1 and not (version / SAVED_MODEL_FILE).exists() else None


class LiteRtServable:
    """What TensorFlow Serving's API finds of a file for devices: a version without signatures."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.signatures: dict[str, Any] = {}

    def run(self, feeds: Mapping, fetches: Sequence[str], timeout_in_ms: int = 0) -> NoReturn:
        """Refuses: there is nothing to run."""
        raise unimplemented("A .tflite or .litertlm is served over OpenAI's API only.")

    def close(self) -> None:
        """Has nothing to free."""


class LiteRtLanguageModel:
    """A file for devices as OpenAI's API needs it; attributes and methods as in `LanguageModel`.

    Args:
        name: Its name.
        path: The file; beside a `.tflite` lie `tokenizer.json` and `generation_config.json`.
        version: Number of the version.
        num_threads: Threads of the runtime. None: those of the processor.

    Raises:
        StartupError: If it does not load.
    """

    can_embed = False
    can_generate = is_language_model = can_tokenize = True
    constraints = None  # There is no table of the tokens' bytes, which they need.

    def __init__(self, name: str, path: Path, version: int, num_threads: int | None = None) -> None:
        self.name = name
        self.servable = LiteRtServable(version)
        self.created = int(path.stat().st_mtime)
        try:
            self._load(path, num_threads)
        except ModuleNotFoundError as error:
            raise StartupError(
                "A file for devices needs an extra: pip install 'kerasllm[litert]'. "
                f"There is no {error.name}"
            ) from error
        except Exception as error:  # a broken artifact raises many types; its reader gets one
            raise StartupError(
                f"A model for devices must be complete. Received: {path}: {error}"
            ) from error

    def _load(self, path: Path, num_threads: int | None) -> None:
        self._start: list[int] = []
        suppressed: list[int] = []
        if path.suffix == ".litertlm":
            with tempfile.TemporaryDirectory() as folder:
                metadata = _unpack(path, Path(folder))
                self._tokenizer = read_tokenizer(Path(folder) / "tokenizer.json", parse_special=False)
                model = CachedModel(Path(folder) / "model.tflite", num_threads)
            self._start = list(metadata.start_token.token_ids.ids)
            end_ids = {number for token in metadata.stop_tokens for number in token.token_ids.ids}
            suppressed = list(metadata.suppress_tokens.ids)
            sampler = metadata.sampler_params
            self.generation_config = {
                "do_sample": sampler.k != 1,
                "temperature": sampler.temperature,
                # The bundle writes "all tokens" as their number.
                "top_k": 0 if sampler.k == model.vocabulary_size else sampler.k,
                "top_p": sampler.p,
            }
            special = [token.content for token in self._special_tokens()]
            template = ChatTemplate(metadata.jinja_prompt_template, {}, special)
        else:
            for name in ("tokenizer.json", "generation_config.json"):
                if not (path.parent / name).is_file():
                    raise ValueError(f"there is no {name} beside it")
            self.generation_config = read_json(path.parent / "generation_config.json")
            self._tokenizer = read_tokenizer(path.parent / "tokenizer.json", parse_special=False)
            model = CachedModel(path, num_threads)
            end_ids = read_settings(self.generation_config)["end_ids"]
            template = read_chat_template(path.parent)
        self.slots = LiteRtSlots(model, self._tokenizer, end_ids, suppressed)
        self._special = {token.content: number for number, token in self._special_ids()}
        spellings = sorted(map(re.escape, self._special), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(spellings)})" if spellings else r"(?!)()")
        if template and not self._splits_at_special_tokens():
            _logger.warning("No chats with %s: its tokenizer puts something before each part", path)
            template = None
        self.card = None
        self.chat_template = template

    def _special_ids(self) -> list[tuple[int, tokenizers.AddedToken]]:
        decoder = self._tokenizer.get_added_tokens_decoder()
        return [(number, token) for number, token in decoder.items() if token.special]

    def _special_tokens(self) -> list[tokenizers.AddedToken]:
        return [token for _, token in self._special_ids()]

    def _splits_at_special_tokens(self) -> bool:
        """Whether the parts between special tokens may be turned into ids one by one."""
        whole = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        whole.encode_special_tokens = False
        for token, number in self._special.items():
            ids = whole.encode(f"{token}a b", add_special_tokens=False).ids
            if ids != [number, *self._tokenizer.encode("a b", add_special_tokens=False).ids]:
                return False
        return True

    @functools.cached_property
    def call_form(self) -> CallForm:
        """How the model writes calls of tools; a ValueError if its chat template does not say."""
        return find_call_form(self.chat_template)

    def tokenize(self, text: str) -> list[int]:
        """Turns a text into ids, with the tokens that the tokenizer puts around one."""
        try:
            return self._tokenizer.encode(text).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise invalid_argument("Text must be valid Unicode.") from error

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Turns ids into their text, with special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> list[int]:
        """Turns a chat into the ids of its prompt; arguments as in `ChatTemplate.render`."""
        text = self.chat_template.render(messages, add_generation_prompt, variables)
        ids = list(self._start)
        for part in self._split.split(text.decode("utf-8", "surrogateescape")):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids += self._tokenizer.encode(part.replace(MARK, ""), add_special_tokens=False).ids
        return ids


class LiteRtSlots:
    """The cache of one text as the engine's only slot; see `engine.SlotModel`.

    Args:
        model: The runtime.
        tokenizer: The tokenizer.
        end_ids: Tokens that end a text.
        suppressed: Tokens that never come.
    """

    slots = 1

    def __init__(
        self,
        model: CachedModel,
        tokenizer: tokenizers.Tokenizer,
        end_ids: set[int],
        suppressed: Sequence[int] = (),
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._suppressed = list(suppressed)
        self.length, self.vocabulary = model.cache_length, model.vocabulary_size
        self.reset()

    def reset(self) -> None:
        """Frees the slot."""
        self._row: _Row | None = None

    def warm_up(self) -> None:
        """Reads and makes a token."""
        self.read({0: [0]}, 0)
        self.insert(0, RowRequest(token_ids=[0, 0], max_new_tokens=1))
        self.step(1)
        self.reset()

    def read(self, parts: Mapping[int, Sequence[int]], start: int) -> None:
        """Reads tokens of the only slot's prompt, from place `start` on."""
        self._row = None
        self._model.prefill(parts[0], start)

    def copy(self, source: int, slot: int, count: int) -> NoReturn:
        """Refuses: there is no other slot."""
        raise unimplemented("A file for devices has one slot.")

    def insert(self, slot: int, row: RowRequest) -> None:
        """Begins a row whose prompt has been read, but perhaps its last token."""
        self._row = _Row(row, self._tokenizer)

    def step(self, steps: int, masks: Mapping[int, np.ndarray] = MappingProxyType({})) -> Report:
        """Makes so many tokens; returns the report."""
        if masks:
            raise unimplemented("A file for devices knows no masks of tokens.")
        row = self._row
        while steps and row.finish_reason is None:
            steps -= 1
            logits = self._model.decode(row.sequence[-1], len(row.sequence) - 1)
            row.add(self._choose(row, logits), logits, self._end_ids)
        return {
            "num_tokens": np.array([row.count]),
            "token_ids": np.array([row.sequence[len(row.request.token_ids) :]]),
            "logprobs": np.array([row.logprobs], np.float32),
            "text": np.array([row.text], object),
            "finish_reason": np.array([(row.finish_reason or "").encode()], object),
        }

    def free(self, slot: int) -> None:
        """Ends the row before its time."""
        self._row = None

    def alternatives(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest tokens of each place of the new text, and their log-probabilities."""
        ids = np.array([top for top, _ in self._row.top])
        return ids, np.array([values for _, values in self._row.top])

    def token_texts(self, token_ids: Sequence[int]) -> list[bytes]:
        """The texts of tokens; of one that is half a character the sign for that."""
        decode = self._tokenizer.decode
        return [decode([number], skip_special_tokens=False).encode() for number in token_ids]

    def _choose(self, row: "_Row", logits: np.ndarray) -> int:
        """Chooses a token by the rules of `kerasllm.generation`, in its order."""
        request, scores = row.request, logits.astype(np.float32)
        for number, bias in request.logit_bias.items():
            scores[number] += np.float32(bias)
        scores[self._suppressed] = _FORBIDDEN
        scores = penalize_repetition(scores, row.sequence, request.repetition_penalty)
        if request.presence_penalty or request.frequency_penalty:
            made, counts = np.unique(row.sequence[len(request.token_ids) :], return_counts=True)
            penalty = request.presence_penalty + counts * request.frequency_penalty
            scores[made.astype(int)] -= penalty.astype(np.float32)
        if row.count < request.min_new_tokens:
            scores[list(self._end_ids)] = _FORBIDDEN
        settings = {name: getattr(request, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        number = row.uniform[row.count]
        return choose_token(scores, number, row.sequence, settings | {"repetition_penalty": 1.0})


class _Row:
    """The row on its way."""

    def __init__(self, request: RowRequest, tokenizer: tokenizers.Tokenizer) -> None:
        self.request = request
        self.sequence = list(request.token_ids)
        self.uniform = uniform_numbers(request.seed, request.max_new_tokens)
        self.logprobs: list[float] = []
        self.top: list[tuple[np.ndarray, np.ndarray]] = []
        self.text = b""
        self.finish_reason: str | None = None
        self._text = Text(tokenizer, request.token_ids, request.stop)

    @property
    def count(self) -> int:
        return len(self.sequence) - len(self.request.token_ids)

    def add(self, token: int, logits: np.ndarray, end_ids: set[int]) -> None:
        if token in end_ids:
            self.finish_reason = "stop"
        else:
            shifted = logits - logits.max()
            values = shifted - np.log(np.exp(shifted).sum())
            self.logprobs.append(float(values[token]))
            if wanted := min(_MOST_ALTERNATIVES, len(values)):
                top = np.argpartition(-values, wanted - 1)[:wanted]
                top = top[np.argsort(-values[top], kind="stable")]
                self.top.append((top, values[top]))
            self.sequence.append(token)
            self.text += self._text.push(token).encode()
            if self._text.stopped:
                self.finish_reason = "stop"
            elif self.count == self.request.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason:
            self.text += self._text.finish().encode()


def _unpack(path: Path, folder: Path) -> Any:
    """Writes the parts of a bundle as `model.tflite` and `tokenizer.json`; returns its `LlmMetadata`."""
    from litert_lm_builder import litertlm_core
    from litert_lm_builder import litertlm_header_schema_py_generated as schema
    from litert_lm_builder.runtime.proto import llm_metadata_pb2

    kinds, metadata, written = schema.AnySectionDataType, None, set()
    with path.open("rb") as file:
        magic = litertlm_core.HEADER_MAGIC_BYTES
        if file.read(len(magic)) != magic:
            raise ValueError("it does not begin as a .litertlm does")
        file.seek(litertlm_core.HEADER_END_LOCATION_BYTE_OFFSET)
        (end,) = struct.unpack("<Q", file.read(8))
        file.seek(litertlm_core.HEADER_BEGIN_BYTE_OFFSET)
        header = schema.LiteRTLMMetaData.GetRootAs(
            file.read(end - litertlm_core.HEADER_BEGIN_BYTE_OFFSET), 0
        )
        sections = header.SectionMetadata()
        for number in range(sections.ObjectsLength()):
            section = sections.Objects(number)
            file.seek(section.BeginOffset())
            data = file.read(section.EndOffset() - section.BeginOffset())
            kind = section.DataType()
            if kind == kinds.LlmMetadataProto:
                metadata = llm_metadata_pb2.LlmMetadata.FromString(data)
            elif kind == kinds.TFLiteModel:
                (folder / "model.tflite").write_bytes(data)
                written.add(kind)
            elif kind == kinds.HF_Tokenizer_Zlib:
                # What is compressed begins behind its length.
                (folder / "tokenizer.json").write_bytes(zlib.decompress(data[8:]))
                written.add(kind)
    if metadata is None or len(written) != 2:
        raise ValueError("it must hold a model, its metadata and a tokenizer.json, as kerasllm writes them")
    return metadata
