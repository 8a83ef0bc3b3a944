"""One row of a sample: its text as it comes, up to the end-of-text token or a stop text, and when it came."""

import time
from dataclasses import dataclass, field
from typing import Any

from tokenizer import TextStream


@dataclass
class Row:
    """One row of a sample: what has come of it so far, and what the metrics report."""

    prompt_ids: list[int]
    stream: TextStream | None
    stops: list[str]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    pending: str = ""  # decoded, but perhaps the beginning of a stop text
    finish_reason: str | None = None
    began: float = field(default_factory=time.perf_counter)
    arrivals: list[float] = field(default_factory=list)
    accept_counts: list[int] = field(default_factory=list)  # as in `Speculation`
    num_drafted: int = 0
    num_cached: int = 0  # of the prompt's ids, those that the model's caches held before

    def push(self, ids: list[int], eos_ids: tuple[int, ...]) -> str:
        """Take the row's new ids; return the text that is now certain."""
        if self.finish_reason or not ids:
            return ""
        self.arrivals.append(time.perf_counter())
        ready = ""
        for token in ids:
            self.tokens.append(token)
            if token in eos_ids:
                return ready + self.finish("eos")
            ready += self._release(self.stream.push([token]) if self.stream else "")
            if self.finish_reason:  # a stop: the ids after it are not part of the text
                break
        return ready

    def finish(self, reason: str) -> str:
        """End the row, for `reason` unless it has ended already; return the rest of its text."""
        if self.finish_reason:
            return ""
        self.finish_reason = reason
        return self._release(self.stream.flush() if self.stream else "", last=True)

    def finish_full(self, max_new_tokens: int) -> str:
        """End the row, unless it has ended already: it has all tokens that were asked for, or fills the caches."""
        return self.finish("length" if len(self.tokens) >= max_new_tokens else "context")

    def _release(self, piece: str, last: bool = False) -> str:
        self.pending += piece
        ends = [end for stop in self.stops if (end := self.pending.find(stop)) >= 0]
        if ends:
            self.finish_reason = "stop"
            ready, self.pending = self.pending[: min(ends)], ""
        else:
            certain = len(self.pending) - (0 if last else num_pending(self.pending, self.stops))
            ready, self.pending = self.pending[:certain], self.pending[certain:]
        self.text += ready
        return ready

    @property
    def ttft_s(self) -> float | None:
        return self.arrivals[0] - self.began if self.arrivals else None

    @property
    def decode_s(self) -> float | None:
        return self.arrivals[-1] - self.arrivals[0] if len(self.arrivals) > 1 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        return self.decode_s and (len(self.tokens) - 1) / self.decode_s

    @property
    def steps_per_s(self) -> float | None:
        """Forwards of the model a second: as many as tokens, or fewer where drafts were accepted."""
        return self.decode_s and (len(self.arrivals) - 1) / self.decode_s

    @property
    def tokens_per_round(self) -> float | None:
        if not self.accept_counts or len(self.arrivals) < 2:
            return None
        return (len(self.tokens) - 1) / (len(self.arrivals) - 1)

    def metrics(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "text": self.text,
            "prompt_tokens": len(self.prompt_ids),
            "new_tokens": len(self.tokens),
            "finish_reason": self.finish_reason,
            "ttft_ms": self.ttft_s and self.ttft_s * 1e3,
            "prefill_tokens_per_s": self.ttft_s and (len(self.prompt_ids) - self.num_cached) / self.ttft_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "accept_counts": self.accept_counts,
            "num_drafted": self.num_drafted,
        }


def num_pending(text: str, stops: list[str]) -> int:
    """Return the length of the longest end of text that a stop text begins with."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0
