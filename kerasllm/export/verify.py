"""Whether an exported folder answers as the live model does, asked where nothing but TensorFlow is."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import tokenizers

from kerasllm.export.extra import MANIFEST
from kerasllm.export.signatures import Signature, example_inputs, read_signatures
from kerasllm.export.warmup import FILE_NAME, read_warmup
from kerasllm.models import LanguageModel
from kerasllm.tokenizers import Tokenizer

# Of a number and, below 1, absolute.
TOLERANCE = 1e-5
# Numbers of 8 bits, in which each operation of another order rounds.
_HALF_TOLERANCE = 0.05
_NEW_TOKENS = 8
_SECONDS = 3600

PROMPTS = (
    "Once upon a time",
    "The",
    "A quick brown fox, 12 lazy dogs and",
    "Ein Gr\u00fc\u00dfgott \u65e5\u672c\u8a9e \U0001f98a",
    "  two  spaces\nand a line",
)
# Texts that tell a nearly right tokenizer from a right one.
ADVERSARIAL = (
    "",
    " ",
    "   ",
    "\n",
    "\r\n",
    "x \n\n  y",
    "tab\tand   spaces  ",
    "\u00a0 x\u00a0\u00a0y \u3000\u3000\u65e5\u672c",
    "\u2028x\u2029 y\u180ez\u1680",
    "\ufeffBOM",
    "a\x00b\x00\x00 \x00",
    "".join(map(chr, range(1, 32))),
    "".join(map(chr, range(127, 256))),
    "it's they're I'M don't 'tis ' s we'll've 'd'm",
    "'S 'T ''s '\u017f \u2019s \n's  'll",
    "snake_case CamelCase x1y2 3.14 1,000 e-mail@host.org",
    "def f(x):\n\treturn x ** 2  # square\n\n\n    pass",
    "e\u0301a\u0300\u0316 o\u0308 Z\u0351\u036b\u0343\u036a\u0302",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1fa\U0001f1f8 \U0001f44d\U0001f3fd \u2764\ufe0f",
    "\u65e5\u672c\u8a9e\u3001\u4e2d\u6587\u3002\ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "\u0645\u0631\u062d\u0628\u0627 \u0661\u0662\u0663 \u0928\u092e\u0938\u094d\u0924 \u0395\u03bb",
    "\u00bd \u00b2 \u2167 \u2460 \U0001d7d9 \U0001d49c \U00020000",
    "\ufffd\ufffe\uffff \U0010ffff\U000e0041",
    "\ufb01 \u0149 \u1e9e \u0130 \u0131",
    "<unk> < unk> [UNK] [MASK] <s></s> <|endoftext|> <|im_start|>user",
    "\u2581 \u0120 ## ##ing",
    " " * 20 + "x" + "\n" * 20,
)

# What the other process runs: from requests to outputs, strings as Latin-1, so that any bytes pass.
_ANSWER = """
import json, sys
for name in ("kerasllm", "keras", "tf_keras", "keras_hub"):
    sys.modules[name] = None
import numpy as np
import tensorflow as tf

def encode(array):
    array = np.asarray(array)
    flat = [v.decode("latin-1") if isinstance(v, bytes) else v for v in array.ravel().tolist()]
    return {"shape": array.shape, "values": flat, "dtype": str(array.dtype)}

def decode(tensor):
    values = tensor["values"]
    if tensor["dtype"] == "object":
        values = [v.encode("latin-1") for v in values]
    return np.array(values, tensor["dtype"]).reshape(tensor["shape"])

folder, source, target = sys.argv[1:]
answers = []
with tf.compat.v1.Session(graph=tf.Graph()) as session:
    signatures = tf.compat.v1.saved_model.loader.load(session, ["serve"], folder).signature_def
    for request in json.load(open(source)):
        signature = signatures[request["signature"]]
        feeds = {signature.inputs[name].name: decode(t) for name, t in request["inputs"].items()}
        fetches = {name: info.name for name, info in signature.outputs.items()}
        try:
            outputs = session.run(fetches, feeds)
            answers.append({name: encode(value) for name, value in outputs.items()})
        except tf.errors.OpError as error:
            answers.append({"error": error.message})
json.dump(answers, open(target, "w"))
"""


class Task(Protocol):
    """A model with its tokenizer, as `kerasllm.tasks` has them."""

    model: LanguageModel
    tokenizer: Tokenizer


class Check(NamedTuple):
    """A comparison of an exported folder with the live model.

    Attributes:
        name: What was compared.
        count: Number of rows.
        problem: The first difference; empty if there is none.
    """

    name: str
    count: int
    problem: str


class VerificationError(RuntimeError):
    """An exported folder that does not answer as the live model does."""


class _Question(NamedTuple):
    name: str
    signature: str
    inputs: dict[str, np.ndarray]
    # From the outputs to the first difference, empty if there is none.
    compare: Callable[[dict[str, np.ndarray]], str]


def verify_export(folder: str | os.PathLike, task: Task) -> list[Check]:
    """Compares an exported folder with the live model.

    The folder is loaded in a new process, in which kerasllm and Keras cannot be imported, and runs in graph
    mode on the CPU, as a server runs it. Compared are, as far as the folder has signatures for them: greedy
    and drawn token ids, texts, scores of continuations, logits, token ids of texts that are hard for
    tokenizers, filled masks, labels, vectors. Numbers may differ by a hundred-thousandth of themselves, or
    of 1, and in half precision by a twentieth. The tokenizer is compared with Hugging Face's `tokenizers`
    too. The warm-up requests must be answered.

    Args:
        folder: The folder.
        task: The model it was exported from, such as a `CausalLM`.

    Returns:
        The comparisons.

    Raises:
        FileNotFoundError: If there is no SavedModel.
        RuntimeError: If the folder cannot be loaded at all.
    """
    signatures = read_signatures(folder)
    extra = pathlib.Path(folder) / "assets.extra"
    manifest = json.loads((extra / MANIFEST).read_text(encoding="utf-8"))
    questions = _Questions(task, signatures, manifest.get("limits") or {}).collect()
    questions += [
        _Question("warm-up requests", name, inputs, lambda _: "")
        for name, inputs in read_warmup(extra / FILE_NAME)
    ]
    checks: dict[str, Check] = {}
    # Where XLA compiled only one of the two, sums would be rounded in another order.
    writes_text = hasattr(task, "decoding_compiled")
    is_compiled = bool(manifest.get("jit_compile"))
    with task.decoding_compiled(is_compiled) if writes_text else contextlib.nullcontext():
        for question, answer in zip(questions, _ask(folder, questions), strict=True):
            if "error" in answer:
                problem = f"it failed: {answer['error']}"
            else:
                problem = question.compare({name: _from_json(value) for name, value in answer.items()})
            if problem:
                problem = f"{question.signature}: {problem}"
            rows = max((len(value) for value in question.inputs.values() if value.ndim), default=1)
            before = checks.get(question.name, Check(question.name, 0, ""))
            checks[question.name] = Check(question.name, before.count + rows, before.problem or problem)
    return [*checks.values(), *_check_reference(task.tokenizer)]


def format_checks(checks: Sequence[Check]) -> str:
    """Writes comparisons as a table.

    Args:
        checks: The comparisons.

    Returns:
        A line each: name, number of rows, and `equal` or what is not.
    """
    width = max(len(check.name) for check in checks)
    lines = [f"{'compared':<{width}}  rows  result"]
    lines += [
        f"{c.name:<{width}}  {c.count:>4}  {'DIFFERS: ' + c.problem if c.problem else 'equal'}"
        for c in checks
    ]
    return "\n".join(lines)


def _ask(folder: str | os.PathLike, questions: Sequence[_Question]) -> list[dict[str, Any]]:
    """The answers of the folder in a process of its own."""
    requests = [
        {"signature": q.signature, "inputs": {name: _to_json(value) for name, value in q.inputs.items()}}
        for q in questions
    ]
    with tempfile.TemporaryDirectory() as work:
        source, target = os.path.join(work, "requests.json"), os.path.join(work, "answers.json")
        pathlib.Path(source).write_text(json.dumps(requests), encoding="utf-8")
        # The memory of a GPU is this process's already.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        result = subprocess.run(
            [sys.executable, "-c", _ANSWER, str(pathlib.Path(folder).resolve()), source, target],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=work,
            timeout=_SECONDS,
        )
        if result.returncode:
            raise RuntimeError(f"The exported folder cannot be loaded:\n{result.stderr[-4000:]}")
        return json.loads(pathlib.Path(target).read_text(encoding="utf-8"))


def _to_json(value: np.ndarray) -> dict[str, Any]:
    flat = [item.decode("latin-1") if isinstance(item, bytes) else item for item in value.ravel().tolist()]
    return {"shape": value.shape, "values": flat, "dtype": str(value.dtype)}


def _from_json(tensor: Mapping[str, Any]) -> np.ndarray:
    values = tensor["values"]
    if tensor["dtype"] == "object":
        values = [value.encode("latin-1") for value in values]
    return np.array(values, tensor["dtype"]).reshape(tensor["shape"])


def _check_reference(tokenizer: Tokenizer) -> list[Check]:
    """The live tokenizer beside Hugging Face's, from the same tokenizer.json."""
    try:
        reference = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    except Exception as error:  # The library has no class of its own for what it cannot read.
        return [Check("reference tokenizer", 0, f"tokenizers cannot read tokenizer.json: {error}")]
    reference.encode_special_tokens = True
    # Of whole batches, which the library does by itself and transformers only where it is asked to.
    reference.no_padding()
    reference.no_truncation()
    texts = [*ADVERSARIAL, *PROMPTS]
    expected = [reference.encode(text).ids for text in texts]
    found = tokenizer.encode(texts, add_special_tokens=True)
    return [Check("reference tokenizer", len(texts), _first_difference(texts, found, expected))]


# Comparisons


def _first_difference(rows: Sequence[Any], found: Sequence[Any], expected: Sequence[Any]) -> str:
    for row, value, wanted in zip(rows, found, expected, strict=True):
        if value != wanted:
            return f"of {row!r} {value!r}, live {wanted!r}"
    return ""


def _far(found: np.ndarray, expected: np.ndarray, tolerance: float) -> str:
    found, expected = np.asarray(found, "float64"), np.asarray(expected, "float64")
    if found.shape != expected.shape:
        return f"of shape {found.shape}, live {expected.shape}"
    if not np.allclose(found, expected, rtol=tolerance, atol=tolerance):
        return f"{np.abs(found - expected).max():.2g} from the live numbers, more than {tolerance:g}"
    return ""


def _texts(values: np.ndarray) -> list[str]:
    return [value.decode() for value in values]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype("float64")
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class _Questions:
    """The requests of a verification, and what the live model says to each."""

    def __init__(self, task: Task, signatures: Mapping[str, Signature], limits: Mapping[str, Any]):
        self.task, self.tokenizer, self.signatures = task, task.tokenizer, signatures
        self.context = task.model.config.context_length
        self.rows = limits.get("max_batch_size") or len(ADVERSARIAL)
        self.new_tokens = min(_NEW_TOKENS, limits.get("max_new_tokens") or _NEW_TOKENS)
        self.longest = min(limits.get("max_prompt_tokens") or self.context, self.context)
        self.prompts = self._that_fit(PROMPTS, self.longest - self.new_tokens - 4)
        self.tolerance = TOLERANCE if task.model.compute_dtype == "float32" else _HALF_TOLERANCE
        self.questions: list[_Question] = []

    def _that_fit(self, texts: Sequence[str], most: int) -> list[str]:
        ids = self.tokenizer.encode(list(texts), add_special_tokens=True)
        return [text for text, row in zip(texts, ids, strict=True) if 0 < len(row) <= most] or ["a"]

    def collect(self) -> list[_Question]:
        if hasattr(self.task, "generate_tokens"):
            self._ask_generate()
            self._ask_serving_default()
            self._ask_chat()
            self._ask_score()
            self._ask_logits()
        elif hasattr(self.task, "fill_mask"):
            self._ask_fill()
        elif hasattr(self.task, "classify"):
            self._ask_classify()
        elif hasattr(self.task, "encode"):
            self._ask_embed()
        self._ask_tokenizer()
        return self.questions

    def _add(self, name, signature, texts, compare, **settings) -> None:
        """Asks for some rows at a time; `compare` gets outputs and those rows' texts."""
        if signature not in self.signatures:
            return
        for start in range(0, len(texts), self.rows):
            rows = list(texts[start : start + self.rows])
            ids = self.tokenizer.encode(rows[0]) or [0]
            inputs = example_inputs(self.signatures[signature], rows, ids, self.new_tokens, settings)
            if inputs is not None:
                self.questions.append(
                    _Question(name, signature, inputs, lambda outputs, rows=rows: compare(outputs, rows))
                )

    # Models that write text

    def _ask_generate(self) -> None:
        drawn = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}
        self._ask_tokens("greedy token ids", {"temperature": 0.0, "repetition_penalty": 1.0, "seed": 0})
        for seed, stop in ((1, []), (2**31 - 1, ["e", " a"])):
            self._ask_tokens("drawn token ids", {**drawn, "seed": seed, "stop": stop})

    def _ask_tokens(self, name, settings) -> None:
        for signature in ("generate", "generate_scalar"):
            known = self.signatures[signature].inputs if signature in self.signatures else ()
            sent = {key: value for key, value in settings.items() if key in known}

            def compare(outputs, rows, sent=sent):
                knobs = {key: value for key, value in sent.items() if key != "stop"}
                live = self.task.generate_tokens(
                    rows, self.new_tokens, stop_strings=sent.get("stop", []), logprobs=0, **knobs
                )
                return self._compare_completions(outputs, rows, live)

            self._add(name, signature, self.prompts, compare, **sent)

    def _compare_completions(self, outputs, rows, live) -> str:
        counts = outputs["num_tokens"]
        found = [ids[:n].tolist() for ids, n in zip(outputs["token_ids"], counts, strict=True)]
        reasons = _texts(outputs["finish_reason"])
        problem = (
            _first_difference(rows, found, [row.token_ids for row in live])
            or _first_difference(rows, _texts(outputs["text"]), [row.text for row in live])
            or _first_difference(rows, reasons, [row.finish_reason for row in live])
        )
        for row, values, completion in zip(rows, outputs["logprobs"], live, strict=True):
            far = _far(values[: len(completion.logprobs)], completion.logprobs, self.tolerance)
            problem = problem or (far and f"of {row!r} log-probabilities {far}")
        return problem

    def _ask_serving_default(self) -> None:
        self._add(
            "texts of serving_default",
            "serving_default",
            self.prompts,
            lambda outputs, rows: _first_difference(
                rows, _texts(outputs["text"]), self.task.generate(rows)
            ),
        )

    def _ask_chat(self) -> None:
        if "chat" not in self.signatures:
            return
        settings = {"temperature": 0.0, "repetition_penalty": 1.0, "seed": 0}

        def encode(text):
            message = {"role": "user", "content": text}
            return self.tokenizer.encode_chat([message], add_generation_prompt=True)

        def compare(outputs, rows):
            ids = [encode(row) for row in rows]
            live = self.task.generate_tokens(ids, self.new_tokens, stop_strings=[], logprobs=0, **settings)
            return self._compare_completions(outputs, rows, live)

        fit = [text for text in self.prompts if len(encode(text)) <= self.longest - self.new_tokens]
        self._add("answers in chats", "chat", fit, compare, **settings)

    def _ask_score(self) -> None:
        def compare(outputs, rows):
            for number, row in enumerate(rows):
                ids = outputs["token_ids"][number, : outputs["num_tokens"][number]].tolist()
                expected = self._logprobs(row, " and", ids)
                if isinstance(expected, str):
                    return f"of {row!r} {expected}"
                found = outputs["logprobs"][number, : len(ids)]
                problem = _far(found, expected, self.tolerance)
                problem = problem or _far(outputs["logprob"][number], expected.sum(), self.tolerance)
                if problem:
                    return f"of {row!r} {problem}"
            return ""

        # A space at the end of a prompt would belong to the continuation.
        self._add("scores", "score", [prompt.rstrip() for prompt in self.prompts], compare)

    def _logprobs(self, prompt: str, continuation: str, ids: list[int]) -> np.ndarray | str:
        """The live log-likelihood of each token of a continuation, or what is wrong with its ids."""
        special = self.tokenizer.encode(prompt, add_special_tokens=True)
        if hasattr(self.task.model, "encode"):
            target = self.tokenizer.encode(continuation)
            if target != ids:
                return f"the tokens {ids}, live {target}"
            start = self.task.model.config.decoder_start_id
            feeds = {"source_ids": np.array([special]), "token_ids": np.array([[start, *ids[:-1]]])}
            logits = np.asarray(self.task(feeds))[0]
        else:
            plain, whole = self.tokenizer.encode(prompt), self.tokenizer.encode(prompt + continuation)
            if whole[-len(ids) :] != ids or len(whole) - len(ids) != len(plain):
                return f"the tokens {ids}, live {whole[len(plain) :]}"
            before = next(n for n in range(len(special)) if special[n : n + len(plain)] == plain)
            sequence = [*special[:before], *whole]
            logits = np.asarray(self.task.model(np.array([sequence[:-1]])))[0, -len(ids) :]
        return _log_softmax(logits)[np.arange(len(ids)), ids]

    def _ask_logits(self) -> None:
        row = self.prompts[:1]
        ids = self.tokenizer.encode(row[0]) or [0]

        def live(sequence):
            return np.asarray(self.task.model(np.array([sequence])))[0, -1].astype("float32")

        for signature, sequence in (("prefill", ids), ("decode", ids[:1])):
            self._add(
                "logits",
                signature,
                row,
                lambda outputs, _, sequence=sequence: _far(
                    _log_softmax(outputs["logits"][0]), _log_softmax(live(sequence)), self.tolerance
                ),
            )

    # Other tasks

    def _ask_fill(self) -> None:
        def compare(outputs, rows):
            for number, row in enumerate(rows):
                (live,) = self.task.fill_mask(row, top_k=5)
                wanted = [candidate["token_id"] for candidate in live]
                difference = _first_difference([row], [outputs["token_ids"][number, 0].tolist()], [wanted])
                scores = [candidate["score"] for candidate in live]
                difference = difference or _far(outputs["probabilities"][number, 0], scores, self.tolerance)
                if difference:
                    return difference
            return ""

        mask = self.tokenizer.mask_token
        texts = [f"{prompt} {mask}" for prompt in self._that_fit(PROMPTS, self.longest - 4)]
        self._add("filled masks", "fill", texts, compare, top_k=5)
        self._add("filled masks", "serving_default", texts, compare)

    def _ask_classify(self) -> None:
        labels = self.task.model.config.labels

        texts = self._that_fit(PROMPTS, self.longest // 2 - 4)
        for signature in ("serving_default", "classify"):
            self._add(
                "scores of labels",
                signature,
                texts,
                lambda outputs, rows: self._compare_scores(outputs, rows, labels),
            )
        self._add(
            "scores of labels",
            "classify_pairs",
            texts,
            lambda outputs, rows: self._compare_scores(outputs, [(row, row) for row in rows], labels),
        )

    def _compare_scores(self, outputs, rows, labels) -> str:
        scores = outputs["probabilities"] if "probabilities" in outputs else outputs["scores"]
        for number, (row, live) in enumerate(zip(rows, self.task.classify(rows), strict=True)):
            wanted = {entry["label"]: entry["score"] for entry in live}
            problem = _far(scores[number], [wanted[label] for label in labels], self.tolerance)
            if not problem and "label" in outputs:
                problem = _first_difference([row], _texts(outputs["label"][[number]]), [live[0]["label"]])
            if not problem and "classes" in outputs:
                problem = _first_difference([row], [_texts(outputs["classes"][number])], [list(labels)])
            if problem:
                return f"of {row!r} {problem}"
        return ""

    def _ask_embed(self) -> None:
        texts = self._that_fit(PROMPTS, self.longest - 4)
        for signature in ("embed", "serving_default"):
            self._add(
                "vectors",
                signature,
                texts,
                self._compare_vectors,
            )

    def _compare_vectors(self, outputs, rows) -> str:
        live = np.asarray(self.task.encode(rows), "float64")
        lengths = np.linalg.norm(live, axis=-1, keepdims=True)
        return _far(outputs["embedding"], live, self.tolerance) or _far(
            outputs["normalized_embedding"], live / lengths, self.tolerance
        )

    # The tokenizer

    def _ask_tokenizer(self) -> None:
        ids = self.tokenizer.encode(list(ADVERSARIAL), add_special_tokens=True)
        texts = [text for text, row in zip(ADVERSARIAL, ids, strict=True) if len(row) <= self.longest]

        def compare(outputs, rows):
            counts = outputs["num_tokens"]
            found = [row[:n].tolist() for row, n in zip(outputs["token_ids"], counts, strict=True)]
            return _first_difference(rows, found, self.tokenizer.encode(rows, add_special_tokens=True))

        self._add("token ids of hard texts", "tokenize", texts, compare)
        for text in self.prompts:
            self._add(
                "texts of token ids",
                "detokenize",
                [text],
                lambda outputs, rows: _first_difference(
                    rows,
                    _texts(outputs["text"]),
                    [self.tokenizer.decode(self.tokenizer.encode(row) or [0]) for row in rows],
                ),
            )
