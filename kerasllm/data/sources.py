"""Text files and folders → documents, and documents → training and validation."""

import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
_TEXT_SUFFIXES = (".txt", ".md", ".text")
_JSON_LINES_SUFFIX = ".jsonl"


def read_documents(paths: str | os.PathLike | list[str | os.PathLike], field: str = "text") -> list[str]:
    """Reads documents from text files, JSON Lines files and folders of them.

    A text file is one document, or several where it holds `<|endoftext|>` markers: then the white
    space around each document goes, and so do empty ones. A `.jsonl` file holds one document per
    line in the field `field`; its blank lines are skipped. Of a folder, every `.txt`, `.md`, `.text`
    and `.jsonl` file below it is read, sorted by path, except hidden ones. A file that is named
    itself is read as text whatever its suffix. Text is UTF-8; a byte-order mark goes and line ends
    become `\\n`.

    Args:
        paths: a file or folder, or a list of them.
        field: name of the text in the objects of a `.jsonl` file.

    Returns:
        The documents, in the order of `paths`.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no such file.
        ValueError: a file is empty, is no UTF-8 text, or has a malformed JSON line.
    """
    documents = []
    for file in _list_files(paths, (*_TEXT_SUFFIXES, _JSON_LINES_SUFFIX)):
        documents.extend(_read_file(file, field))
    return documents


def read_records(
    paths: str | os.PathLike | list[str | os.PathLike], fields: Sequence[str]
) -> list[tuple[str, ...]]:
    """Reads several texts from each line of JSON Lines files, such as prompts and their completions.

    Args:
        paths: as in `read_documents`; of a folder, the `.jsonl` files are read.
        fields: names of the texts in the objects.

    Returns:
        For each line its texts, in the order of `fields`.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no such file.
        ValueError: a file is empty, no `.jsonl` file, or has a malformed line.
    """
    records = []
    for file in _list_files(paths, (_JSON_LINES_SUFFIX,)):
        if file.suffix.lower() != _JSON_LINES_SUFFIX:
            raise ValueError(f"a file with {list(fields)} must be a .jsonl file. Received: {file}")
        found = _parse_json_lines(_decode(file.read_bytes(), file), file, fields)
        if not found:
            raise ValueError(f"a .jsonl file must hold lines. Received: {file}, which is empty")
        records.extend(found)
    return records


def split_documents(
    documents: Sequence[str] | Sequence[tuple[str, ...]], validation_fraction: float = 0.1, seed: int = 0
) -> tuple[list, list]:
    """Splits documents at random into training and validation; both keep the given order.

    A single document is cut once instead: its last part, about `validation_fraction` of its
    characters, is the validation document. The cut is at the paragraph border nearest to that
    place, else at the nearest line border, else at the nearest space.

    Args:
        documents: texts, or tuples of texts, of which there must be two; at least one.
        validation_fraction: share of the documents for validation, between 0 and 1 (exclusive).
            At least one document goes to either side.
        seed: chooses the validation documents.

    Returns:
        (training documents, validation documents), both non-empty.

    Raises:
        ValueError: `validation_fraction` is not inside (0, 1), there are no documents, or a single
            document is too short to be cut.
    """
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(
            "`validation_fraction` must be between 0 and 1 (exclusive). "
            f"Received: validation_fraction={validation_fraction}"
        )
    if not documents:
        raise ValueError("`documents` must hold at least one document. Received: none")
    if len(documents) == 1 and isinstance(documents[0], str):
        return _cut_document(documents[0], validation_fraction)
    if len(documents) == 1:
        raise ValueError(f"there must be two records at least. Received: {documents}")
    count = round(len(documents) * validation_fraction)
    count = min(max(count, 1), len(documents) - 1)
    validation = set(random.Random(seed).sample(range(len(documents)), count))
    return (
        [document for i, document in enumerate(documents) if i not in validation],
        [document for i, document in enumerate(documents) if i in validation],
    )


def _list_files(
    paths: str | os.PathLike | list[str | os.PathLike], suffixes: tuple[str, ...]
) -> Iterator[Path]:
    """The files that are named, and those of folders that have one of the suffixes."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not paths:
        raise ValueError(f"`paths` must name at least one file or folder. Received: paths={paths}")
    for path in map(Path, paths):
        yield from _list_folder(path, suffixes) if path.is_dir() else [path]


def _list_folder(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise FileNotFoundError(
            f"a folder of texts must hold files that end in {', '.join(suffixes)}. "
            f"Received: {folder}, which holds none"
        )
    return files


def _read_file(path: Path, field: str) -> list[str]:
    text = _decode(path.read_bytes(), path)
    if path.suffix.lower() == _JSON_LINES_SUFFIX:
        documents = [document for (document,) in _parse_json_lines(text, path, [field])]
    elif END_OF_TEXT in text:
        documents = [part.strip() for part in text.split(END_OF_TEXT)]
        documents = [document for document in documents if document]
    else:
        documents = [text] if text.strip() else []
    if not documents:
        raise ValueError(f"a text file must hold text. Received: {path}, which is empty")
    return documents


def _decode(content: bytes, path: Path) -> str:
    nul = content.find(b"\0")
    if nul >= 0:
        raise ValueError(
            f"a text file must not hold NUL bytes. Received: {path} with one at byte offset {nul}; "
            "is it a binary file?"
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"a text file must be UTF-8. Received: {path} with an invalid byte "
            f"0x{content[error.start]:02x} at byte offset {error.start}"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _parse_json_lines(text: str, path: Path, fields: Sequence[str]) -> list[tuple[str, ...]]:
    names = " and ".join(f'"{field}"' for field in fields)
    rule = f"a line of a .jsonl file must be a JSON object with a non-empty string {names}"
    records = []
    # Not splitlines(): JSON strings may hold characters such as U+2028 that it cuts at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{rule}. Received: {path}:{number}: no JSON: {error}") from error
        texts = [record.get(field) for field in fields] if isinstance(record, dict) else [None]
        if not all(isinstance(each, str) and each.strip() for each in texts):
            raise ValueError(f"{rule}. Received: {path}:{number}: {line[:80]}")
        # JSON can escape what a text file may not hold.
        if any(re.search("[\0\ud800-\udfff]", each) for each in texts):
            raise ValueError(f"{rule} without NUL and lone surrogate characters. Received: {path}:{number}")
        records.append(tuple(texts))
    return records


def _cut_document(document: str, validation_fraction: float) -> tuple[list[str], list[str]]:
    wanted = round(len(document) * (1.0 - validation_fraction))
    # A border counts when it leaves either side at least half of what it should get.
    reach = min(wanted, len(document) - wanted) // 2
    for border in ("\n\n", "\n", " "):
        before = document.rfind(border, wanted - reach, wanted)
        after = document.find(border, wanted - len(border) + 1, wanted + reach)
        cuts = [place + len(border) for place in (before, after) if place >= 0]
        for cut in sorted(cuts, key=lambda cut: abs(cut - wanted)):
            if document[:cut].strip() and document[cut:].strip():
                return [document[:cut]], [document[cut:]]
    raise ValueError(
        "a single document must be long enough to be cut at a border of paragraphs, lines or words "
        f"near its last {validation_fraction:.0%}. Received: a document of {len(document)} "
        "characters; give more text, or several documents"
    )
