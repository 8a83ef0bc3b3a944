"""Train checkpoints/demo-eagle3: an EAGLE-3 head that drafts for checkpoints/demo (arXiv:2503.01840).

The texts are the modules that the demo was trained on, and what it writes itself after beginnings of them. The head
learns the demo's distribution by EAGLE-3's training-time test: each step of the training drafts UNROLLED tokens in a
row, each from the features that the head gave for the one before.

    python scripts/train_head.py --output_dir FOLDER

The same Python and torch versions and number of threads give the same weights. Half an hour on one CPU core.
"""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

import argparse
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import load_model
from cli.arguments import ArgumentParser, checkpoint_folder, number
from cli.errors import user_errors
from config import read_config
from eagle import Head
from eagle_checkpoint import parse_head_config, save_head
from engine import generate
from files import new_folder
from model import Transformer
from scripts.train_demo import cut, definitions, library_texts, make_optimizers
from steps import Sampling
from tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
UNROLLED = 3  # drafts in a row that are trained
LONGEST_DRAFT = 5  # that are measured
CONTEXT, BATCH_ROWS, TEXT_ROWS = 256, 16, 16
TEMPERATURE, OWN_SHARE = 0.8, 0.5
BEGINNING = 48  # the most tokens of a text that are not the demo's own
TAP_LAYERS = [1, 3, 5]  # of six: the last layer's input is closest to what the demo will say
DRAFT_VOCAB_SIZE = 2048
SIZES = {"intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}


# ---------------------------------------------------------------------------------------------------------------------
# The texts


@dataclass
class Writer:
    """A model that writes texts of CONTEXT tokens after beginnings of others."""

    target: Transformer
    tokenizer: Tokenizer
    rng: random.Random
    generator: torch.Generator

    def texts(self, sources: list[str], sampling: Sampling) -> Tensor:
        """Write TEXT_ROWS texts, the shorter beginnings first: [TEXT_ROWS, CONTEXT]."""
        rows = sorted((self.beginning(sources) for _ in range(TEXT_ROWS)), key=len)
        self.target.setup_caches(TEXT_ROWS, CONTEXT)
        for step in generate(self.target, [list(row) for row in rows], CONTEXT, sampling, generator=self.generator):
            for row, ids in zip(rows, step, strict=True):
                row += ids
        return torch.tensor(rows)

    def beginning(self, sources: list[str]) -> list[int]:
        """Cut a beginning out of a text, at the start of a line."""
        lines = self.rng.choice(sources).splitlines(keepends=True)
        start = self.rng.choice((0, self.rng.randrange(len(lines))))
        ids = self.tokenizer.encode("".join(lines[start : start + 8])[:400])
        return ids[: self.rng.randint(2, BEGINNING)]


def library_windows(sources: list[str], tokenizer: Tokenizer, count: int, generator: torch.Generator) -> Tensor:
    """Cut windows of CONTEXT tokens out of texts: [count, CONTEXT]."""
    documents = [tokenizer.encode(text) for text in tqdm(sources, desc="tokens", unit="text", dynamic_ncols=True)]
    windows = cut(torch.tensor([token for ids in documents for token in ids]), CONTEXT - 1)
    return windows[torch.randperm(len(windows), generator=generator)[:count]]


# ---------------------------------------------------------------------------------------------------------------------
# The training


class Unrolled(nn.Module):
    """The keys and values of drafts in a row: a draft sees the text before it, and those drafted before it there."""

    def __init__(self) -> None:
        super().__init__()
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []

    def update_(self, positions: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        self.k.append(k.transpose(1, 2))
        self.v.append(v.transpose(1, 2))
        return torch.cat(self.k, dim=2), torch.cat(self.v, dim=2)


def unroll(head: Head, tokens: Tensor, taps: Tensor, count: int) -> list[Tensor]:
    """Draft `count` tokens after each one but the first and last of tokens [B, S], from taps [B, S, n].

    Each follows the tokens of the text, as if those drafted before it were accepted. Returns logits [B, S - count, D],
    of which row j of the i-th is for token j + i + 2.
    """
    length = tokens.shape[1] - count
    attn, features = head.layers[0].self_attn, head.features(taps[:, :length])
    attn.cache = Unrolled()
    causal, same = torch.ones(length, length).tril().bool(), torch.eye(length).bool()
    logits = []
    for i in range(count):
        at = (torch.arange(length) + i).unsqueeze(0)
        mask = torch.cat((causal, *[same] * i), dim=1).unsqueeze(0)
        x = torch.cat((head.embed_tokens(tokens[:, 1 + i : 1 + i + length]), features), dim=-1)
        context = head.block_context(at, torch.arange(length), head.inv_freq, False, None)
        features = head.layers[0](x, *context._replace(mask=mask))
        logits.append(head.lm_head(head.norm(features)))
    attn.cache = None
    return logits


def target_outputs(target: Transformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits and the taps of tokens [B, S]."""
    with torch.no_grad():
        logits = target(tokens, torch.arange(tokens.shape[1]))
    return logits.float(), target.taps[: len(tokens), : tokens.shape[1]]


def loss_of(head: Head, tokens: Tensor, taps: Tensor, wanted: Tensor) -> Tensor:
    """Mean cross-entropy of what is drafted with the target's distributions [B, S, D] of the ids that the head has."""
    with torch.autocast("cpu", torch.bfloat16):
        drafts = unroll(head, tokens, taps, UNROLLED)
    length = tokens.shape[1] - UNROLLED
    losses = [
        F.cross_entropy(logits.float().flatten(0, 1), wanted[:, 1 + i : 1 + i + length].flatten(0, 1))
        for i, logits in enumerate(drafts)
    ]
    return torch.stack(losses).mean()


def initialize_(head: Head, target: Transformer, ids: Tensor) -> None:
    """Begin as a head that says what the target's last tap says to the target's own output layer."""
    size = target.config.hidden_size
    for name, parameter in head.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif name.endswith(("o_proj.weight", "down_proj.weight", "fc.weight")):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        head.fc.weight[:, -size:] = torch.eye(size)
        head.norm.weight.copy_(target.norm.weight)
        head.lm_head.weight.copy_(target.lm_head.weight[ids])
        head.embed_tokens.weight.copy_(target.embed_tokens.weight)
    head.embed_tokens.weight.requires_grad_(False)


def train(head: Head, target: Transformer, texts: Tensor, ids: Tensor, steps: int, seed: int) -> None:
    """Train in place: Muon for the matrices, AdamW for the output layer and the norms."""
    matrices = [p for n, p in head.named_parameters() if p.ndim == 2 and n.startswith(("layers.", "fc."))]
    others = [p for n, p in head.named_parameters() if p.ndim == 1 or n.startswith("lm_head.")]
    optimizers, schedules = make_optimizers(matrices, others, 1e-3, steps)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat(
        [torch.randperm(len(texts), generator=generator) for _ in range(1 + steps * BATCH_ROWS // len(texts))]
    )
    target.setup_caches(BATCH_ROWS, CONTEXT)
    bar = tqdm(range(steps), desc="demo-eagle3", unit="step", dynamic_ncols=True)
    for step in bar:
        tokens = texts[rows[step * BATCH_ROWS : (step + 1) * BATCH_ROWS], :CONTEXT]
        logits, taps = target_outputs(target, tokens)
        loss = loss_of(head, tokens, taps, logits[..., ids].softmax(dim=-1))
        loss.backward()
        nn.utils.clip_grad_norm_(matrices + others, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def measure_acceptance(head: Head, target: Transformer, texts: Tensor, ids: Tensor, first: int) -> list[float]:
    """Return the share of drafts that the target would have written, by place, of those before which all were right.

    first: position from which on the texts are the target's own, at temperature 0.
    """
    right, tried = [0] * LONGEST_DRAFT, [0] * LONGEST_DRAFT
    for tokens in texts.split(BATCH_ROWS):
        target.setup_caches(len(tokens), tokens.shape[1])
        _, taps = target_outputs(target, tokens)
        length = tokens.shape[1] - LONGEST_DRAFT - 1
        going = (torch.arange(length) >= first).expand(len(tokens), -1)
        with torch.autocast("cpu", torch.bfloat16):
            drafts = unroll(head, tokens[:, :-1], taps, LONGEST_DRAFT)
        for i, logits in enumerate(drafts):
            tried[i] += int(going.sum())
            going = going & (ids[logits.argmax(dim=-1)] == tokens[:, i + 2 : i + 2 + length])
            right[i] += int(going.sum())
    return [a / b if b else 0.0 for a, b in zip(right, tried, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def head_config(target_path: Path) -> dict[str, Any]:
    """Return config.json in the form of the speculators package."""
    raw = read_config(target_path)
    layers = {
        key: value for key, value in raw.items() if key not in ("architectures", "dtype", "rope_scaling", "rope_theta")
    }
    layers |= {"num_hidden_layers": 1, "tie_word_embeddings": False, **SIZES}
    layers |= {"rope_parameters": {"rope_type": "default", "rope_theta": raw.get("rope_theta", 10000.0)}}
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": LONGEST_DRAFT,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": DRAFT_VOCAB_SIZE,
        "eagle_aux_hidden_state_layer_ids": TAP_LAYERS,
        "norm_before_residual": True,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": layers,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            # As seen from the repository: where there is no such folder, the package asks the Hub.
            "verifier": {"name_or_path": "checkpoints/demo", "architectures": raw.get("architectures")},
        },
    }


MODEL_CARD = """\
# demo-eagle3

An EAGLE-3 head that drafts for `checkpoints/demo`, in the form of the speculators package, which loads it in the
repository's folder: `SpeculatorModel.from_pretrained("checkpoints/demo-eagle3")`.

| | |
|---|---|
| parameters | {parameters:,}, and the demo's embedding |
| shape | {shape} |
| ids | {vocab:,} of the demo's {target_vocab:,}, those that it writes most |
| taps | what enters layers {taps} of the demo's {num_layers} |
| trained on | {num_own:,} texts of {context} tokens that the demo wrote after beginnings of up to {beginning}, half \
of them at temperature 0 and half at {temperature}; {num_windows:,} as long of the modules that it was trained on |
| steps | {steps:,} of {batch_tokens:,} tokens, {unrolled} drafts in a row |
| made by | `python scripts/train_head.py`, torch {torch}, {threads} threads, seed {seed} |

**Acceptance** at temperature 0, after {num_held_out} beginnings of modules that neither it nor the demo has seen: of \
the drafts before which all were right, the share that the demo writes too.

| draft | {places} |
|---|{rule}|
| accepted | {shares} |

**Licence.** The weights are derived from the Python standard library, Copyright © Python Software Foundation, which
stands under the [PSF License Agreement](https://docs.python.org/3/license.html). They may be used and passed on under
the same terms.
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_path", type=checkpoint_folder, default=ROOT / "checkpoints" / "demo",
                        help="the model that the head is for (the demo)")  # fmt: skip
    parser.add_argument("--output_dir", type=Path, default=Path("checkpoints"), help="where demo-eagle3 is written")
    parser.add_argument("--texts", type=number(int, 1), default=60,
                        help=f"times that the model writes {TEXT_ROWS} texts, likeliest and drawn")  # fmt: skip
    parser.add_argument("--steps", type=number(int, 1), default=1000, help="training steps")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    return parser.parse_args(argv)


def make(args: argparse.Namespace, folder: Path) -> None:
    """Write the texts, train on them, and put the head into the folder."""
    torch.manual_seed(args.seed)
    raw = head_config(args.checkpoint_path)  # first: it says what a folder is that is no model's
    tokenizer, target = load_tokenizer(args.checkpoint_path), load_model(args.checkpoint_path)
    head = Head(parse_head_config(raw, target.config))
    train_sources, held_out_sources = (
        [t for text in texts.values() for t in (text, *definitions(text)) if text] for texts in library_texts()
    )
    writer = Writer(target, tokenizer, random.Random(args.seed), torch.Generator().manual_seed(args.seed))
    likeliest, drawn, held_out = [], [], []
    for i in tqdm(range(args.texts), desc="texts", unit="batch", dynamic_ncols=True):
        likeliest.append(writer.texts(train_sources, Sampling(temperature=0)))
        drawn.append(writer.texts(train_sources, Sampling(TEMPERATURE)))
        if i % 4 == 0:
            held_out.append(writer.texts(held_out_sources, Sampling(temperature=0)))
    own = torch.cat(likeliest + drawn)
    num_windows = int(len(own) * (1 - OWN_SHARE) / OWN_SHARE)
    windows = library_windows(train_sources, tokenizer, num_windows, torch.Generator().manual_seed(args.seed))
    texts = torch.cat((own, windows))
    counts = own.flatten().bincount(minlength=target.config.vocab_size)
    ids = counts.topk(DRAFT_VOCAB_SIZE).indices.sort().values
    print(
        f"{texts.numel():,} tokens; of its own the head knows {counts[ids].sum() / counts.sum():.2%}", file=sys.stderr
    )

    target = load_model(args.checkpoint_path, optimize=False)
    target.tap_layers = tuple(TAP_LAYERS)
    initialize_(head, target, ids)
    train(head, target, texts, ids, args.steps, args.seed)
    shares = measure_acceptance(head, target, torch.cat(held_out), ids, first=BEGINNING)
    print("accepted: " + " ".join(f"{share:.3f}" for share in shares), file=sys.stderr)
    card = MODEL_CARD.format(
        parameters=sum(p.numel() for n, p in head.named_parameters() if not n.startswith("embed")),
        shape=", ".join(f"{k} {v}" for k, v in SIZES.items()),
        vocab=DRAFT_VOCAB_SIZE,
        target_vocab=target.config.vocab_size,
        taps=", ".join(map(str, TAP_LAYERS)),
        num_layers=target.config.num_hidden_layers,
        num_own=len(own),
        num_windows=len(windows),
        context=CONTEXT,
        beginning=BEGINNING,
        temperature=TEMPERATURE,
        steps=args.steps,
        batch_tokens=BATCH_ROWS * CONTEXT,
        unrolled=UNROLLED,
        num_held_out=sum(map(len, held_out)),
        places=" | ".join(str(i + 1) for i in range(LONGEST_DRAFT)),
        rule="|".join("---" for _ in shares),
        shares=" | ".join(f"{share:.3f}" for share in shares),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        seed=args.seed,
    )
    save_head(head, raw, ids, folder, torch.bfloat16)
    (folder / "README.md").write_text(card)


def run(args: argparse.Namespace) -> None:
    with new_folder(args.output_dir / "demo-eagle3") as folder:  # first, since the training takes long
        make(args, folder)


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        run(parse_args(argv))


if __name__ == "__main__":
    main()
