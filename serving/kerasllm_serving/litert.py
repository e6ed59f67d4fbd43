"""Runs an exported `.tflite`, for the server and for `kerasllm.litert`; nothing here is TensorFlow."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# What LiteRT-LM itself uses to hide a key.
_HIDDEN = -45824.0
_FORBIDDEN = np.finfo("float32").min
# The settings of a generation that are offered here, with the values that change nothing.
_NEUTRAL = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 0,
    "stop_strings": (),
}
# Names in a generation_config.json that are read elsewhere or change nothing.
_OTHER_NAMES = {"max_new_tokens", "eos_token_id", "do_sample", "stop_token_ids", "num_assistant_tokens"}
_PHILOX_KEY, _PHILOX_WEYL = (0x3EC8F720, 0x02461E29), (0x9E3779B9, 0xBB67AE85)
_PHILOX_FACTORS = (0xD2511F53, 0xCD9E8D57)


class Generator:
    """A language model in a `.tflite` file with prefill and decode signatures, for one text at a time.

    The cache lies in buffers of the runtime that each call reads and writes in their place.

    Args:
        path: The file; `tokenizer.json` and `generation_config.json` lie beside it.
        num_threads: Threads of the runtime. None: those of the processor.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If the file is not such a model, or its defaults ask for what is not offered here.
    """

    def __init__(self, path: str | os.PathLike, num_threads: int | None = None):
        path = pathlib.Path(path)
        beside = [path.parent / name for name in ("tokenizer.json", "generation_config.json")]
        for file in (path, *beside):
            if not file.is_file():
                raise FileNotFoundError(f"A LiteRT model needs {file.name}. There is no file: {file}")
        # A prompt's text is never a special token.
        self.tokenizer = read_tokenizer(beside[0], parse_special=False)
        self.settings = read_settings(json.loads(beside[1].read_text(encoding="utf-8")))
        self._model = CachedModel(path, num_threads)
        self.cache_length = self._model.cache_length
        self._turn = 0

    def generate_ids(self, prompt: str, max_new_tokens: int | None = None, **settings: Any) -> list[int]:
        """Continues a prompt.

        Args:
            prompt: The text to continue.
            max_new_tokens: Most tokens to generate. None: what the model was exported with, or less
                where the cache ends before.
            **settings: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `seed` and
                `stop_strings`, as in `kerasllm.GenerationConfig`; the same seed draws the same tokens as
                there. What is left out is as the model was exported.

        Returns:
            The new ids, without the end token, up to the one that completed a stop string.

        Raises:
            ValueError: If the prompt is empty, or with the new tokens longer than the cache, or a setting
                is not offered here.
        """
        return [token for token, _ in self._go_on(prompt, max_new_tokens, settings) if token is not None]

    def stream(self, prompt: str, max_new_tokens: int | None = None, **settings: Any) -> Iterator[str]:
        """Continues a prompt piece by piece; arguments and errors as in `generate_ids`.

        Yields:
            The text that is final: no half characters, and nothing that may turn into a stop string.
        """
        for _, piece in self._go_on(prompt, max_new_tokens, settings):
            if piece:
                yield piece

    def generate(self, prompt: str, max_new_tokens: int | None = None, **settings: Any) -> str:
        """Continues a prompt; arguments and errors as in `generate_ids`.

        Returns:
            The continuation, up to a stop string.
        """
        return "".join(self.stream(prompt, max_new_tokens, **settings))

    def score(self, token_ids: Sequence[int]) -> np.ndarray:
        """Computes the scores of the token after each token.

        Args:
            token_ids: The tokens of a text, not more than the cache holds.

        Returns:
            Float32 `[tokens, vocabulary]`, the logits.
        """
        self._turn += 1
        return np.stack([self._model.decode(token, place) for place, token in enumerate(token_ids)])

    def _check(self, ids: list[int], max_new_tokens: int | None, settings: dict) -> dict[str, Any]:
        if unknown := sorted(set(settings) - set(_NEUTRAL)):
            raise ValueError(f"The settings here are {sorted(_NEUTRAL)}. Received: {unknown}")
        settings = {**self.settings, **settings}
        room = self.cache_length - len(ids)
        if not ids:
            raise ValueError("A prompt must hold at least one token. Received: an empty prompt.")
        if max_new_tokens is None:
            max_new_tokens = max(1, min(room, self.settings["max_new_tokens"]))
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1. Received: {max_new_tokens}")
        if max_new_tokens > room:
            raise ValueError(
                f"Prompt and `max_new_tokens` together must fit into the cache of {self.cache_length} "
                f"tokens. Received: a prompt of {len(ids)} tokens, max_new_tokens={max_new_tokens}"
            )
        if isinstance(settings["stop_strings"], str):
            settings["stop_strings"] = (settings["stop_strings"],)
        for name, holds in (
            ("temperature", settings["temperature"] >= 0),
            ("top_k", settings["top_k"] >= 0),
            ("top_p", 0 < settings["top_p"] <= 1),
            ("min_p", 0 <= settings["min_p"] <= 1),
            ("repetition_penalty", settings["repetition_penalty"] > 0),
            ("stop_strings", all(settings["stop_strings"])),
        ):
            if not holds:
                raise ValueError(f"`{name}` is out of its range. Received: {name}={settings[name]!r}")
        return {**settings, "max_new_tokens": max_new_tokens}

    def _go_on(self, prompt, max_new_tokens, settings) -> Iterator[tuple[int | None, str]]:
        """Yields new tokens with the text that is final besides; last None with the rest of the text."""
        ids = self.tokenizer.encode(prompt).ids
        settings = self._check(ids, max_new_tokens, settings)
        numbers = uniform_numbers(settings["seed"], settings["max_new_tokens"])
        text = Text(self.tokenizer, ids, settings["stop_strings"])
        self._turn = turn = self._turn + 1
        self._model.prefill(ids[:-1])
        sequence = list(ids)
        for number in numbers:
            if turn != self._turn:
                raise RuntimeError("A model generates one text at a time: another was begun meanwhile.")
            scores = self._model.decode(sequence[-1], len(sequence) - 1)
            token = choose_token(scores, number, sequence, settings)
            if token in settings["end_ids"]:
                break
            sequence.append(token)
            yield token, text.push(token)
            if text.stopped:
                break
        yield None, text.finish()


def generate(
    path: str | os.PathLike, prompt: str, max_new_tokens: int | None = None, num_threads: int | None = None
) -> Iterator[str]:
    """Continues a prompt; arguments as in `Generator` and `Generator.stream`, which says what comes."""
    yield from Generator(path, num_threads).stream(prompt, max_new_tokens)


class CachedModel:
    """The runtime with the cache of one text.

    Args:
        path: The `.tflite`.
        num_threads: Threads; None: those of the processor.

    Raises:
        ValueError: If the file is not a model with prefill and decode signatures.
    """

    def __init__(self, path: str | os.PathLike, num_threads: int | None = None):
        self._model = _load(path, num_threads)
        names = self._model.get_signature_list()
        prefills = {
            int(match[1]): name for name in names if (match := re.fullmatch(r"prefill_(\d+)", name))
        }
        if "decode" not in names or not prefills:
            raise ValueError(f"A model needs `decode` and `prefill_N`. Received: {sorted(names)}")
        inputs = self._model.get_input_tensor_details("decode")
        self.cache_length = int(inputs["mask"]["shape"][-1])

        def columns(name):
            return int(self._model.get_input_tensor_details(name)["mask"]["shape"][-1])

        # How many places of the cache the signatures look at that decode, and that read so many tokens.
        self._decodes = {columns(name): name for name in names if re.fullmatch(r"decode(_\d+)?", name)}
        self._reads = {length: {columns(name): name} for length, name in prefills.items()}
        for name in names:
            if (match := re.fullmatch(r"read_(\d+)_\d+", name)) and int(match[1]) in self._reads:
                self._reads[int(match[1])][columns(name)] = name
        self._cache = {}
        for name, detail in inputs.items():
            if name.startswith("kv_cache"):
                buffer = self._cache[name] = self._model.create_input_buffer_by_name("decode", name)
                # What is hidden counts zero times, but not where it is no number.
                buffer.write(np.zeros(detail["shape"], "float32"))
        self.vocabulary_size = int(self._model.get_output_tensor_details("decode")["logits"]["shape"][-1])
        self._logits = self._model.create_output_buffer_by_name("decode", "logits")
        # What each signature takes and gives: the cache in its place, so that it is never copied.
        self._buffers = {}
        for name in (
            *self._decodes.values(),
            *(name for reads in self._reads.values() for name in reads.values()),
        ):
            parts = ("tokens", "input_pos", "mask")
            inputs = {part: self._model.create_input_buffer_by_name(name, part) for part in parts}
            outputs = {"logits": self._logits} if name in self._decodes.values() else {}
            self._buffers[name] = inputs | self._cache, outputs | self._cache

    def _run(self, name: str, tokens: Sequence[int], length: int, position: int, columns: int) -> None:
        """Calls a signature for `length` tokens from `position` on, of which `tokens` are real."""
        places = np.arange(position, position + length, dtype="int32")
        mask = np.zeros((1, 1, length, columns), "float32")
        mask[0, 0][np.arange(columns) > places[:, None]] = _HIDDEN
        inputs, outputs = self._buffers[name]
        inputs["tokens"].write(np.array([[*tokens, *[0] * (length - len(tokens))]], "int32"))
        inputs["input_pos"].write(places)
        inputs["mask"].write(mask)
        self._model.run_by_name(name, inputs, outputs)

    def prefill(self, tokens: Sequence[int], start: int = 0) -> None:
        """Reads tokens of a text.

        Args:
            tokens: The tokens; none may lie behind the end of the cache.
            start: The place of the first; what is before has been read.
        """
        position, end = start, start + len(tokens)
        while position < end:
            waiting = end - position
            # The shortest call that takes all that waits, or else the longest that fills up; what a
            # call writes behind its real tokens is overwritten later, but must lie in the cache.
            fitting = [n for n in self._reads if position + n <= self.cache_length]
            enough = [n for n in fitting if n >= waiting]
            length = min(enough) if enough else max(fitting, default=1)
            part = tokens[position - start : position - start + min(length, waiting)]
            if length in self._reads:
                columns = min(n for n in self._reads[length] if position + length <= n)
                self._run(self._reads[length][columns], part, length, position, columns)
            else:
                self.decode(part[0], position)
            position += len(part)

    def decode(self, token: int, position: int) -> np.ndarray:
        """Reads one more token.

        Args:
            token: The token.
            position: Its place in the text, below `cache_length`.

        Returns:
            Float32 `[vocabulary]`, the logits of the next.
        """
        columns = min(n for n in self._decodes if n > position)
        self._run(self._decodes[columns], [token], 1, position, columns)
        return self._logits.read(self.vocabulary_size, np.float32)


class Encoder:
    """A model in a `.tflite` file that reads whole texts: an embedder, a classifier, a masked model.

    Args:
        path: The file; `tokenizer.json` and `encoder.json` lie beside it.
        num_threads: Threads of the runtime. None: those of the processor.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If the file is not such a model.
    """

    def __init__(self, path: str | os.PathLike, num_threads: int | None = None):
        path = pathlib.Path(path)
        beside = [path.parent / name for name in ("tokenizer.json", "encoder.json")]
        for file in (path, *beside):
            if not file.is_file():
                raise FileNotFoundError(f"A LiteRT model needs {file.name}. There is no file: {file}")
        self.settings = json.loads(beside[1].read_text(encoding="utf-8"))
        self.tokenizer = read_tokenizer(beside[0], self.settings["parse_special"])
        if (length := self.settings["max_length"]) is not None:
            self.tokenizer.enable_truncation(length)
        self._model = _load(path, num_threads)
        self._buffers = {}
        for length in self.settings["lengths"]:
            name = f"encode_{length}"
            signature = self._model.get_signature_list()[name]
            inputs = {n: self._model.create_input_buffer_by_name(name, n) for n in signature["inputs"]}
            outputs = {n: self._model.create_output_buffer_by_name(name, n) for n in signature["outputs"]}
            self._buffers[length] = inputs, outputs

    def __call__(self, text: str, second_text: str | None = None) -> dict[str, np.ndarray]:
        """Computes what the task finds in a text, or in a pair of texts.

        Args:
            text: The text.
            second_text: The second of a pair.

        Returns:
            The outputs by name, without the axis of the batch: `embedding` `[dim]`, `probabilities` or
            `scores` `[labels]`, or `logits` `[tokens, vocabulary]`.

        Raises:
            ValueError: If the text has no token or too many.
        """
        text = self.settings.get("prompt", "") + text
        pair = () if second_text is None else (second_text,)
        encoding = self.tokenizer.encode(text, *pair)
        count = len(encoding.ids)
        fitting = [length for length in self._buffers if length >= count]
        if not count or not fitting:
            raise ValueError(
                f"A text must be of 1 to {max(self._buffers)} tokens. Received: {count} tokens"
            )
        length = min(fitting)
        values = {
            "token_ids": encoding.ids + [self.settings["padding_id"]] * (length - count),
            "attention_mask": [1] * count + [0] * (length - count),
            "token_type_ids": encoding.type_ids + [0] * (length - count),
        }
        inputs, outputs = self._buffers[length]
        for name, buffer in inputs.items():
            buffer.write(np.array([values[name]], "int32"))
        self._model.run_by_name(f"encode_{length}", inputs, outputs)
        results = {}
        for name, buffer in outputs.items():
            shape = self._model.get_output_tensor_details(f"encode_{length}")[name]["shape"]
            results[name] = buffer.read(int(np.prod(shape)), np.float32).reshape(shape)[0]
            if name == "logits":  # one for each token
                results[name] = results[name][:count]
        return results


def read_tokenizer(path: pathlib.Path, parse_special: bool) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = not parse_special
    # What a file says of cutting and filling up is for other programs.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _load(path: str | os.PathLike, num_threads: int | None) -> Any:
    """The model in the runtime."""
    from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, HardwareAccelerator, Options
    from ai_edge_litert.interpreter import Interpreter

    with weight_cache(os.path.getsize(path)) as folder:
        if folder is not None:
            cache = os.path.join(folder, "weights")
        else:  # in memory; where the system cannot do that either, each signature has weights of its own
            cache = ":memory:" if hasattr(os, "memfd_create") else ""
        options = Options(
            hardware_accelerators=HardwareAccelerator.CPU,
            cpu_options=CpuOptions(
                num_threads=num_threads or os.cpu_count() or 1, xnnpack_weight_cache_path=cache
            ),
        )
        try:
            Interpreter(str(path))  # only this one looks whether a file is whole, the other crashes
            return CompiledModel.from_file(str(path), options=options)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"Not a LiteRT model, or a damaged one: {path} ({error})") from error


@contextlib.contextmanager
def weight_cache(model_bytes: int) -> Iterator[str | None]:
    """A folder for the weights as the runtime's kernels want them, in a file that all signatures share.

    It may be deleted once the model is loaded. The system keeps a file's memory in larger pieces than other
    shared memory, so kernels read it faster, by about a tenth.

    Args:
        model_bytes: Size of the model.

    Yields:
        The folder, which is deleted in the end; None: there is no room, and a runtime that finds none while
        it writes ends the process.
    """
    try:
        folder = tempfile.mkdtemp(prefix="kerasllm-")
    except OSError:
        yield None
        return
    try:
        try:
            with open(os.path.join(folder, "room"), "wb") as file:
                # Weights of 16 bits become twice as large.
                os.posix_fallocate(file.fileno(), 0, 5 * model_bytes // 2)
            os.remove(file.name)
            has_room = True
        except (OSError, AttributeError):  # not every system can tell
            has_room = False
        yield folder if has_room else None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Text:
    """The text of new tokens, and where it stops."""

    def __init__(self, tokenizer, before: Sequence[int], stop_strings: Sequence[str]):
        self._decode = tokenizer.decode
        self._ids = list(before)
        # With what stands before, for a tokenizer may drop the space that begins a text.
        self._start = self._given = len(self._decode(self._ids))
        self._stop_strings = stop_strings
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes the next token; returns what is now final besides."""
        self._ids.append(token)
        return self._give(False)

    def finish(self) -> str:
        """Returns the rest."""
        return "" if self.stopped else self._give(True)

    def _give(self, is_end: bool) -> str:
        text = self._decode(self._ids)
        ends = [
            (place + len(stop), place)
            for stop in self._stop_strings
            if (place := text.find(stop, self._start)) >= 0
        ]
        end = len(text)
        if ends:  # the one that is complete first, and of those the longest
            end, self.stopped = min(ends)[1], True
        elif not is_end:
            while end > self._given and text[end - 1] == "\ufffd":  # half a character
                end -= 1
            longest = max(map(len, self._stop_strings), default=0)
            for place in range(max(self._given, end - longest + 1), end):
                if any(stop.startswith(text[place:end]) for stop in self._stop_strings):
                    end = place
                    break
        piece, self._given = text[self._given : end], max(end, self._given)
        return piece


def read_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Reads a generation_config.json as `export_litert` writes it."""
    if unknown := sorted(set(values) - set(_NEUTRAL) - _OTHER_NAMES):
        raise ValueError(
            f"Of the settings of a generation, {sorted(_NEUTRAL)} are offered here. Received: {unknown}"
        )
    ends = values.get("eos_token_id")
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    settings = {**_NEUTRAL, **{name: value for name, value in values.items() if name in _NEUTRAL}}
    if not values.get("do_sample"):
        settings["temperature"] = 0.0
    return {
        **settings,
        "max_new_tokens": values.get("max_new_tokens", 128),
        "end_ids": {*ends, *values.get("stop_token_ids", ())},
    }


def _philox(counter: np.ndarray, key: Sequence[int]) -> np.ndarray:
    """Ten rounds of Philox 4x32 on counters, uint64 `[any, 4]` below 2**32.

    Salmon et al.: "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
    """
    a, b, c, d = counter.T
    low, (key_0, key_1) = np.uint64(0xFFFFFFFF), key
    for _ in range(10):
        first, second = a * np.uint64(_PHILOX_FACTORS[0]), c * np.uint64(_PHILOX_FACTORS[1])
        shift = np.uint64(32)
        a, b, c, d = (
            (second >> shift) ^ b ^ np.uint64(key_0),
            second & low,
            (first >> shift) ^ d ^ np.uint64(key_1),
            first & low,
        )
        key_0, key_1 = (key_0 + _PHILOX_WEYL[0]) % 2**32, (key_1 + _PHILOX_WEYL[1]) % 2**32
    return np.stack([a, b, c, d], axis=-1)


def uniform_numbers(seed: int, count: int) -> np.ndarray:
    """Draws the numbers of `kerasllm.generation.sampling.uniform_numbers`, without TensorFlow.

    Args:
        seed: 32 bits with a sign.
        count: How many.

    Returns:
        Float32 `[count]` in `[0, 1)`.
    """
    words = np.array([[seed % 2**32, (seed >> 32) % 2**32, 0, 0]], "uint64")
    mixed = _philox(words, _PHILOX_KEY)[0]
    blocks = -(-count // 4)
    counters = np.zeros((blocks, 4), "uint64")
    counters[:, 0] = np.arange(blocks)
    counters[:, 2:] = mixed[2:]
    bits = _philox(counters, (int(mixed[0]), int(mixed[1]))).reshape(-1)[:count].astype("uint32")
    # 23 bits behind the point of a number from 1 to 2.
    return (bits & np.uint32(0x7FFFFF) | np.uint32(0x3F800000)).view("float32") - np.float32(1)


def penalize_repetition(scores: np.ndarray, sequence: Sequence[int], penalty: float) -> np.ndarray:
    """Makes the tokens of a text less likely, if the penalty is above 1; changes `scores`, float32."""
    if (penalty := np.float32(penalty)) != 1:
        seen = np.unique(np.asarray(sequence))
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    return scores


def choose_token(scores: np.ndarray, number: float, sequence: Sequence[int], settings: dict) -> int:
    """Chooses a token as `kerasllm.generation` does, by the same rules in the same order.

    Args:
        scores: Float32 `[vocabulary]`, the logits.
        number: In `[0, 1)`, which decides.
        sequence: The text so far, for the repetition penalty.
        settings: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`.

    Returns:
        The token.
    """
    scores = penalize_repetition(scores.astype("float32"), sequence, settings["repetition_penalty"])
    if settings["temperature"] <= 0:
        return int(np.argmax(scores))
    scores = (scores - scores.max()) / np.float32(settings["temperature"])

    def keep(kept):
        return np.where(kept, scores, _FORBIDDEN)

    if settings["top_k"] > 0 or settings["top_p"] < 1:
        order = np.argsort(-scores, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        if settings["top_k"] > 0:
            scores = keep(rank < settings["top_k"])
        if settings["top_p"] < 1:
            weights = np.exp(scores[order])
            before = np.cumsum(weights, dtype="float64") - weights
            scores = keep((before < np.float32(settings["top_p"]) * weights.sum())[rank])
    if settings["min_p"] > 0:
        scores = keep(np.exp(scores) >= np.float32(settings["min_p"]))
    total = np.cumsum(np.exp(scores), dtype="float64")
    return int(np.searchsorted(total, number * total[-1], side="right"))
