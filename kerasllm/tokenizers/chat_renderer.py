"""Renders chat templates in a process of its own: a program of its own, run by `chat.py`.

A chat template comes with a model from outside. Jinja's sandbox keeps it from Python's internals, but
not from looping forever or filling the memory. So it runs here, where both can be ended from outside.
Reads pairs of lines, a number and a JSON object, and answers each with one line, the number and an
object; imports nothing of the library.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

MEGABYTE = 1 << 20
LONGEST_PROMPT = 64 * MEGABYTE
# Who asks ends it much earlier, unless it was ended itself.
LONGEST_SECONDS = 120


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant has said, for training; the text stays as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter of the name escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def make_environment() -> jinja2.Environment:
    """The environment in which transformers renders chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


@functools.lru_cache(maxsize=32)
def compile_template(environment: jinja2.Environment, source: str) -> jinja2.Template:
    return environment.from_string(source)


def render(environment: jinja2.Environment, template: str, variables: dict[str, Any]) -> str:
    parts, length = [], 0
    for part in compile_template(environment, template).generate(**variables):
        length += len(part)
        if length > LONGEST_PROMPT:
            raise jinja2.TemplateError(f"more than {LONGEST_PROMPT} characters")
        parts.append(part)
    return "".join(parts)


def answer(environment: jinja2.Environment, request: str) -> dict[str, str]:
    try:
        return {"prompt": render(environment, **json.loads(request))}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # Whatever a template does wrong is reported to who asked.
        kind = type(error).__name__
        try:
            return {"error": f"{kind}: {error}"[:2000]}
        except Exception:
            return {"error": kind}


def main() -> None:
    limit = int(sys.argv[1]) * MEGABYTE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    environment = make_environment()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in sys.stdin:
        request = sys.stdin.readline()
        signal.alarm(LONGEST_SECONDS)
        try:
            line = json.dumps(answer(environment, request))
        except MemoryError:
            line = '{"error": "it needs too much memory"}'
        print(number.strip(), line, flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    main()
