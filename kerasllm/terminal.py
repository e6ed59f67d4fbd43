"""A conversation with a chat model in the terminal."""

import sys
from typing import Any, Protocol, TextIO

_HELP = """\
/reset   forget the conversation          /system TEXT   start anew with this system prompt
/undo    take the last exchange back      /settings      show how answers are made
/help    this                             /exit          leave (as does the end of the input)"""


class Chats(Protocol):
    """What the conversation needs of a model; `CausalLM` has it."""

    def chat(self, messages: list[dict[str, str]], *, stream: bool, **settings: Any) -> Any: ...


def run_chat(
    model: Chats,
    system: str | None = None,
    settings: dict[str, Any] | None = None,
    source: TextIO | None = None,
    target: TextIO | None = None,
) -> list[dict[str, str]]:
    """Reads what the user writes line by line and streams the answers, until the input ends.

    Ctrl-C stops an answer and keeps what was written of it; a second one, at the prompt, leaves.

    Args:
        model: A `CausalLM` with a chat template.
        system: System prompt. None: none, or what the template itself puts there.
        settings: Arguments of `CausalLM.chat`, such as `temperature`.
        source: Where lines come from. None: the terminal.
        target: Where answers go. None: the terminal.

    Returns:
        The messages of the conversation.
    """
    source, target = source or sys.stdin, target or sys.stdout
    settings = dict(settings or {})
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    is_terminal = source.isatty()

    def write(text):
        target.write(text)
        target.flush()

    if is_terminal:
        write("Write a message; /help lists the commands.\n")
    while True:
        if is_terminal:
            write("\n> ")
        try:
            line = source.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            write("\n" if is_terminal else "")
            return messages
        line = line.strip()
        if not line:
            continue
        if line.startswith("/"):
            command, _, rest = line.partition(" ")
            if command in ("/exit", "/quit"):
                return messages
            if command == "/reset":
                messages = list(start)
            elif command == "/system" and rest.strip():
                start = [{"role": "system", "content": rest.strip()}]
                messages = list(start)
            elif command == "/undo":
                messages = messages[: max(len(start), len(messages) - 2)]
            elif command == "/settings":
                write("".join(f"{name} = {value!r}\n" for name, value in settings.items()) or "defaults\n")
            else:
                write(f"{_HELP}\n" if command == "/help" else f"No command {line!r}.\n{_HELP}\n")
            continue
        messages.append({"role": "user", "content": line})
        answer = ""
        try:
            for piece in model.chat(messages, stream=True, **{**settings, "num_beams": 1}):
                write(piece)
                answer += piece
        except KeyboardInterrupt:
            write(" […]")
        except ValueError as error:  # a conversation that outgrew the context, say
            messages.pop()
            write(f"error: {error}\n")
            continue
        write("\n")
        messages.append({"role": "assistant", "content": answer})
