"""Runs an exported `.tflite` on this machine; the code below uses neither TensorFlow nor Keras."""

import json
import os
import pathlib
import re

import numpy as np

# What LiteRT-LM itself uses to hide a key.
_HIDDEN = -45824.0


class Generator:
    """A language model in a `.tflite` file with prefill and decode signatures.

    Args:
        path: The file; `tokenizer.json` and `generation_config.json` lie beside it.
        num_threads: Threads of the interpreter.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If the file is not such a model.
    """

    def __init__(self, path: str | os.PathLike, num_threads: int | None = None):
        from ai_edge_litert.interpreter import Interpreter
        from tokenizers import Tokenizer

        path = pathlib.Path(path)
        beside = [path.parent / name for name in ("tokenizer.json", "generation_config.json")]
        for file in (path, *beside):
            if not file.is_file():
                raise FileNotFoundError(f"A LiteRT model needs {file.name}. There is no file: {file}")
        self.tokenizer = Tokenizer.from_file(str(beside[0]))
        self.tokenizer.encode_special_tokens = True  # a prompt's text is never a special token
        self.settings = json.loads(beside[1].read_text(encoding="utf-8"))
        try:
            self._interpreter = Interpreter(str(path), num_threads=num_threads)
        except ValueError as error:
            raise ValueError(f"Not a LiteRT model, or a damaged one: {path} ({error})") from error
        names = self._interpreter.get_signature_list()
        self._prefill = {
            int(match[1]): self._interpreter.get_signature_runner(name)
            for name in names
            if (match := re.fullmatch(r"prefill_(\d+)", name))
        }
        if "decode" not in names or not self._prefill:
            raise ValueError(f"A model needs `decode` and `prefill_N`. Received: {sorted(names)}")
        self._decode = self._interpreter.get_signature_runner("decode")
        inputs = self._decode.get_input_details()
        self.cache_length = int(inputs["mask"]["shape"][-1])
        self._cache_shapes = {
            name: tuple(detail["shape"]) for name, detail in inputs.items() if "kv_cache" in name
        }

    def _run(self, runner, tokens: list[int], length: int, position: int, cache: dict) -> dict:
        """Calls a signature for `length` tokens from `position` on, of which `tokens` are real."""
        queries = position + np.arange(length)
        mask = np.where(np.arange(self.cache_length) <= queries[:, None], 0.0, _HIDDEN)
        return runner(
            tokens=np.array([tokens + [0] * (length - len(tokens))], "int32"),
            input_pos=queries.astype("int32"),
            mask=mask[None, None].astype("float32"),
            **cache,
        )

    def generate_ids(self, prompt: str, max_new_tokens: int | None = None) -> list[int]:
        """Continues a prompt with the most likely tokens.

        Args:
            prompt: The text to continue.
            max_new_tokens: Most tokens to generate. None: what the model was exported with, or less
                where the cache ends before.

        Returns:
            The new ids, without the end token.

        Raises:
            ValueError: If the prompt is empty, or with the new tokens longer than the cache.
        """
        ids = self.tokenizer.encode(prompt).ids
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
        cache = {name: np.zeros(shape, "float32") for name, shape in self._cache_shapes.items()}
        position = 0
        while position < len(ids) - 1:
            waiting = len(ids) - 1 - position
            # The shortest call that takes all that waits, or else the longest that fills up; what a
            # call writes behind its real tokens is overwritten later, but must lie in the cache.
            fitting = [n for n in self._prefill if position + n <= self.cache_length]
            enough = [n for n in fitting if n >= waiting]
            length = min(enough) if enough else max(fitting, default=1)
            runner = self._prefill.get(length, self._decode)
            tokens = ids[position : position + min(length, waiting)]
            outputs = self._run(runner, tokens, length, position, cache)
            cache = {name: outputs[name] for name in cache}
            position += len(tokens)
        generated: list[int] = []
        token = ids[-1]
        while True:
            outputs = self._run(self._decode, [token], 1, position, cache)
            cache = {name: outputs[name] for name in cache}
            position += 1
            token = int(np.argmax(outputs["logits"][0, 0]))
            if token == self.settings["eos_token_id"]:
                return generated
            generated.append(token)
            if len(generated) == max_new_tokens:
                return generated

    def generate(self, prompt: str, max_new_tokens: int | None = None) -> str:
        """Continues a prompt with the most likely tokens; see `generate_ids`.

        Returns:
            The continuation.
        """
        before = self.tokenizer.encode(prompt).ids
        whole = self.tokenizer.decode(before + self.generate_ids(prompt, max_new_tokens))
        # Together, for a tokenizer may drop the space that begins a text, which this is not.
        return whole[len(self.tokenizer.decode(before)) :]
