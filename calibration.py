"""The text that GPTQ is calibrated on: a file's, or what the model itself writes where none is named.

A calibration text has to look like what the model will read. No text suits every checkpoint, and none is at hand
without a download; but a model writes what it was trained on. Data-free as in arXiv:2305.17888: a first token drawn
from the whole vocabulary, the rest sampled from the model. Of a chat model, half of the windows begin where the user
speaks: it writes questions, and its answers (arXiv:2406.08464).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine import check_ids, generate
from model import Transformer
from steps import Sampling
from tokenizer import Tokenizer

NUM_WINDOWS, WINDOW = 64, 512  # by default
ROWS = 8  # that are written at a time
SEED = 0


def cut_windows(text: str, tokenizer: Tokenizer, num: int, length: int, vocab_size: int) -> Tensor:
    """Return windows [num, length] that lie evenly in a text, each with BOS; fewer where it is short.

    Raises ValueError where it has not even one.
    """
    bos, ids = tokenizer.encode(""), tokenizer.encode(text, bos=False)
    size = max(1, length - len(bos))
    available = len(ids) // size
    if available == 0:
        raise ValueError(
            f"the calibration text has {len(ids)} tokens, a window takes {size}; give a longer --calibration_file or "
            "a smaller --calibration_length"
        )
    check_ids(ids, vocab_size, "the calibration text")
    num = min(num, available)
    starts = [size * (available * n // num) for n in range(num)]
    return torch.tensor([bos + ids[start : start + size] for start in starts])


def write_windows(
    model: Transformer,
    tokenizer: Tokenizer,
    num: int,
    length: int,
    chat_opening: Sequence[int] = (),
    tick: Callable[[], Any] = lambda: None,
    seed: int = SEED,
) -> Tensor:
    """Have a model write windows [num, length], the same on each call.

    chat_opening: the ids before a user's first message; () for a model without a chat template. `tick` is called after
    each token of ROWS windows.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    ordinary = [i for i, text in tokenizer.token_bytes.items() if text and i < model.config.vocab_size]
    drawn = torch.randint(len(ordinary), (num,), generator=torch.Generator().manual_seed(seed)).tolist()
    bos = tokenizer.encode("")
    openings = [[*bos, ordinary[i]] for i in drawn]
    if 0 < len(chat_opening) < length:
        openings[::2] = [list(chat_opening)] * len(openings[::2])
    windows: list[list[int]] = []
    model.setup_caches(min(ROWS, num), length)
    for begin in range(0, num, ROWS):
        rows = openings[begin : begin + ROWS]
        for new_ids in generate(model, rows, length, Sampling(temperature=1.0), generator=generator):
            rows = [[*row, *ids] for row, ids in zip(rows, new_ids, strict=True)]
            tick()
        windows += [row[:length] for row in rows]
    return torch.tensor(windows)
