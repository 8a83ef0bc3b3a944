"""A checkpoint's chat template: a conversation -> the text that its model was trained to answer.

    template = load_template("DIR", load_tokenizer("DIR"))
    template.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)

A template is a program in jinja2, written by whoever made the checkpoint. It runs in jinja2's sandbox, and in a process
of its own, renderer.py, with little time and memory: the sandbox alone bounds neither.
"""

import contextlib
import json
import re
import select
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cli.renderer import MAX_BYTES, MAX_SECONDS
from files import own_file
from special_tokens import named_special, read_settings, token_name, tokenizer_settings
from tokenizer import Tokenizer

Message = dict[str, str]  # its role (system, user or assistant) and its content

# Stands in what people and models write, behind the first character of a special token's name, so that the name is
# text there and a token only where the template wrote it. Unicode keeps this code for a program's own use.
MARK = "\ufdd0"
# For each role a conversation that has it.
PROBES = {"user": ("user",), "system": ("system", "user"), "assistant": ("user", "assistant", "user")}

# Seconds to wait for the process, which first has to start on a machine that may be busy.
PATIENCE = 60


# ---------------------------------------------------------------------------------------------------------------------
# From a folder


class ChatTemplate:
    """A template, and the process that renders it."""

    def __init__(self, source: str, special_tokens: dict[str, str], where: str, kwargs: dict[str, Any] | None = None):
        self.source, self.where = source, where  # the latter for messages
        self.kwargs = kwargs or {}  # the user's own variables, which go before all but the conversation
        self.special_tokens = special_tokens  # bos_token and its like: their strings, for the template to write
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("renderer.py").resolve()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._ask({"source": source})
        self.part_roles: set[str] = set()  # whose content it takes as a list of parts, as one of a model that sees may
        if re.search(r"\btext\b", source):  # without this word it cannot take one out of a part
            self._find_part_roles()

    def _find_part_roles(self) -> None:
        """Try out, as llama.cpp does, whose content is not shown where it is a text but is where it is a part."""
        for role, roles in PROBES.items():
            messages = [{"role": name, "content": MARK if name == role else "x"} for name in roles]
            if not self._shows_mark(messages):
                self.part_roles.add(role)
                if not self._shows_mark(messages):
                    self.part_roles.remove(role)

    def _shows_mark(self, messages: list[Message]) -> bool:
        try:
            return MARK in self.render(messages, add_generation_prompt=True)
        except ValueError:
            return False

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """Return the conversation's text, and with add_generation_prompt the beginning of the answer that is next.

        Raises ValueError where the template refuses the conversation or has an error, or needs too much of anything.
        """
        messages = [as_parts(message) if message["role"] in self.part_roles else message for message in messages]
        # The variables that `transformers` gives it, with no tools and no documents unless the user has some.
        conversation = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return self._ask({**self.special_tokens, "tools": None, "documents": None, **self.kwargs, **conversation})

    def _ask(self, message: dict[str, Any]) -> str:
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(message), file=self.process.stdin, flush=True)
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.process.kill()
        line = self.process.stdout.readline()
        if not line.endswith("\n"):  # it was ended, perhaps while it answered
            raise ValueError(
                f"{self.where}: the chat template takes more than {MAX_SECONDS} s or {MAX_BYTES >> 20} MiB; "
                "it is broken, or means harm"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(f"{self.where}: the chat template says: {answer['error']}")
        return answer["text"]


def as_parts(message: Message) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def load_template(
    checkpoint_path: str | Path, tokenizer: Tokenizer, eos_ids: Iterable[int] = (), kwargs: dict[str, Any] | None = None
) -> ChatTemplate | None:
    """Start the chat template of a checkpoint folder; None where it has none.

    eos_ids: the first of them is the eos_token of a folder whose settings name none. kwargs: variables of the user's.
    """
    folder = Path(checkpoint_path)
    settings = tokenizer_settings(folder)
    source, where = find_source(folder, settings)
    if not source:
        return None
    names = {i: name for name, i in tokenizer.added_ids.items()}
    ends = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(eos_ids), None)}
    special_tokens = {key: None if i is None else names.get(i) for key, i in ends.items()}
    special_tokens |= {key: token_name(value) for key, value in named_special(settings).items()}
    strings = {key: name for key, name in special_tokens.items() if name is not None}
    return ChatTemplate(source, strings, str(where), kwargs)


def find_source(folder: Path, settings: dict[str, Any]) -> tuple[str | None, Path]:
    """Return the template's text and the file it is from, in the order in which `transformers` looks for it."""
    if (path := own_file(folder, "chat_template.jinja")).is_file():
        try:
            return path.read_text(encoding="utf-8"), path
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); download it again") from None
    path, source = folder / "tokenizer_config.json", settings.get("chat_template")
    if source is None:
        path = folder / "chat_template.json"
        source = read_settings(folder, path.name).get("chat_template")
    if isinstance(source, list):  # several, each with its name
        source = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
    if isinstance(source, dict):
        by_name = source
        if "default" not in by_name:
            raise ValueError(f"{path}: chat_template has {sorted(map(str, by_name))} and none is named 'default'")
        source = by_name["default"]
    if source is not None and not isinstance(source, str):
        raise ValueError(f"{path}: chat_template is a {type(source).__name__}, expected a text or a list of named ones")
    return source, path
