"""The page about a training."""

import base64
import html.parser
import re

import pytest

from kerasllm.training import write_report


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def write(path, **changes):
    steps = range(1, 30)
    curves = {
        name: [(step, step * factor) for step in steps]
        for name, factor in (("loss", 0.1), ("learning_rate", 1e-3), ("gradient_norm", 0.5))
    }
    curves["tokens_per_second"] = [(1, float("nan")), (2, 100.0)]
    settings = {"output": "runs/<x>", "training": {"steps": 29, "nested": {"rate": 0.1}}}
    given = {
        "title": "A & B",
        "facts": {"state": "done"},
        "curves": curves,
        "validation_losses": [(29, 2.0)],
        "baselines": {"unigram": 4.0},
        "settings": settings,
        "samples": [(5, "<script>alert(1)</script>", "<i>text\nof two lines")],
    }
    return write_report(path, **{**given, **changes}).read_text(encoding="utf-8")


def test_it_is_one_page_that_needs_nothing_else(tmp_path):
    text = write(tmp_path / "deep" / "report.html")
    parser = Tags()
    parser.feed(text)
    assert parser.open == []
    assert text.startswith("<!doctype html>") and "<h1>A &amp; B</h1>" in text
    links = [
        value
        for _, attributes in parser.tags
        for name, value in attributes.items()
        if name in ("src", "href")
    ]
    assert len(links) == 1 and links[0].startswith("data:image/png;base64,")
    assert base64.b64decode(links[0].partition(",")[2]).startswith(b"\x89PNG")
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert "script" not in {tag for tag, _ in parser.tags} and "&lt;script&gt;" in text
    for words in ("training.nested.rate", "runs/&lt;x&gt;", "&lt;i&gt;text\nof two lines", "done"):
        assert words in text


def test_what_is_drawn_is_in_the_picture(tmp_path):
    pictures = [
        re.search('base64,([^"]*)', write(tmp_path / "report.html", **changes))[1]
        for changes in (
            {},
            {"baselines": {}},
            {"validation_losses": []},
            {"curves": {}},
            {"curves": {"loss": [(1, 2.0)], "mfu": [(1, 0.4)], "tokens_per_second": [(1, 9.0)]}},
        )
    ]
    assert len(set(pictures)) == len(pictures)


def test_a_failure_leaves_the_page_as_it_was(tmp_path):
    path = tmp_path / "report.html"
    before = write(path)
    with pytest.raises(TypeError):
        write(path, curves={"loss": [(1, "many"), (2, object())]})
    assert path.read_text() == before and [path] == list(tmp_path.iterdir())
