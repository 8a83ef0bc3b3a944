"""Convert a Hub folder to the form that loads fastest: one memory-mapped file, matrices stacked, in the run dtype.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/meta-llama/Llama-3.2-1B

Reads safetensors and .bin weights (pickles with `weights_only=True`), one tensor in memory at a time. The output takes
its name only when it is whole.
"""

import json
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import DTYPES, model_tensors, new_folder, parse_dtype, read_config, write_safetensors
from cli import ArgumentParser, user_errors

# What stands beside the weights and is taken over as it is.
COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "vocab.json", "merges.txt", "README*", "LICENSE*", "USE_POLICY*",
)  # fmt: skip


def convert(checkpoint_dir: Path, output_dir: Path, dtype_name: str | None = None) -> None:
    """Write `checkpoint_dir` to `output_dir` in the fused layout; dtype None keeps the checkpoint's own.

    Raises ValueError or FileNotFoundError, and then leaves nothing behind.
    """
    raw = read_config(checkpoint_dir)
    if raw.get("layout") == "fused":
        raise ValueError(f"{checkpoint_dir} is converted already")
    dtype = DTYPES[dtype_name] if dtype_name else parse_dtype(raw)
    shapes, read = model_tensors(checkpoint_dir, dtype, allow_pickle=True)
    with new_folder(output_dir) as folder:
        with tqdm(total=len(shapes), desc="convert", unit="tensor", dynamic_ncols=True) as bar:
            specs = {name: (dtype, shape) for name, shape in shapes.items()}
            write_safetensors(folder / "model.safetensors", specs, lambda name: (bar.update(), read(name))[1])
        raw = {k: v for k, v in raw.items() if k != "torch_dtype"}
        raw |= {"dtype": str(dtype).removeprefix("torch."), "layout": "fused"}
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        for pattern in COMPANIONS:
            for file in filter(Path.is_file, checkpoint_dir.glob(pattern)):
                shutil.copyfile(file, folder / file.name)
    print(f"wrote {output_dir}", file=sys.stderr)


def default_output(checkpoint_dir: Path) -> Path:
    if checkpoint_dir.name in ("", ".."):  # "." and "..", which do not say what the folder is called
        checkpoint_dir = checkpoint_dir.resolve()
    return checkpoint_dir.with_name(checkpoint_dir.name + "-converted")


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="a folder as downloaded from the Hub")
    parser.add_argument("--output_dir", type=Path, help="default: CHECKPOINT_DIR-converted")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    args = parser.parse_args(argv)
    with user_errors():
        convert(args.checkpoint_dir, args.output_dir or default_output(args.checkpoint_dir), args.dtype)


if __name__ == "__main__":
    main()
