"""Speculation: one target decoding plainly and with each drafter, in turns; bench.run --speculate measures it.

Random weights have no drafts worth accepting. For them each draft is accepted by chance, which times the machinery and
writes nonsense; that is here, and no command of the project can reach it. Or the text is known before: the target
computes as ever, and then that text says what it chose. So bench.run --only editing measures what drafts found in the
text are worth, whatever a model's taste.
"""

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import speculate
from bench.results import ROOT, Rung
from bench.runner import GREEDY, PROMPT, Runner, Steps, make_steps, setup_caches, time_median
from bench.subject import Subject
from checkpoint import load_model
from cli.options import encode_prompt
from cli.template import load_template
from drafters import Drafter, Proposal, expected_tokens, levels_below
from eagle import Head
from eagle_checkpoint import load_head, random_head
from model import Transformer
from speculate import Speculation, count_leading
from steps import Text, likeliest, prefill
from suffix import Suffixes
from tokenizer import load_tokenizer

NUM_CHANGES = 10
FILE_IDS, FREE_IDS = 2000, 512  # of the file to repeat, and of a text without a copy
EDITING_LENGTH = 2 * FILE_IDS + 512  # of the caches
ACCEPTANCE = 0.75
SHORTEST = 128  # tokens of a sample: fewer are a matter of luck
DEMO = ROOT / "checkpoints" / "demo"
DEMO_MODES = {"demo": "compile", "demo-eager": "eager"}
# Several beginnings for the demo, which after a while repeats itself: then a draft is always right, or always wrong.
DEMO_TEXTS = {
    "code": [
        "class Stack:\n    def __init__(self, items=None):\n", "import os\nimport sys\n\ndef main(",
        "def read_file(path):\n    ", "    if not isinstance(", "class Parser:\n", "    for name, value in ",
        "import re\n\n_pattern = re.compile(", "def __repr__(self):\n    return ",
    ],
    "free text": [
        '"""This module provides', "# The first argument is", '    """Return the', "# Note that this",
        '"""Create a new', "# If the file", "    # This is called when", '    """A class that',
    ],
}  # fmt: skip
CHAT_TEXTS = {
    "chat": ["What is the capital of France, and why is it famous?", "How do I boil an egg?"],
    "editing": [
        "Write this code again, with the name `total` changed to `amount`:\n\n"
        + "".join(f"def add_{word}(total, {word}):\n    total = total + {word}\n    return total\n\n\n"
                  for word in ("price", "tax", "discount", "shipping", "refund", "tip")),
        "Correct the spelling:\n\nThe libary is opn from nine to five. On saturday the libary is opn from ten to four. "
        "On sunday it is closd. Who wants to borow a book needs a card, and who has no card can ask for one.",
    ],
    "free text": ["Write a short story about a lighthouse keeper.", "Describe a walk through a forest in autumn."],
}  # fmt: skip


def accept_by_chance(
    logits: Tensor, drafted: Tensor, q: Tensor | None, sampling: Any, noise: Any
) -> tuple[Tensor, Tensor]:
    """Accept each draft with probability ACCEPTANCE, whatever it is; the id that follows is the target's choice."""
    accepted = torch.rand(drafted.shape, device=drafted.device) < ACCEPTANCE
    return count_leading(accepted), torch.where(F.pad(accepted, (0, 1)), F.pad(drafted, (0, 1)), likeliest(logits))


@dataclass
class Watched:
    """A drafter, how long it takes on the host, and what becomes of its drafts, by their place."""

    drafter: Drafter = field(init=False)
    seconds: float = 0.0
    tried: Counter[int] = field(default_factory=Counter)  # those before which all were right
    right: Counter[int] = field(default_factory=Counter)

    def begin(self, target: Transformer, num_rows: int) -> None:
        self.drafter.begin(target, num_rows)

    def propose(self, texts: list[Text]) -> Proposal | int:
        began = time.perf_counter()
        proposal = self.drafter.propose(texts)
        self.seconds += time.perf_counter() - began
        return proposal

    def note(self, proposal: Proposal, texts: list[Text], counts: list[int]) -> None:
        for n, length in zip(counts, proposal.lengths, strict=True):
            self.tried.update(range(min(n + 1, length)))
            self.right.update(range(min(n, length)))
        self.drafter.note(proposal, texts, counts)


@dataclass
class Way:
    """A way to decode: plainly, or with drafts of a model, of the text or of either."""

    name: str
    runner: Runner
    draft_model: Transformer | None = None
    lookup: bool = False
    levels: tuple[int, ...] = ()  # one number is a fixed k; (): it adapts
    index: type = Suffixes  # of the text
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def fixed_k(self) -> int:
        return self.levels[0] if len(self.levels) == 1 else 0

    def speculation(self) -> Speculation | None:
        if not (self.draft_model or self.lookup):
            return None
        if self.draft_model:
            setup_caches(self.draft_model, 1, self.runner.length)
        speculation = self.runner.speculation(self.draft_model, lookup=self.lookup, levels=self.levels)
        if self.index is not Suffixes:
            speculation.drafter.indexes = [self.index()]  # type: ignore[attr-defined]
        return speculation

    def decode(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        """Decode so many tokens after each of the prompts."""
        watched, elapsed, num_timed, num_drafted, counts = Watched(), 0.0, 0, 0, [0]
        for prompt in prompts:
            if speculation := self.speculation():
                watched.drafter, speculation.drafter = speculation.drafter, watched
            steps = self.runner.generate([prompt], num_tokens, speculation=speculation)
            arrivals, lengths = zip(*((time.perf_counter(), len(ids)) for [ids] in steps), strict=True)
            # From the first round's end, since it prefills the draft, to the last but one's, since that may be cut.
            elapsed += arrivals[-2] - arrivals[1]
            num_timed += sum(lengths[2:-1])
            if speculation:
                counts = [*map(sum, zip_longest(counts, *speculation.accept_counts, fillvalue=0))]
                num_drafted += speculation.num_drafted
        figures = {"tok_per_s": num_timed / elapsed, "accept_counts": counts, "num_drafted": num_drafted}
        tried, right = list(watched.tried.values()), list(watched.right.values())
        return figures | {"propose_s": watched.seconds, "tried": tried, "right": right}

    @torch.inference_mode()
    def time_parts(self, end: int, count: int) -> dict[str, float]:
        """Time a plain step and, where k is fixed, the drafting of a round, each in a run of its own."""
        runner, draft_model, k = self.runner, self.draft_model, self.fixed_k
        parts = {"decode_ms": runner.step_at(end - 1)}
        if draft_model and k:
            setup_caches(draft_model, 1, runner.length)
            if isinstance(draft_model, Head):
                draft_model.follow_(runner.model)
            latest = runner.last(end, k + 1 if isinstance(draft_model, Head) else 2, k)
            rest = *latest, GREEDY, None, k, runner.model.config.vocab_size
            parts["draft_ms"] = replace(runner, model=draft_model).as_engine("draft", k + 1, *rest)
        return {name: time_median(part, runner.device, count) for name, part in parts.items()}

    def figures(self, sample: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
        """Return what a sample says beside the plain one of its turn, since the machine's own speed moves between them.

        The formula is the paper's (section 3.3) for a fixed k. For drafts found in the text it has the tokens counted.
        """
        found = {"tok_per_s": sample["tok_per_s"], "speedup": sample["tok_per_s"] / plain["tok_per_s"]}
        if not sample["tried"]:
            return found
        rounds, a, k = sum(sample["accept_counts"]), sum(sample["right"]) / sum(sample["tried"]), self.fixed_k
        tokens, drafts = tokens_a_round(sample), sample["num_drafted"] / rounds  # of the rounds some are plain steps
        found |= {"tokens_a_round": tokens, "drafts_a_round": drafts, "a": a}
        cost = sample.get("draft_ms", 1e3 * sample["propose_s"] / rounds) / sample["decode_ms"]  # of a round, in steps
        if k or not self.draft_model:
            formula = (expected_tokens(a, k) if k else tokens) / (1 + cost)
            share = found["speedup"] / formula
            found |= {"c": cost / (k or drafts), "formula": formula, "share_of_formula": share}
        return found


def tokens_a_round(sample: dict[str, Any]) -> float:
    return 1 + sum(n * count for n, count in enumerate(sample["accept_counts"])) / sum(sample["accept_counts"])


@dataclass
class Duel:
    """The ways to decode one target, in turns; the first is the plain one."""

    name: str
    ways: list[Way]
    prompts: list[list[int]]
    num_tokens: int  # after each of them
    accept: Callable[..., tuple[Tensor, Tensor]] = speculate.accept

    def sample(self, way: Way, turn: int, count: int) -> dict[str, Any]:
        torch.manual_seed(turn)  # where chance accepts, the n-th sample of every way has the same luck
        with patch.object(speculate, "accept", self.accept):
            parts = way.time_parts(len(self.prompts[0]) + self.num_tokens // 2, count) if count else {}
            return way.decode(self.prompts, self.num_tokens) | parts

    def run(self, num_samples: int) -> list[dict[str, Any]]:
        for turn in range(num_samples + 1):
            for way in self.ways:
                sample = self.sample(way, turn, self.num_tokens // 8)
                way.samples += [sample] if turn > 0 else []  # the first warms up and compiles
        return [self.summarize(way) for way in self.ways]

    def summarize(self, way: Way) -> dict[str, Any]:
        turns = [way.figures(*pair) for pair in zip(way.samples, self.ways[0].samples, strict=True)]
        entry: dict[str, Any] = {"target": self.name, "drafts": way.name, "k": way.fixed_k or "adapts"}
        entry |= {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
        last = way.samples[-1]
        by_place = [n / count for n, count in zip_longest(last["right"], last["tried"], fillvalue=0)]
        return entry | {"acceptance": by_place, "samples": way.samples}


# ---------------------------------------------------------------------------------------------------------------------
# The duels


def make_runner(model: Transformer, mode: str, num_tokens: int) -> Runner:
    """Return a runner with caches for texts of so many tokens. Prefill is eager, as it is in generate.py."""
    steps = make_steps(mode, str(model.device)) | {"prefill": prefill}
    return Runner(model, steps, 64 * (2 + num_tokens // 64))


def demo_duels(mode: str, device: str, num_tokens: int, ks: list[int]) -> Iterator[Duel]:
    """Yield the duels of the demo, with real drafts of every kind."""
    tokenizer = load_tokenizer(DEMO)
    target, tapped, draft_model = (load_model(path, device) for path in (DEMO, DEMO, ROOT / "checkpoints/demo-draft"))
    head = load_head(ROOT / "checkpoints/demo-eagle3", tapped)
    plain, with_taps = (make_runner(model, mode, num_tokens) for model in (target, tapped))
    for kind, texts in DEMO_TEXTS.items():
        ways = [Way("none", plain), *(Way("draft model", plain, draft_model, levels=(k,)) for k in ks)]
        ways += [Way("head", with_taps, head, levels=levels) for levels in (*((k,) for k in ks), ())]
        ways += [Way("suffix", plain, lookup=True), Way("head and suffix", with_taps, head, lookup=True)]
        yield Duel(f"demo, {kind}, {mode}", ways, [tokenizer.encode(text) for text in texts], num_tokens)


def shapes_duels(subject: Subject, device: str, num_tokens: int, ks: list[int]) -> Iterator[Duel]:
    """Yield the duels of the subject, in each form of its weights, with a head of its shapes and drafts by chance."""
    raw = subject.raw | {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1}
    for weights in subject.forms:
        target, tapped = (subject.model(weights, device) for _ in range(2))
        head = random_head(raw, tapped)
        plain, with_taps = (make_runner(model, "compile", num_tokens) for model in (target, tapped))
        ways = [Way("none", plain), *(Way("head", with_taps, head, levels=(k,)) for k in ks)]
        name = f"{subject.name}, {weights or subject.dtype_name}, each draft accepted with probability {ACCEPTANCE}"
        yield Duel(name, ways, [PROMPT], num_tokens, accept_by_chance)


def chat_duels(path: Path, device: str, num_tokens: int) -> Iterator[Duel]:
    """Yield the duels of a model made for chat, with drafts that are found in its text."""
    target, tokenizer = load_model(path, device), load_tokenizer(path)
    template = load_template(path, tokenizer)
    for kind, texts in CHAT_TEXTS.items():
        prompts = [encode_prompt(text, None, tokenizer, template) for text in texts]
        runner = make_runner(target, "compile", num_tokens + max(map(len, prompts)))
        ways = [Way("none", runner), Way("suffix", runner, lookup=True)]
        yield Duel(f"{path.name}, {kind}, compile", ways, prompts, num_tokens)


def make_duels(what: str, subject: Subject, device: str, num_tokens: int, ks: list[int]) -> Iterator[Duel]:
    """Yield the duels of the demo, of the subject's shapes, or of a folder with a model made for chat."""
    num_tokens = max(SHORTEST, num_tokens)
    if what in DEMO_MODES:
        return demo_duels(DEMO_MODES[what], device, num_tokens, ks)
    if what == "shapes":
        return shapes_duels(subject, device, num_tokens, ks)
    return chat_duels(Path(what), device, num_tokens)


def describe(entry: dict[str, Any]) -> str:
    text = f"  {entry['drafts']:16} k {entry['k']:6} {entry['tok_per_s']:8.2f} tok/s  {entry['speedup']:5.2f}x"
    text += "  {tokens_a_round:.2f} tokens a round, a {a:.2f}".format(**entry) if "a" in entry else ""
    if "formula" in entry:
        text += "  c {c:.3f}  formula {formula:.2f}x  {share_of_formula:.0%} of it".format(**entry)
    return text


# ---------------------------------------------------------------------------------------------------------------------
# A text that is known before


def replay(steps: Steps, text: Tensor) -> Steps:
    """Return steps that compute as ever and choose what a text says, [N] ids and some more to draft behind its end."""

    def prefill(model: Any, tokens: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        steps["prefill"](model, tokens, positions, *rest)
        return text[positions[:, -1] + 1]

    def decode(model: Any, tokens: Tensor, positions: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        steps["decode"](model, tokens, positions, *rest)
        return text[positions + 1], positions + 1

    def verify(model: Any, tokens: Tensor, positions: Tensor, slots: Tensor, drafts: Tensor, *rest: Any) -> Tensor:
        steps["draft_and_verify"](model, tokens, positions, slots, drafts, *rest)
        following = text[positions[:, -1:] + torch.arange(1, drafts.shape[1] + 2, device=positions.device)]
        return torch.cat((count_leading(drafts == following[:, :-1]).unsqueeze(1), following), dim=1)

    return steps | {"prefill": prefill, "decode": decode, "draft_and_verify": verify}


class Ngrams:
    """Where each n-gram of a text last ended: prompt lookup as it mostly is, to compare `suffix.Suffixes` with."""

    SIZES = (3, 2)

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}  # of those before the text's last

    def extend(self, ids: list[int]) -> None:
        for i in ids:
            self.ends |= {tuple(self.ids[-size:]): len(self.ids) for size in self.SIZES if len(self.ids) >= size}
            self.ids.append(i)

    def continuation(self, most: int) -> list[int]:
        ends = [self.ends[gram] for size in self.SIZES if (gram := tuple(self.ids[-size:])) in self.ends]
        period = len(self.ids) - ends[0] if ends else 0
        return [self.ids[ends[0] + i % period] for i in range(most)] if ends else []


def change(lines: list[str]) -> list[str]:
    """Return lines with NUM_CHANGES changes, evenly spread: a word is another, a line is gone, a line is new."""
    lines = list(lines)
    for n in reversed(range(NUM_CHANGES)):  # from the end, so that the places before it stay
        at = (2 * n + 1) * len(lines) // (2 * NUM_CHANGES)
        longest = max(re.findall(r"\w+", lines[at]), key=len, default="")
        lines[at : at + 1] = [
            [lines[at].replace(longest, f"other_{n}") if longest else f"other_{n}\n"],
            [],
            [lines[at], f"    # and {n} more\n"],
        ][n % 3]
    return lines


def make_texts() -> dict[str, tuple[list[int], list[int]]]:
    """Return prompts and what follows them, in the demo's ids: a file and the file changed, prose, and noise."""
    tokenizer = load_tokenizer(ROOT / "checkpoints" / "demo")

    def encode(lines: list[str]) -> list[int]:
        return tokenizer.encode("".join(lines), bos=False)

    lines = (ROOT / "engine.py").read_text().splitlines(keepends=True)
    while len(file := encode(lines)) > FILE_IDS:
        lines.pop()
    prose = encode([(ROOT / "docs" / "design.md").read_text()])[: 2 * FREE_IDS]
    noise = torch.randint(tokenizer.vocab_size, (FREE_IDS,), generator=torch.Generator().manual_seed(0)).tolist()
    return {
        "editing": (file, encode(change(lines))),
        "prose": (prose[:FREE_IDS], prose[FREE_IDS:]),
        "no repetition": (prose[:64], noise),
    }


def editing_ways(runner: Runner, prompt: list[int], answer: list[int]) -> list[Way]:
    """Return the ways to write an answer that is known, the plain one first."""
    text = torch.tensor(prompt + answer + [0] * 64, device=runner.device)
    known = replace(runner, steps=replay(runner.steps, text))
    ngrams = Way("n-grams", known, lookup=True, levels=levels_below(5), index=Ngrams)
    return [Way("plain", known), ngrams, Way("suffixes", known, lookup=True)]


def editing_rungs(name: str, weights: str, runner: Runner) -> Iterator[Rung]:
    """Yield how fast each way is, and how many tokens a forward of the target gave it just then."""

    def measure(way: Way, prompt: list[int], num_tokens: int) -> float:
        way.samples.append(way.decode([prompt], num_tokens))
        return way.samples[-1]["tok_per_s"]

    def last_tokens(way: Way) -> float:
        return tokens_a_round(way.samples[-1])

    for task, (prompt, answer) in make_texts().items():
        for way in editing_ways(runner, prompt, answer):
            title, run = f"{name}, {task}, {way.name}", partial(measure, way, prompt, len(answer))
            yield Rung(title, "tok/s", run, weights, against=f"{name}, {task}, plain")
            if way.lookup:
                yield Rung(f"{title}, a forward", "tok", partial(last_tokens, way), weights)
