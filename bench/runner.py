"""How decoding is timed: `Runner` does it with our model, its caches and its steps, `Peer` with another project's."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial, reduce
from typing import Any

import torch
from torch import Tensor

from cli.report import slot_bytes, step_weight_bytes
from engine import generate
from kernels.cpu import empty_weight, own_threads
from model import Transformer
from speculate import Speculation, draft, draft_and_verify, verify
from steps import SLOTS_STEP, Sampling, compiled, decode, prefill, visible_slots

GREEDY = Sampling(temperature=0)
PROMPT = [1, 2, 3, 4, 5, 6]
NUM_STEPS = 30  # of a sample at a position, when others are compared
Steps = dict[str, Callable[..., Any]]  # by name


def time_call(run: Callable[[], Any], device: str) -> float:
    """Time a call; on a GPU from when it has nothing else to do until it is done."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def time_median(run: Callable[[], Any], device: str, count: int = 10) -> float:
    """Return the median milliseconds of `count` calls, after one that warms up.

    On a GPU, of three runs of `count` calls, between which it is not waited for: as when text is generated.
    """
    calls, runs = (count, 3) if device.startswith("cuda") else (1, count)

    def several() -> None:
        for _ in range(calls):
            run()

    several()
    return statistics.median(time_call(several, device) / calls for _ in range(runs)) * 1e3


def measure_roof(device: str) -> dict[str, float]:
    """Return the best of several: how fast memory is streamed, in GB/s, and bf16 GEMM, in TFLOP/s.

    On a CPU 1 GiB is read, on a GPU copied, which counts as read and written. Matrices are 2048 or 8192 wide, and in
    fp32 on a CPU without instructions for bf16, where bf16 takes minutes.
    """
    on_gpu = device.startswith("cuda")
    data = empty_weight((2**28,), torch.float32, device).fill_(1)
    copy = torch.empty_like(data) if on_gpu else data
    size = 8192 if on_gpu else 2048
    is_narrow = on_gpu or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if is_narrow else torch.float32)
    stream, multiply = (lambda: copy.copy_(data)) if on_gpu else data.sum, lambda: a @ a
    # Of four, since on a GPU the first one loads the library.
    stream_s, product_s = (min(time_call(run, device) for _ in range(4)) for run in (stream, multiply))
    name, num_bytes = ("copy_gb_per_s", 2 * data.nbytes) if on_gpu else ("read_gb_per_s", data.nbytes)
    return {name: num_bytes / stream_s / 1e9, "gemm_tflop_per_s": 2 * size**3 / product_s / 1e12}


def decode_mode(device: str) -> str | None:
    return "reduce-overhead" if device.startswith("cuda") else None


@cache
def make_steps(mode: str, device: str) -> Steps:
    """Return the steps by name, eager or compiled; all models of a process share their graphs."""
    steps: Steps = {step.__name__: step for step in (prefill, decode, verify, draft, draft_and_verify)}
    if mode == "eager":
        return steps
    return {name: compiled(step, None if step is prefill else decode_mode(device)) for name, step in steps.items()}


def setup_caches(model: Transformer, num_rows: int, length: int) -> None:
    """Give a model such caches, unless it has them."""
    cache = model.layers[0].self_attn.cache
    if cache is None or model.max_seq_length != length or cache.k.shape[0] != num_rows:
        model.setup_caches(num_rows, length)


@dataclass
class Runner:
    """A model, its steps, and caches of `length` for `num_rows`, which it gets when it is run."""

    model: Transformer
    steps: Steps
    length: int
    num_rows: int = 1

    @property
    def device(self) -> str:
        return str(self.model.device)

    def prepare(self) -> None:
        """Set up the caches, where another runner of the model has left others, and let the ranks begin together."""
        setup_caches(self.model, self.num_rows, self.length)
        self.model.ranks.all_reduce(torch.ones(1, device=self.device))

    def generate(
        self, prompts: list[list[int]], num_tokens: int, sampling: Sampling = GREEDY, **options: Any
    ) -> Iterator[list[list[int]]]:
        self.prepare()
        steps: dict[str, Any] = {name: self.steps[name] for name in ("prefill", "decode")}
        return generate(self.model, prompts, num_tokens, sampling, **steps | options)

    def speculation(self, draft_model: Transformer | None, **options: Any) -> Speculation:
        steps: dict[str, Any] = {name: self.steps[name] for name in ("prefill", "draft_and_verify")}
        return Speculation(draft_model, **steps, **options)

    def decode(self, num_tokens: int) -> float:
        """Return tokens a second, of all rows together, of plain greedy decoding after a prompt of 6 tokens."""
        prompts = [PROMPT] * self.num_rows
        # The prompt is not timed, and need not be compiled.
        arrivals = [time.perf_counter() for _ in self.generate(prompts, num_tokens, prefill=prefill)]
        return self.num_rows * (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])

    def prefill(self, length: int) -> float:
        """Return prompt tokens a second until the first new token is known."""
        prompt = [i % self.model.config.vocab_size for i in range(length)]
        new_ids = self.generate([prompt], 1)
        return length / time_call(lambda: list(new_ids), "cpu")

    def decode_at(self, position: int) -> float:
        """Return tokens a second of steps that all stand at one position."""
        step = self.step_at(position)
        step()
        return NUM_STEPS / time_call(lambda: [step() for _ in range(NUM_STEPS)], self.device)

    def time_step(self, position: int, count: int = 10) -> float:
        return time_median(self.step_at(position), self.device, count)

    def time_verify(self, end: int, k: int) -> float:
        """Return the milliseconds of one forward over the last token of a text and k drafts, accepting included."""
        self.prepare()
        with torch.inference_mode():
            drafted, text = torch.ones(1, k, dtype=torch.long, device=self.device), self.last(end, 2, k)
        return time_median(self.as_engine("verify", 1 + k, *text, drafted, GREEDY, None, None), self.device)

    def step_at(self, position: int) -> Callable[[], Any]:
        """Return a decode step at a position to call, whatever the cache holds before it."""
        self.prepare()
        with torch.inference_mode():
            tokens, positions, slots = self.last(position + 1, 1, 0)
            return self.as_engine("decode", 1, tokens[0], positions[0], slots, GREEDY, None)

    def as_engine(self, step: str, num_rows: int, *args: Any) -> Callable[[], Any]:
        """Return a step of so many rows of x to call as the engine does."""
        call = torch.inference_mode()(own_threads(num_rows, self.model)(self.steps[step]))
        return partial(call, self.model, *args)

    def last(self, end: int, count: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last ids of a text and their positions, [1, count] each, and the slots that k drafts need."""
        positions = torch.arange(end - count, end, device=self.device).unsqueeze(0)
        slots = visible_slots(torch.arange(self.length, device=self.device), end + k)
        return torch.ones_like(positions), positions, slots

    def count_step_bytes(self, position: int) -> int:
        """Return the bytes that a step at a position reads, of this rank: weights, keys and values."""
        slots = visible_slots(torch.arange(position + 1 + SLOTS_STEP), position + 1)
        return step_weight_bytes(self.model) + len(slots) * slot_bytes(self.model)

    def count_prefill_flops(self, length: int) -> float:
        """Return the operations a token of a prompt, of this rank: of the blocks and of causal attention."""
        config = self.model.config
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        weights = config.hidden_size * (2 * q_size + 2 * kv_size + 3 * config.intermediate_size)
        return config.num_hidden_layers * (2 * weights + 2 * q_size * length) / self.model.ranks.count


class Peer:
    """One that is called a forward a token: ids [1, S] in, the likeliest next one out, [1, 1]."""

    def __init__(self, device: str):
        self.device, self.num_filled = device, 0  # slots of its cache

    def forward(self, ids: Tensor) -> Tensor:
        """Run ids after those that the cache holds."""
        raise NotImplementedError

    def step(self, ids: Tensor) -> Tensor:
        """As `forward`, of one id."""
        return self.forward(ids)

    def keep(self, length: int) -> None:
        """Forget what the cache holds from position `length` on."""
        self.num_filled = length

    def repeat(self, ids: Tensor, count: int) -> float:
        """Decode `count` tokens after ids [1, 1]; return how many a second."""
        steps = partial(reduce, lambda ids, _: self.step(ids), range(count), ids)
        return count / time_call(steps, self.device)

    def decode(self, num_tokens: int) -> float:
        self.keep(0)
        return self.repeat(self.forward(torch.tensor([PROMPT], device=self.device)), num_tokens - 1)

    def decode_at(self, position: int) -> float:
        if self.num_filled < position:
            self.keep(0)
            self.forward(torch.ones(1, position, dtype=torch.long, device=self.device))
        for count in (1, NUM_STEPS):  # the first warms up
            self.keep(position)
            rate = self.repeat(torch.tensor([[1]], device=self.device), count)
        return rate

    def prefill(self, length: int) -> float:
        prompt = torch.ones(1, length, dtype=torch.long, device=self.device)
        self.keep(0)
        return length / time_call(lambda: self.forward(prompt), self.device)
