"""Train checkpoints/demo and checkpoints/demo-draft: two small Llamas that write Python.

The text is what every Python installation carries: the source of its own standard library, less HELD_OUT, on which
the loss is reported. The draft learns to imitate the demo (distillation), so that speculative decoding has a partner.

    python scripts/train_demo.py --output_dir checkpoints

The same Python and torch versions and number of threads give the same weights. About an hour on two CPU cores.
"""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

import argparse
import ast
import io
import json
import math
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import save_hub_checkpoint
from cli.arguments import ArgumentParser, number
from cli.errors import user_errors
from config import parse_config
from files import new_folder
from model import Transformer
from steps import vector_bits

# Never trained on. On the first GPTQ is calibrated where the demo is measured, on the rest perplexity is taken.
CALIBRATION_MODULES = ("calendar.py", "colorsys.py", "csv.py", "fractions.py", "graphlib.py", "heapq.py", "json")
HELD_OUT = (*CALIBRATION_MODULES, "queue.py", "sched.py", "shlex.py", "textwrap.py", "tomllib", "wave.py")
# Tests, generated tables, prose, and files that describe one machine.
SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__phello__", "lib-dynload"}
CONTEXT = 1024
SHORT_CONTEXT, SHORT_SHARE = 256, 0.8  # most steps see short windows: at 1,024 attention takes half the time
BATCH_TOKENS = 8192
VOCAB_SIZE = 4096
BOS, EOS = 1, 2

DEMO = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
DRAFT = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


def hub_config(sizes: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "num_key_value_heads": sizes["num_attention_heads"] // 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def library_texts() -> tuple[dict[str, str], dict[str, str]]:
    """Return the standard library's modules as {path: source}: those to train on, and those held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if SKIPPED & set(path.parts) or path.parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        (held_out if path.parts[0] in HELD_OUT else train)[path.as_posix()] = text
    return train, held_out


def library_text(modules: Sequence[str]) -> str:
    """Return the source of these modules and packages of the standard library."""
    paths = [Path(sysconfig.get_path("stdlib"), name) for name in modules]
    files = [file for path in paths for file in ([path] if path.suffix else sorted(path.glob("*.py")))]
    return "".join(file.read_text(encoding="utf-8") for file in files)


def definitions(source: str) -> list[str]:
    """Return the top-level functions and classes of a module, each as a text of its own."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    lines = source.splitlines(keepends=True)
    nodes = [n for n in body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    texts = ["".join(lines[n.lineno - 1 : n.end_lineno]) for n in nodes]
    return [text for text in texts if 80 < len(text) < 8000]


def train_tokenizer(texts: list[str]) -> bytes:
    """Train a SentencePiece BPE that keeps every space and newline, as code needs; bytes stand in for rare letters."""
    model = io.BytesIO()
    lines = (line for text in texts for line in text.splitlines() if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue()


def documents_to_tokens(tokenizer: sentencepiece.SentencePieceProcessor, texts: list[str]) -> list[list[int]]:
    return [[BOS, *ids, EOS] for ids in tokenizer.encode(texts)]


def batches(documents: list[list[int]], steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield `steps` batches [B, S + 1] of BATCH_TOKENS: each epoch shuffles the documents, joins and cuts them."""
    short_steps = int(SHORT_SHARE * steps)
    for context, num_steps in ((SHORT_CONTEXT, short_steps), (CONTEXT, steps - short_steps)):
        while num_steps > 0:
            order = torch.randperm(len(documents), generator=generator).tolist()
            windows = cut(torch.tensor([token for i in order for token in documents[i]]), context)
            whole = len(windows) // (BATCH_TOKENS // context)
            rows = torch.randperm(len(windows), generator=generator).split(BATCH_TOKENS // context)
            yield from (windows[r] for r in rows[: min(whole, num_steps)])
            num_steps -= whole


def cut(tokens: Tensor, context: int) -> Tensor:
    """Cut a stream of tokens into windows [N, context + 1]; the last token of one is the first of the next."""
    return tokens.unfold(0, context + 1, context)


def initialize_(model: Transformer) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.ones_(parameter)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):  # a block begins as the identity
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(tokens, torch.arange(tokens.shape[1])).float()


@torch.no_grad()
def held_out_loss(model: Any, tokens: Tensor, context: int) -> float:
    """Mean cross-entropy in nats per token of the text [N], in windows of `context`."""
    batches = [w for w in cut(tokens, context).split(BATCH_TOKENS // context) if len(w) == BATCH_TOKENS // context]
    losses = [F.cross_entropy(logits_of(model, w[:, :-1]).flatten(0, 1), w[:, 1:].flatten()) for w in batches]
    return torch.stack(losses).mean().item()


def make_optimizers(
    matrices: list[nn.Parameter], others: list[nn.Parameter], rate: float, steps: int
) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LambdaLR]]:
    """Return Muon for the matrices and AdamW with this rate for the others, and their schedules over the steps."""
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    warmup, cooldown = max(1, steps // 50), max(1, int(steps * 0.6))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min((s + 1) / warmup, (steps - s) / cooldown, 1.0))
        for o in optimizers
    ]
    return optimizers, schedules


def train(
    name: str, model: Transformer, data: Iterable[Tensor], steps: int, held_out: Tensor, teacher: Any = None
) -> tuple[Any, list[tuple[int, float]]]:
    """Train in place: Muon for the blocks' matrices, AdamW for the rest; returns the held-out losses by step.

    With a teacher the target is its distribution and not the text's next token.
    """
    initialize_(model)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("layers.")]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or not n.startswith("layers.")]
    optimizers, schedules = make_optimizers(matrices, others, 3e-3, steps)
    options: dict[str, Any] = {"cpp.simdlen": vector_bits()}
    compiled = torch.compile(model, options=options)
    losses = []
    bar = tqdm(data, total=steps, desc=name, unit="step", dynamic_ncols=True)
    for step, batch in enumerate(bar, start=1):
        logits = logits_of(compiled, batch[:, :-1]).flatten(0, 1)
        if teacher is None:
            loss = F.cross_entropy(logits, batch[:, 1:].flatten())
        else:
            with torch.no_grad():
                target = logits_of(teacher, batch[:, :-1]).flatten(0, 1).softmax(-1)
            loss = F.cross_entropy(logits, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 400 == 0 or step == steps:
            losses.append((step, held_out_loss(compiled, held_out, batch.shape[1] - 1)))
        if losses:
            bar.set_postfix(loss=f"{loss.item():.3f}", held_out=f"{losses[-1][1]:.3f}")
    return compiled, losses


SUMMARIES = {
    "demo": "A small Llama that writes Python: what every command of this project runs by default.",
    "demo-draft": "The draft of `checkpoints/demo` for speculative decoding: trained on its distribution, "
    "same tokenizer.",
}
MODEL_CARD = """\
# {title}

{summary}

| | |
|---|---|
| parameters | {parameters:,} |
| shape | {shape} |
| tokenizer | SentencePiece BPE, {vocab:,} pieces, byte fallback; spaces and newlines kept |
| context | {context:,} tokens |
| trained on | the Python {python} standard library's own source: {num_train} modules, {train_mb:.1f} MB; \
top-level functions and classes once more as texts of their own |
| steps | {steps:,} of {batch_tokens:,} tokens ({epochs:.1f} epochs) |
| held-out loss | {loss:.4f} nats a token (perplexity {perplexity:.2f}) \
on {num_held_out} modules, {held_out_tokens:,} tokens |
| made by | `python scripts/train_demo.py`, torch {torch}, {threads} threads, seed {seed} |

Held out of training: {held_out}.

It is a toy: it writes plausible Python, not correct Python.

**Licence.** The weights and the tokenizer are derived from the Python standard library, Copyright © Python Software
Foundation, which stands under the [PSF License Agreement](https://docs.python.org/3/license.html). They may be used
and passed on under the same terms.
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output_dir", type=Path, default=Path("checkpoints"), help="where demo and demo-draft are written"
    )
    parser.add_argument("--steps", type=number(int, 1), default=1800, help="training steps of the demo")
    parser.add_argument("--draft_steps", type=number(int, 1), default=600, help="training steps of the draft")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    train_texts, held_out_texts = library_texts()
    tokenizer_model = train_tokenizer(list(train_texts.values()))
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    documents = documents_to_tokens(
        tokenizer, [*train_texts.values(), *(d for text in train_texts.values() for d in definitions(text))]
    )
    epoch_tokens = sum(map(len, documents))
    held_out = torch.tensor(
        [token for ids in documents_to_tokens(tokenizer, list(held_out_texts.values())) for token in ids]
    )
    print(f"{len(train_texts)} modules, {epoch_tokens:,} tokens an epoch; {len(held_out):,} held out", file=sys.stderr)

    teacher = None
    for name, sizes, steps in (("demo", DEMO, args.steps), ("demo-draft", DRAFT, args.draft_steps)):
        raw_config = hub_config(sizes)
        model = Transformer(parse_config(raw_config))
        data = batches(documents, steps, torch.Generator().manual_seed(args.seed))
        trained, losses = train(name, model, data, steps, held_out, teacher)
        card = MODEL_CARD.format(
            title=name,
            summary=SUMMARIES[name],
            parameters=sum(p.numel() for p in model.parameters()),
            shape=", ".join(
                f"{k} {v}" for k, v in raw_config.items() if k.startswith(("num_", "hidden_size", "inter"))
            ),
            vocab=VOCAB_SIZE,
            context=CONTEXT,
            python=platform.python_version(),
            num_train=len(train_texts),
            train_mb=sum(map(len, train_texts.values())) / 1e6,
            steps=steps,
            batch_tokens=BATCH_TOKENS,
            epochs=steps * BATCH_TOKENS / epoch_tokens,
            loss=losses[-1][1],
            perplexity=math.exp(losses[-1][1]),
            num_held_out=len(held_out_texts),
            held_out_tokens=len(held_out),
            held_out=", ".join(f"`{m}`" for m in HELD_OUT),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            seed=args.seed,
        )
        with new_folder(args.output_dir / name) as folder:
            save_hub_checkpoint(model, raw_config, folder, torch.bfloat16)
            (folder / "tokenizer.model").write_bytes(tokenizer_model)
            tokenizer_config: dict[str, Any] = {
                "tokenizer_class": "LlamaTokenizer",
                "bos_token": "<s>",
                "eos_token": "</s>",
            }
            tokenizer_config |= {"unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": False}
            (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
            generation_config = {"bos_token_id": BOS, "eos_token_id": EOS}
            (folder / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
            (folder / "README.md").write_text(card)
        teacher = trained


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        run(parse_args(argv))


if __name__ == "__main__":
    main()
