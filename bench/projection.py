"""Compute, not measure, how fast tensor parallelism could decode on several GPUs, from bytes and latencies.

    python -m bench.projection --output_path results/tp.json

A token takes (bytes that a rank reads) / (bandwidth x share of it reached) + (number of meetings) x (latency of one).
"""

from pathlib import Path
from typing import Any

from bench import results
from cli.arguments import ArgumentParser, check_writable
from cli.errors import user_errors
from config import parse_config
from files import read_json
from model import ModelConfig

MODELS = ("llama-3.1-70b", "llama-3.1-405b")  # of configs/
INPUTS = {
    "bandwidth_bytes_per_s": 4.3e12,  # assumed, of a copy on an H200, bytes read and written: 90 % of the rated 4.8
    "share_of_bandwidth": 0.8,  # assumed
    "latency_s": 8e-6,  # assumed, of a small sum within a node of 8 GPUs over NVLink, one-shot
    "latency_between_nodes_s": 25e-6,  # assumed
    "gpus_per_node": 8,
    "memory_bytes": 141e9,
    "text_tokens": 1024,  # whose keys and values are read, in 2 bytes each
}
# Bytes a weight: of the blocks, and of the output head, which every quantized mode keeps in int8. int4: groups of 32,
# each with a scale and a zero point of 2 bytes. The embedding is not read in full and counts for memory only.
MODES = {"bfloat16": (2.0, 2.0), "int8": (1.0, 1.0), "int4-g32": (0.5 + 4 / 32, 1.0)}
NUM_GPUS = (1, 2, 4, 8, 16)
FORMULA = (
    "seconds a token = (block_weights * bytes + head_weights * head_bytes + kv_bytes) / ranks / (bandwidth * share) + "
    "(2 * layers + 3) * latency; kv_bytes and the weights of k and v are divided by min(ranks, kv heads) instead, and "
    "one rank has no latency"
)


def project(config: ModelConfig, mode: str, num_gpus: int, inputs: dict[str, float]) -> dict[str, Any]:
    """Return the bytes that a rank reads for a token, whether all weights fit, and the tokens a second."""
    weight_bytes, head_bytes = MODES[mode]
    E, D = config.hidden_size, config.head_dim
    H, K, layers = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    shared_kv = min(num_gpus, K)  # more ranks than kv heads hold copies of them
    per_rank = layers * (2 * H * D * E + 3 * config.intermediate_size * E) / num_gpus
    per_rank += layers * 2 * K * D * E / shared_kv
    table = config.vocab_size * E / num_gpus
    read = per_rank * weight_bytes + table * head_bytes
    read += inputs["text_tokens"] * layers * 2 * K * D * 2 / shared_kv
    # Two sums a layer, that of the embedding, the gather of the head, the broadcast of the ids.
    meetings = 0 if num_gpus == 1 else 2 * layers + 3
    within = num_gpus <= inputs["gpus_per_node"]
    reading_s = read / (inputs["bandwidth_bytes_per_s"] * inputs["share_of_bandwidth"])
    meeting_s = meetings * inputs["latency_s" if within else "latency_between_nodes_s"]
    return {
        "gpus": num_gpus,
        "bytes_per_rank_and_token": int(read),
        "fits": read + 2 * table < 0.95 * inputs["memory_bytes"],
        "reading_ms": round(reading_s * 1e3, 3),
        "meeting_ms": round(meeting_s * 1e3, 3),
        "tokens_per_s": round(1 / (reading_s + meeting_s), 1),
    }


def format_table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return the projection in Markdown; «–» where the weights do not fit."""
    head = ["", *(f"{n} GPU{'s' * (n > 1)}" for n in NUM_GPUS)]
    lines = [results.format_row(head), "|---" * len(head) + "|"]
    for name, row in rows.items():
        lines.append(results.format_row([name, *(f"{p['tokens_per_s']:.0f}" if p["fits"] else "–" for p in row)]))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_path", type=Path, metavar="FILE", help="write formula, inputs and figures as JSON")
    with user_errors():
        args = parser.parse_args(argv)
        if args.output_path:
            check_writable("--output_path", args.output_path)
        rows: dict[str, Any] = {}
        for name in MODELS:
            config = parse_config(read_json(results.ROOT / "configs" / f"{name}.json"))
            rows |= {f"{name} {mode}": [project(config, mode, n, INPUTS) for n in NUM_GPUS] for mode in MODES}
        print(format_table(rows))
        if args.output_path:
            content: dict[str, Any] = {"what": "computed, not measured", "command": results.name_command("projection")}
            content |= {"formula": FORMULA, "inputs": INPUTS, "bytes_per_weight": MODES, "projection": rows}
            results.Report(args.output_path, content).write()


if __name__ == "__main__":
    main()
