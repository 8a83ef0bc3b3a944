"""A conversation with a model: its history as ids, which of them the caches hold, and the terminal.

    python generate.py --checkpoint_path DIR --interactive --system "Answer briefly."

A model with a chat template is asked through it; one without continues the text, each line after the last. A turn
prefills only what the model's caches do not hold yet.
"""

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cli.ranks import from_rank_0
from cli.report import note_drafts, report_rows
from cli.template import MARK, ChatTemplate, Message
from engine import Engine
from model import Ranks
from rows import Row
from tokenizer import TextStream, Tokenizer, check_unicode

HELP = "/reset begins anew, /help says so, /quit or Ctrl-D ends"


# ---------------------------------------------------------------------------------------------------------------------
# Ids of a conversation


class SpecialNames:
    """The names of a tokenizer's added tokens, as patterns that find them in a text."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None):
        names = sorted(tokenizer.added_ids, key=len, reverse=True)
        names = [name for name in names if len(name.strip()) > 1]  # runs of spaces may be tokens of any text
        controls = [name for name in names if not tokenizer.token_bytes.get(tokenizer.added_ids[name])]
        # Others, such as tags of HTML, are for people too, but where the template says something with them.
        kept = [name for name in names if name in controls or (template and name in template.source)]
        self.all, self.controls, self.kept = map(one_of, (names, controls, kept))
        self.marked = one_of([name[0] + MARK + name[1:] for name in names])

    def quote(self, message: Message) -> Message:
        """Return the message with names in its content marked: those of tokens that are the template's to write.

        In an answer only those of tokens that are never shown: the template may look for </think>.
        """
        names = self.controls if message["role"] == "assistant" else self.kept
        content = message["content"].replace(MARK, "")
        return {**message, "content": names.sub(lambda name: f"{name[0][0]}{MARK}{name[0][1:]}", content)}


def one_of(names: list[str]) -> re.Pattern[str]:
    """Return the pattern of any of these names, the first that fits; what they are in is split at them."""
    return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")


def encode_rendered(tokenizer: Tokenizer, names: SpecialNames, text: str, follows: bool) -> list[int]:
    """Encode a rendered text, its special tokens to their ids but marked names as text. follows: other text is before.

    Around them it is encoded as `transformers` does it, without another BOS.
    """
    ids: list[int] = []
    for part in names.marked.split(text):  # [text, marked name, text, ..., marked name, text]
        if part:
            ids += encode_part(tokenizer, part, follows or bool(ids), parse_special=MARK not in part)
    return ids


def encode_part(tokenizer: Tokenizer, text: str, follows: bool, parse_special: bool) -> list[int]:
    text = text.replace(MARK, "")
    # A tokenizer that would put a space before the text puts it before one of these, with which the text is not merged.
    for lead in ("\n", ".", "x") if follows and tokenizer.strips_leading_space else ():
        before, ids = (tokenizer.encode_text(line, parse_special) for line in (lead, lead + text))
        if ids[: len(before)] == before:
            return ids[len(before) :]
    return tokenizer.encode_text(text, parse_special)


def system_messages(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]


def end_of_turn(template: ChatTemplate, tokenizer: Tokenizer, system: str | None) -> tuple[int, ...]:
    """Return the id of the added token that the template puts after an answer, () where it puts none.

    Marked as special or not: a model that was trained with the template writes it there. Raises ValueError where the
    template cannot render a conversation.
    """
    question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}
    names = SpecialNames(tokenizer).all
    # Some templates accept only what ends with the user, or end an answer only where the user goes on, and some accept
    # a single question.
    for turns in ([question, answer], [question, answer, question], [question]):
        try:
            text = template.render([*system_messages(system), *turns], add_generation_prompt=turns[-1] is question)
        except ValueError:
            if len(turns) == 1:
                raise
            continue
        _, mark, after = text.rpartition(MARK)  # no mark where the template leaves answers out
        if mark and (match := names.match(after.lstrip())):
            return (tokenizer.added_ids[match[0]],)
    return ()


class Turn(NamedTuple):
    ids: list[int]  # of the whole conversation up to the answer
    cached: int  # how many of them the model's caches hold
    num_dropped: int  # turns that were forgotten for room


class Refused(ValueError):
    """A message that cannot be taken in; the conversation may go on without it."""


class Conversation:
    """What was said, as messages and as ids.

    template None: the text is continued, each message on a new line. capacity: cache slots; reserve: those that an
    answer wants.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        system: str | None = None,
        capacity: int = 8192,
        reserve: int = 200,
    ):
        self.tokenizer, self.template, self.capacity = tokenizer, template, capacity
        self.reserve = min(reserve, capacity // 4)
        self.names = SpecialNames(tokenizer, template)
        self.system = system_messages(system)
        self.cached_ids: list[int] = []  # what the model's caches hold
        self.reset()

    def reset(self) -> None:
        self.messages = list(self.system)
        # The text of the conversation, and its ids: of an answer those that were generated, which need not be those
        # that its text is encoded to. Seams: where a beginning of the text (its length) is one of the ids (how many).
        self.text, self.ids, self.seams = "", list[int](), [(0, 0)]

    def ask(self, content: str) -> Turn:
        """Take in the user's message. Raises Refused where it cannot be, and ValueError where the template fails."""
        try:
            check_unicode(content)
        except ValueError as error:
            raise Refused(str(error)) from None
        messages = [*self.messages, {"role": "user", "content": content}]
        text, ids, seams = self._encode(messages)
        oldest, num_before = len(self.system), len(messages)
        if len(ids) + self.reserve > self.capacity:
            # Down to a half at once: what is left has to be prefilled again.
            while len(ids) > self.capacity // 2 and len(messages) > oldest + 1:
                del messages[oldest : oldest + 2]
                text, ids, seams = self._encode(messages)
        if len(ids) >= self.capacity:
            raise Refused(
                f"the message makes a prompt of {len(ids)} tokens and the conversation has room for {self.capacity}; "
                "shorten it"
            )
        self.messages, self.text, self.ids, self.seams = messages, text, ids, seams
        cached = min(shared_length(ids, self.cached_ids), len(ids) - 1)
        self.cached_ids = ids[:cached]
        return Turn(ids, cached, (num_before - len(messages)) // 2)

    def answered(self, row: Row) -> None:
        """Take in the answer to what was asked last, however it ended."""
        message = {"role": "assistant", "content": row.text}
        self.messages.append(message)
        if row.tokens:  # the last of them has been chosen, but was not run through the model
            self.cached_ids = [*self.ids, *row.tokens[:-1]]
        if row.finish_reason != "stop":  # there the tokens go on beyond the text
            self.text += self.names.quote(message)["content"]
            self.ids = self.ids + (row.tokens[:-1] if row.finish_reason == "eos" else row.tokens)
            self.seams.append((len(self.text), len(self.ids)))

    def _encode(self, messages: list[Message]) -> tuple[str, list[int], list[tuple[int, int]]]:
        """Return the text of the messages, its ids and its seams."""
        quoted = [self.names.quote(message) for message in messages]
        if self.template:
            text = self.template.render(quoted, add_generation_prompt=True)
        else:  # messages and answers in turn
            text = "".join(("\n" if i and i % 2 == 0 else "") + message["content"] for i, message in enumerate(quoted))
        seams = [(length, count) for length, count in self.seams if text.startswith(self.text[:length])]
        length, count = seams[-1]
        ids = self.ids[:count] + encode_rendered(self.tokenizer, self.names, text[length:], follows=length > 0)
        if self.template is None and length == 0 and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id, *ids]
        if not ids:
            raise ValueError(f"{self.template and self.template.where}: the chat template makes no text of a message")
        return text, ids, [*seams, (len(text), len(ids))]


def shared_length(a: list[int], b: list[int]) -> int:
    """Return how many ids two lists have in common before the first that differs."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))


# ---------------------------------------------------------------------------------------------------------------------
# The terminal


def read_line() -> str | None:
    """Read what the user types, edited and with a history on a terminal; None at the end of input."""
    prompt = "> "
    while True:
        try:
            if sys.stdin.isatty() and sys.stdout.isatty():
                with contextlib.suppress(ImportError):
                    import readline  # noqa: F401  # input() edits lines and keeps a history once this is there
                return input(prompt)
            if sys.stdin.isatty():
                print(prompt, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            return line.removesuffix("\n") if line else None
        except EOFError:
            print(file=sys.stderr)
            return None
        except UnicodeDecodeError as error:
            raise ValueError(f"the input is not UTF-8: {error}") from None
        except KeyboardInterrupt:  # it gives up the line, as a shell does
            print(file=sys.stderr)


@contextlib.contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed; pressed twice it raises KeyboardInterrupt."""
    pressed = False

    def handler(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def next_turn(conversation: Conversation, help_line: str) -> Turn | None:
    """Read lines until one is a message; None where the user ends the conversation."""
    while (line := read_line()) is not None:
        command = line.strip()
        if command == "/quit":
            return None
        if command == "/help":
            print(help_line, file=sys.stderr)
        elif command == "/reset":
            conversation.reset()
            print("the conversation begins anew", file=sys.stderr)
        elif command:
            try:
                with ctrl_c():  # a first one has nothing to stop
                    turn = conversation.ask(line)
            except Refused as error:
                if not sys.stdin.isatty():  # nobody is there to shorten it
                    raise
                print(f"error: {error}", file=sys.stderr)
                continue
            if turn.num_dropped:
                print(f"the context is full; oldest turns that are forgotten: {turn.num_dropped}", file=sys.stderr)
            return turn
    return None


def chat(
    conversation: Conversation, engine: Engine, stops: list[str], max_new_tokens: int, ranks: Ranks
) -> list[list[Row]]:
    """Talk until the user ends it; return a row for each answer. Of several ranks, rank 0 reads and prints."""

    def show(text: str) -> None:
        if ranks.rank == 0:
            print(text, end="", flush=True)

    samples = []
    help_line = f"Ctrl-C stops an answer, {HELP}" if ranks.count == 1 else HELP
    if sys.stdin.isatty() and ranks.rank == 0:
        if conversation.template is None:
            print("the model has no chat template: it continues the text, each line after the last", file=sys.stderr)
        print(help_line, file=sys.stderr)
    while (turn := from_rank_0(lambda: next_turn(conversation, help_line), ranks)) is not None:
        row = Row(turn.ids, TextStream(conversation.tokenizer, turn.ids), stops, num_cached=turn.cached)
        # Of several ranks a Ctrl-C ends all.
        with ctrl_c() if ranks.count == 1 else contextlib.nullcontext(lambda: False) as pressed:
            for [ids] in engine.run([turn.ids], max_new_tokens, cached=turn.cached):
                show(row.push(ids, engine.eos_ids))
                if row.finish_reason or pressed():
                    break
            show((row.finish("Ctrl-C") if pressed() else row.finish_full(max_new_tokens)) + "\n")
            note_drafts([row], engine)
            samples.append([row])
            if ranks.rank == 0:
                conversation.answered(row)
                report_rows([row], conversation.capacity)
    return samples
