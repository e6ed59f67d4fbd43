"""Documents from files and folders, and their split."""

import json

import pytest

from kerasllm.data.sources import read_documents, read_records, split_documents


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def test_text_file_is_one_document_verbatim(tmp_path):
    text = "  Call me Ishmael.\n\nSome years ago — never mind.\n"
    assert read_documents(str(write(tmp_path / "a.txt", text))) == [text]


def test_text_file_is_split_at_end_of_text_markers(tmp_path):
    path = write(tmp_path / "a.txt", "One.\n<|endoftext|>\nTwo.\n\nMore.\n<|endoftext|>\n\n")
    assert read_documents(path) == ["One.", "Two.\n\nMore."]


def test_folder_is_read_recursively_in_sorted_order(tmp_path):
    write(tmp_path / "b.md", "b")
    write(tmp_path / "a" / "z.txt", "a/z")
    write(tmp_path / "a" / "c.text", "a/c")
    write(tmp_path / "d.JSONL", '{"text": "d1"}\n\n{"text": "d2", "id": 5}')
    write(tmp_path / "picture.png", b"\x89PNG\0")
    write(tmp_path / ".hidden" / "e.txt", "hidden")
    write(tmp_path / ".f.txt", "hidden")
    assert read_documents(tmp_path) == ["a/c", "a/z", "b", "d1", "d2"]


def test_list_of_paths_keeps_its_order(tmp_path):
    first, second = write(tmp_path / "2.txt", "two"), write(tmp_path / "1.log", "one")
    assert read_documents([first, str(second)]) == ["two", "one"]


def test_byte_order_mark_and_line_ends_are_normalized(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_documents(path) == ["a\nb\nc\n"]


def test_json_lines_keep_unusual_line_separators(tmp_path):
    text = "a\u2028b\x85c\nd"
    path = write(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n")
    assert read_documents(path) == [text]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt, which is empty"),
        ("a.txt", b" \n\t\n", r"a\.txt, which is empty"),
        ("a.txt", b"<|endoftext|>\n<|endoftext|>", r"a\.txt, which is empty"),
        ("a.jsonl", b"\n\n", r"a\.jsonl, which is empty"),
        ("a.txt", b"abc\0def", r"a\.txt with one at byte offset 3"),
        ("a.txt", "é".encode() + b"a\xe9b", r"a\.txt with an invalid byte 0xe9 at byte offset 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl:2: no JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', r'a\.jsonl:3: \{"txt": "b"\}'),
        ("a.jsonl", b'["a"]\n', r'a\.jsonl:1: \["a"\]'),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1"),
        ("a.jsonl", b'{"text": " "}\n', r"a\.jsonl:1"),
        ("a.jsonl", b'{"text": "a\\u0000b"}\n', r"without NUL.*a\.jsonl:1"),
        ("a.jsonl", b'{"text": "a\\ud800b"}\n', r"surrogate.*a\.jsonl:1"),
    ],
)
def test_bad_files_are_refused_by_name_and_place(tmp_path, name, content, message):
    write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path)


def test_missing_paths_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_documents(tmp_path / "nowhere.txt")
    write(tmp_path / "picture.png", b"x")
    with pytest.raises(FileNotFoundError, match="holds none"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="at least one file"):
        read_documents([])


def test_split_is_a_partition_in_order():
    documents = [f"document {i}" for i in range(50)]
    train, validation = split_documents(documents, 0.2, seed=3)
    assert (len(train), len(validation)) == (40, 10)
    assert sorted(train + validation) == sorted(documents)
    assert train == [document for document in documents if document in train]
    assert validation == [document for document in documents if document in validation]


def test_split_follows_from_the_seed():
    documents = [f"document {i}" for i in range(50)]
    assert split_documents(documents, 0.2, 3) == split_documents(documents, 0.2, 3)
    assert split_documents(documents, 0.2, 3) != split_documents(documents, 0.2, 4)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_both_sides_of_a_split_get_a_document(fraction):
    train, validation = split_documents(["a", "b", "c"], fraction)
    assert train and validation and len(train + validation) == 3


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("border", ["\n\n", "\n", " "])
def test_single_document_is_cut_at_a_border(border, fraction):
    text = border.join(f"This-is-part-{i}" for i in range(200))
    (train,), (validation,) = split_documents([text], fraction)
    assert train + validation == text
    assert train.endswith(border) and validation.startswith("This")
    assert abs(len(validation) / len(text) - fraction) < 0.01


def test_single_document_prefers_paragraphs_to_nearer_lines():
    text = "line\n" * 86 + "\n" + "line\n" * 14
    (train,), (validation,) = split_documents([text], 0.1)
    assert validation == "line\n" * 14


def test_a_paragraph_border_far_away_is_not_used():
    text = "first\n\n" + "line\n" * 100
    _, (validation,) = split_documents([text], 0.1)
    assert validation == "line\n" * 10


@pytest.mark.parametrize("text", ["", "a", "word", "one " + " " * 20, "x" * 1000])
def test_text_that_cannot_be_cut_is_refused(text):
    with pytest.raises(ValueError, match="long enough to be cut"):
        split_documents([text])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2])
def test_bad_fractions_are_refused(fraction):
    with pytest.raises(ValueError, match="validation_fraction"):
        split_documents(["a", "b"], fraction)


def test_no_documents_are_refused():
    with pytest.raises(ValueError, match="at least one document"):
        split_documents([])


def test_records_are_the_texts_of_each_line(tmp_path):
    lines = [
        '{"prompt": "a", "completion": " b", "more": 1}',
        "",
        '{"prompt": "c\\u2028", "completion": "d"}',
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "notes.txt").write_text("no pairs", encoding="utf-8")
    fields = ("prompt", "completion")
    assert read_records(tmp_path, fields) == [("a", " b"), ("c\u2028", "d")]
    assert read_records(tmp_path / "pairs.jsonl", ["completion"]) == [(" b",), ("d",)]
    with pytest.raises(
        ValueError, match=r'non-empty string "prompt" and "label". Received: .*pairs.jsonl:1'
    ):
        read_records(tmp_path, ("prompt", "label"))
    with pytest.raises(ValueError, match="must be a .jsonl file. Received: .*notes.txt"):
        read_records(tmp_path / "notes.txt", fields)
    training, validation = split_documents([("a", "b"), ("c", "d"), ("e", "f")], 0.4)
    assert len(training) == 2 and len(validation) == 1
    with pytest.raises(ValueError, match="two records"):
        split_documents([("a", "b")])
