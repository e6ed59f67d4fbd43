import io

import pytest

from kerasllm.terminal import run_chat


class Echo:
    """Answers with the number of messages and the last one, in two pieces; remembers its calls."""

    def __init__(self):
        self.calls = []

    def chat(self, messages, *, stream, **settings):
        assert stream
        self.calls.append(([dict(message) for message in messages], settings))
        if messages[-1]["content"] == "too long":
            raise ValueError("the conversation must fit into the context")
        return iter([f"{len(messages)}: ", messages[-1]["content"]])


def converse(text, **arguments):
    model, target = Echo(), io.StringIO()
    messages = run_chat(model, source=io.StringIO(text), target=target, **arguments)
    return model, messages, target.getvalue()


def contents(messages):
    return [(message["role"], message["content"]) for message in messages]


def test_the_conversation_grows():
    model, messages, written = converse("one\n\ntwo\n", system="be brief", settings={"top_k": 3})
    assert contents(messages) == [
        ("system", "be brief"),
        ("user", "one"),
        ("assistant", "2: one"),
        ("user", "two"),
        ("assistant", "4: two"),
    ]
    assert written == "2: one\n4: two\n"
    assert [settings for _, settings in model.calls] == [{"top_k": 3, "num_beams": 1}] * 2
    assert contents(model.calls[0][0]) == [("system", "be brief"), ("user", "one")]


@pytest.mark.parametrize(
    ("command", "left"),
    [
        ("/reset", [("system", "s")]),
        ("/undo", [("system", "s"), ("user", "a"), ("assistant", "2: a")]),
        ("/undo\n/undo\n/undo", [("system", "s")]),
        ("/system new rule", [("system", "new rule")]),
    ],
)
def test_commands_change_the_conversation(command, left):
    assert contents(converse(f"a\nb\n{command}\n", system="s")[1]) == left


def test_commands_that_say_something():
    written = converse("/help\n/settings\n/wrong\n/exit\nnot read\n", settings={"seed": 4})[2]
    assert "/undo" in written and "seed = 4" in written and "No command '/wrong'." in written
    assert "not read" not in written


def test_an_error_loses_one_message_only():
    _, messages, written = converse("a\ntoo long\nb\n")
    assert "error: the conversation must fit" in written
    assert contents(messages)[-2:] == [("user", "b"), ("assistant", "3: b")]


def test_an_interrupted_answer_stays():
    class Interrupted(Echo):
        def chat(self, messages, *, stream, **settings):
            yield "half"
            raise KeyboardInterrupt

    target = io.StringIO()
    messages = run_chat(Interrupted(), source=io.StringIO("a\n"), target=target)
    assert contents(messages) == [("user", "a"), ("assistant", "half")]
    assert "half […]" in target.getvalue()
