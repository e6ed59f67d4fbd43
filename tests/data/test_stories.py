"""The story grammar: the same on every machine, varied, simple and grammatical."""

import hashlib
import itertools
import random
import re
import string
import time

import pytest

from kerasllm.data import stories
from kerasllm.data.stories import generate_stories

STORIES = generate_stories(5000)
each_plot = pytest.mark.parametrize("plot", stories._PLOTS)


def test_stories_follow_from_the_seed_on_every_machine():
    digest = hashlib.sha256("\n".join(STORIES).encode("utf-8")).hexdigest()
    assert digest == "84d3a77d7774bc738d33c012b6020e48c51323377df0eca81d0ee2f232615a16"


def test_stories_depend_on_the_seed_and_not_on_the_count():
    assert generate_stories(10) == STORIES[:10]
    assert not set(generate_stories(100, seed=1)) & set(STORIES)
    assert generate_stories(0) == []
    with pytest.raises(ValueError, match="count=-1"):
        generate_stories(-1)


def test_stories_hardly_repeat():
    assert len(set(STORIES)) > 0.95 * len(STORIES)


def test_words_are_few_and_simple():
    words = set(re.findall(r"[a-z]+", " ".join(STORIES).lower()))
    assert 400 < len(words) < 1500
    assert max(map(len, words)) <= 10
    assert set("".join(STORIES)) <= set(string.ascii_letters + ' .,:!?"\n')


def test_length_and_paragraphs():
    lengths = [len(story.split()) for story in STORIES]
    assert min(lengths) >= 60 and max(lengths) <= 170
    assert all(story.count("\n\n") == 2 for story in STORIES)


def test_spelling_marks_and_articles():
    broken = re.compile(
        r"[{}]|  | [.,!?]|[.,!?]{2}|\b(\w+) \1\b|\ba [aeiou]|\ban [^aeiou]|[.!?] [a-z]|^[a-z]",
        re.MULTILINE,
    )
    for story in STORIES:
        assert not broken.search(story), story
        assert story.count('"') % 2 == 0, story
        assert all(part[-1] in '.!?"' for part in story.split("\n\n")), story


def test_opening_speaks_of_the_hero_with_one_pronoun():
    girls, boys = set(stories._GIRLS), set(stories._BOYS)
    for story in STORIES:
        names = [word for word in re.findall(r"\w+", story) if word in girls | boys]
        assert len(set(names) & girls) == len(set(names) & boys) == 1, story
        other = "he|him|his|boy" if names[0] in girls else "she|her|girl"
        opening = story.split(".")[0]
        assert not re.search(rf"\b({other})\b", opening, re.IGNORECASE), story


def templates_of(plot):
    return [*itertools.chain(*plot.problem, *plot.result), *plot.endings]


@each_plot
def test_templates_leave_pronouns_to_the_characters(plot):
    words = [list(words.items()) for choices in plot.words for words in choices]
    values = [word for key, word in itertools.chain(*words) if key not in ("she", "her")]
    for template in {*templates_of(plot), *values} - set(stories._OUTDOOR_ENDINGS):
        assert not re.search(r"\b(he|she|his|her|him|himself|herself)\b(?!})", template), template


@each_plot
def test_every_template_can_be_filled_and_every_word_is_used(plot):
    templates = templates_of(plot)
    inner = [word for choices in plot.words for words in choices for word in words.values()]
    used = {key.lower() for text in templates + inner for key in re.findall(r"{(\w+)}", text)}
    base = stories._draw_characters(random.Random(0)) | stories._with_capitals({"when": "one day"})
    for choice in itertools.product(*plot.words):
        words = dict(base)
        for part in choice:
            assert part.keys() <= used
            words |= stories._with_capitals({key: word.format_map(words) for key, word in part.items()})
        for template in templates:
            assert "{" not in template.format_map(words)


def test_ten_thousand_stories_take_a_moment():
    start = time.perf_counter()
    generate_stories(10_000)
    assert time.perf_counter() - start < 5.0
