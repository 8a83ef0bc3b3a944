"""The process that renders a chat template: a line of JSON in, a line out, with bounded time and memory.

`template.py` starts it. It is a choice to run jinja2 here and not there: its sandbox bounds neither time nor memory.
"""

import json
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

# Far beyond what a real template needs.
MAX_SECONDS, MAX_BYTES, MAX_CHARACTERS = 3, 2**29, 2**24


def compile_template(source: str) -> Any:
    """Compile a template in the environment for which chat templates are written, that of `transformers`."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what to train on: here it is its body, with variables of its own, as of a call."""

        tags = {"generation"}  # noqa: RUF012  # jinja2's own form

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("say"), [], [], body).set_lineno(line)

        def say(self, caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson  # jinja2's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def render(template: Any, variables: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise ValueError(f"more than {MAX_CHARACTERS} characters")
    return "".join(pieces)


def main() -> None:
    import resource  # only Unix has it

    import jinja2.sandbox  # noqa: F401  # now, before the seconds of a template are counted

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other process
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    template = None
    for line in sys.stdin:
        message = json.loads(line)
        signal.alarm(MAX_SECONDS)  # it ends the process, in the midst of a product of huge numbers too
        try:
            if template is None:
                template, answer = compile_template(message["source"]), {"text": ""}
            else:
                answer = {"text": render(template, message)}
        except Exception as error:  # whatever the template makes Python raise
            answer = {"error": f"{error}" or type(error).__name__}
        print(json.dumps(answer), flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    main()
