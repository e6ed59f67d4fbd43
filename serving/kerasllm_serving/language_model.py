"""What an exported folder tells and does beyond its signatures: texts to ids, chats, slots."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers

from kerasllm_serving.chat import ChatTemplate
from kerasllm_serving.constraints import ConstraintFactory
from kerasllm_serving.engine import Report, RowRequest
from kerasllm_serving.errors import StartupError, invalid_argument
from kerasllm_serving.model import MANIFEST, Servable
from kerasllm_serving.tool_calls import CallForm, find_call_form

_EXTRA = "assets.extra"


class LanguageModel:
    """A loaded folder as OpenAI's API needs it.

    Args:
        name: Its name.
        path: The version folder.
        servable: The loaded version.

    Attributes:
        slots: What the engine runs; None: the folder was exported without slots.
        chat_template: None: there is none.
        constraints: Makes constraints of answers; None: there are no slots, or no token ends a text.
        generation_config: What the model's maker recommends, under Hugging Face's names.
        can_embed: Whether there is a signature `embed`.
        card: The model card, in Markdown; None: there is none.
    """

    def __init__(self, name: str, path: Path, servable: Servable) -> None:
        self.name = name
        self.servable = servable
        self.created = int((path / "saved_model.pb").stat().st_mtime)
        self.manifest = read_json(path / MANIFEST)
        card = path / _EXTRA / "README.md"
        self.card = card.read_text("utf-8", "replace") if self.manifest and card.is_file() else None
        # Signatures of these names in folders of others are something else.
        is_ours = bool(self.manifest)
        self.can_embed = is_ours and "embed" in servable.signatures
        self.can_generate = is_ours and "generate" in servable.signatures
        self.generation_config = read_json(path / _EXTRA / "generation_config.json")
        self.slots = LoadedSlots(servable) if self.manifest.get("slots") else None
        self.constraints = None
        if self.slots is not None and self.slots.end_ids and (path / _EXTRA / "tokenizer.json").is_file():
            self.constraints = ConstraintFactory(
                path / _EXTRA / "tokenizer.json",
                self.slots.vocabulary,
                self.slots.end_ids,
                self.slots.token_texts,
            )
        self._tokenizer = None
        if self.can_embed and (path / _EXTRA / "tokenizer.json").is_file():
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path / _EXTRA / "tokenizer.json"))
            # What a file says of filling up and cutting is for whole batches in other programs.
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
        self.chat_template = None
        if self.slots is not None and self.slots.can_chat:
            self.chat_template = read_chat_template(path / _EXTRA)

    @property
    def can_tokenize(self) -> bool:
        """Whether there are signatures that turn texts into ids and back."""
        return {"tokenize", "detokenize"} <= self.servable.signatures.keys()

    @property
    def is_language_model(self) -> bool:
        """Whether OpenAI's API has a use for it."""
        return self.can_generate or self.can_embed

    @functools.cached_property
    def call_form(self) -> CallForm:
        """How the model writes calls of tools; a ValueError if its chat template does not say."""
        return find_call_form(self.chat_template)

    def tokenize(self, text: str) -> list[int]:
        """Turns a text into ids, with the tokens that the tokenizer puts around one.

        Args:
            text: The text; special tokens that it spells are plain text.
        """
        outputs = self.servable.call("tokenize", {"text": _strings([text])})
        return outputs["token_ids"][0, : outputs["num_tokens"][0]].tolist()

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Turns ids into their text, with special tokens as the signature writes them."""
        outputs = self.servable.call(
            "detokenize",
            {
                "token_ids": np.array([token_ids], np.int32),
                "num_tokens": np.array([len(token_ids)], np.int32),
            },
        )
        return outputs["text"][0].decode()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Turns texts into vectors of length 1, `[texts, dim]`."""
        return self.servable.call("embed", {"text": _strings(texts)})["normalized_embedding"]

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Counts the tokens of texts that are embedded, whose signature does not tell."""
        if self._tokenizer is None:
            return 0
        return sum(len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts)))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> list[int]:
        """Turns a chat into the ids of its prompt; arguments as in `ChatTemplate.render`."""
        return self.slots.encode_chat(self.chat_template.render(messages, add_generation_prompt, variables))


class LoadedSlots:
    """The functions of an export with slots; see `engine.SlotModel`.

    Args:
        servable: The loaded version.

    Raises:
        StartupError: If the folder's functions are not those that this server knows.
    """

    def __init__(self, servable: Servable) -> None:
        self._servable = servable
        if "slots_read" not in servable.hidden or "counts" not in servable.hidden["slots_read"].inputs:
            raise StartupError(
                "A folder with slots must be of this release. "
                f"Received: version {servable.version}, of an older one; export it again"
            )
        sizes = self._call("sizes")
        self._step_rows = sizes["step_rows"].tolist()
        self.end_ids = sizes["end_ids"].tolist()
        self.slots, self.length = int(sizes["slots"]), int(sizes["length"])
        self.vocabulary, self.most_alternatives = int(sizes["vocabulary"]), int(sizes["alternatives"])
        self.can_chat = "slots_encode_chat" in servable.hidden

    def _call(self, name: str, **inputs: np.ndarray) -> Report:
        return self._servable.call(f"slots_{name}", inputs)

    def reset(self) -> None:
        """Makes the memory, and frees all slots."""
        self._call("reset")

    def warm_up(self) -> None:
        """Runs each function once, for the first run takes seconds."""
        self.reset()
        for slot in (rows - 1 for rows in self._step_rows):
            self.insert(slot, RowRequest(token_ids=[0], max_new_tokens=2, min_new_tokens=2))
            self.step(1)
            self.alternatives(slot)
            self.free(slot)
        self.read({0: [0]}, 0)
        if self.slots > 1:
            self.copy(0, 1, 1)

    def read(self, parts: Mapping[int, Sequence[int]], start: int) -> None:
        """Reads tokens of prompts into free slots, in each from place `start` on."""
        counts = _integers([len(part) for part in parts.values()])
        token_ids = np.zeros([len(parts), max(counts)], np.int32)
        for row, part in zip(token_ids, parts.values(), strict=True):
            row[: len(part)] = part
        slots, start = _integers(list(parts)), _integers(start)
        self._call("read", slots=slots, token_ids=token_ids, counts=counts, start=start)

    def copy(self, source: int, slot: int, count: int) -> None:
        """Takes over the first tokens of another slot into a free one."""
        self._call("copy", source=_integers(source), slot=_integers(slot), count=_integers(count))

    def insert(self, slot: int, row: RowRequest) -> None:
        """Begins a row in a free slot that holds its prompt, but perhaps the last token."""
        self._call(
            "insert",
            slot=_integers(slot),
            token_ids=_integers(row.token_ids),
            max_new_tokens=_integers(row.max_new_tokens),
            temperature=np.float32(row.temperature),
            top_k=_integers(row.top_k),
            top_p=np.float32(row.top_p),
            min_p=np.float32(row.min_p),
            repetition_penalty=np.float32(row.repetition_penalty),
            seed=_integers(row.seed),
            stop=_strings(row.stop),
            presence_penalty=np.float32(row.presence_penalty),
            frequency_penalty=np.float32(row.frequency_penalty),
            min_new_tokens=_integers(row.min_new_tokens),
            bias_ids=_integers(list(row.logit_bias)),
            bias_values=np.array(list(row.logit_bias.values()), np.float32),
        )

    def step(self, steps: int, masks: Mapping[int, np.ndarray] = MappingProxyType({})) -> Report:
        """Makes so many tokens for each active slot; returns the report of all slots."""
        allowed = np.stack(list(masks.values())) if masks else np.zeros([0, 0], np.int32)
        return self._call("step", steps=_integers(steps), masked=_integers(list(masks)), allowed=allowed)

    def free(self, slot: int) -> None:
        """Ends a slot before its time."""
        self._call("free", slot=_integers(slot))

    def alternatives(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest tokens of each place of a slot's new text, and their log-probabilities."""
        found = self._call("alternatives", slot=_integers(slot))
        return found["token_ids"], found["logprobs"]

    def token_texts(self, token_ids: Sequence[int]) -> list[bytes]:
        """The bytes that tokens stand for inside of a text."""
        return self._call("token_texts", token_ids=_integers(token_ids))["text"].tolist()

    def encode_chat(self, text: bytes) -> list[int]:
        """The ids of a rendered chat, see `ChatTemplate`."""
        return self._call("encode_chat", text=np.array(text, object))["token_ids"].tolist()


def _integers(numbers: int | Sequence[int]) -> np.ndarray:
    return np.array(numbers, np.int32)


def _strings(texts: Sequence[str]) -> np.ndarray:
    try:
        return np.array([text.encode() for text in texts], object)
    except UnicodeEncodeError as error:
        raise invalid_argument("Text must be valid Unicode. Received: half of a surrogate pair") from error


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_chat_template(extra: Path) -> ChatTemplate | None:
    settings = read_json(extra / "tokenizer_config.json")
    file = extra / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(source, list):  # several with names
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is None:
        return None
    named = {}
    for key, value in settings.items():
        if key.endswith("_token") and isinstance(value, str | dict):
            named[key] = value if isinstance(value, str) else value["content"]
    added = read_json(extra / "tokenizer.json").get("added_tokens", [])
    special = {token["content"] for token in added if token["special"]} | set(named.values())
    return ChatTemplate(source, named, sorted(special))
