"""Runs a `.litertlm` on this machine with LiteRT-LM, the runtime of phones; nothing here is TensorFlow."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

from kerasllm.litert import weight_cache

# Each call then has its own copy of the weights. Without it a file would be written beside the model.
_NO_CACHE = ":nocache"


def _engine(path: str | os.PathLike, num_threads: int | None) -> Any:
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no model at: {path}")
    try:
        import litert_lm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"LiteRT-LM needs an extra: pip install 'kerasllm[litert]'. There is no {error.name}."
        ) from error
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    backend = litert_lm.Backend.CPU(thread_count=num_threads or os.cpu_count() or 1)
    with weight_cache(path.stat().st_size) as folder:
        try:
            return litert_lm.Engine(str(path), backend=backend, cache_dir=folder or _NO_CACHE)
        except RuntimeError as error:
            raise ValueError(f"Not a LiteRT-LM model, or a damaged one: {path} ({error})") from error


def generate(
    path: str | os.PathLike,
    prompt: str,
    max_new_tokens: int | None = None,
    raw: bool = False,
    num_threads: int | None = None,
    greedy: bool = False,
) -> Iterator[str]:
    """Answers a message, or continues a text.

    Args:
        path: The `.litertlm`.
        prompt: The message.
        max_new_tokens: Most tokens to generate. None: until the cache is full.
        raw: Whether the prompt is a text to continue; otherwise it is a chat's first message.
        num_threads: Threads. None: those of the processor.
        greedy: Whether each token is the likeliest; otherwise the sampler is the model's.

    Yields:
        Pieces of the answer.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If the extra `litert` is not installed.
        ValueError: If the file is not such a model.
    """
    with _engine(path, num_threads) as engine:
        import litert_lm

        settings: dict[str, Any] = {"max_output_tokens": max_new_tokens}
        if greedy:
            settings["sampler_config"] = litert_lm.SamplerConfig(
                top_k=1, top_p=1.0, temperature=1.0, seed=0
            )
        if raw:
            with engine.create_session(apply_prompt_template=False, **settings) as session:
                session.run_prefill([prompt])
                for responses in session.run_decode_async():
                    yield responses.texts[0]
            return
        with engine.create_conversation(**settings) as conversation:
            for message in conversation.send_message_async(prompt):
                yield _text(message)


def _text(message: Any) -> str:
    """The text of a message of the runtime, whose content is a list of parts."""
    content = message.to_json()["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def benchmark(
    path: str | os.PathLike, prompt_tokens: int = 128, new_tokens: int = 64, num_threads: int = 2
) -> dict[str, float]:
    """Measures a model.

    Args:
        path: The `.litertlm`.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens to generate.
        num_threads: Threads.

    Returns:
        `prefill_tokens_per_second`, `decode_tokens_per_second`, `seconds_to_first_token` and
        `seconds_to_load`.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: As in `generate`.
    """
    _engine(path, num_threads).close()
    import litert_lm

    with weight_cache(os.path.getsize(path)) as folder:
        info = litert_lm.Benchmark(
            str(path),
            litert_lm.Backend.CPU(thread_count=num_threads),
            prefill_tokens=prompt_tokens,
            decode_tokens=new_tokens,
            cache_dir=folder or _NO_CACHE,
        ).run()
    return {
        "prefill_tokens_per_second": info.last_prefill_tokens_per_second,
        "decode_tokens_per_second": info.last_decode_tokens_per_second,
        "seconds_to_first_token": info.time_to_first_token_in_second,
        "seconds_to_load": info.init_time_in_second,
    }
