"""What the tests share: tiny random models of every family, made by `transformers`, and the commands as processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Two processes of pytest share the cores, and threads that wait for each other lose much beside other work. It stands
# before torch, which reads it where it is imported: here and in each process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file
from torch import Tensor

# A shell's background job, such as a test run may be, has Ctrl-C ignored, and hands that on to the commands it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# torchrun's own is the same for all that run on a machine, and two processes of pytest may each run one.
with contextlib.suppress(OSError):
    os.environ["PET_MASTER_PORT"] = str(free_port())

# Seconds until what a test waits for is taken to hang, on however busy a machine. No test measures with it: what is to
# be quick is compared with something that was measured beside it.
HANG = 1200

# Hypothesis has limits of its own, for an example and for the drawing of several.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.6, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 9.0],
    "rope_theta": 1e4,
}
SMALL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # within the vocabulary of SIZES
MULTIPLIERS = {
    "embedding_multiplier": 6.3,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.4,
    "logits_scaling": 3.1,
}
GRANITE4 = {
    "layer_types": ["attention", "attention"],
    "num_local_experts": 0,
    "shared_intermediate_size": 80,
    "mamba_n_heads": 4,
    **MULTIPLIERS,
}
MINISTRAL = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
LOCAL_GLOBAL = ["sliding_attention", "full_attention"]
# The kinds of model we read: the family, and what its config has besides the common sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {}),
    "gqa": ("llama", {"num_key_value_heads": 2}),
    "wide_heads": ("llama", {"num_key_value_heads": 2, "head_dim": 24}),
    "llama3": ("llama", {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "codellama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "rope_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "rope_llama3": (
        "llama",
        {
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 5e5,
            },
        },
    ),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased": ("llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral_window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen2_tied": ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2_window": (
        "qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 24}),
    "qwen3_biased": ("qwen3", {"num_key_value_heads": 4, "head_dim": 16, "attention_bias": True}),
    "mixtral": ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral_tied": (
        "mixtral",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "sliding_window": 8,
            "tie_word_embeddings": True,
        },
    ),
    "odd_vocabulary": ("llama", {"vocab_size": 101, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "rope_dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    "rope_yarn": ("qwen2", {"num_key_value_heads": 2, "rope_parameters": YARN}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_key_value_heads": 2,
            "moe_intermediate_size": 48,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe_shares": (
        "qwen3_moe",
        {
            "num_key_value_heads": 2,
            "head_dim": 24,
            "attention_bias": True,
            "moe_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "use_sliding_window": True,
            "sliding_window": 8,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("smollm3", {"num_key_value_heads": 2, "no_rope_layers": [1, 0], "rope_parameters": YARN, **SMALL_IDS}),
    "smollm3_window": (
        "smollm3",
        {
            "num_key_value_heads": 2,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 8,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            **SMALL_IDS,
        },
    ),
    "granite": ("granite", {"num_key_value_heads": 2, **MULTIPLIERS}),
    "granite_tied": (
        "granite",
        {
            "num_key_value_heads": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            **MULTIPLIERS,
        },
    ),
    "granite4": ("granitemoehybrid", {"num_key_value_heads": 2, "position_embedding_type": "rope", **GRANITE4}),
    "granite4_nope": ("granitemoehybrid", {"num_key_value_heads": 4, "tie_word_embeddings": True, **GRANITE4}),
    "phi3": ("phi3", {"num_key_value_heads": 2, "sliding_window": 24, **SMALL_IDS}),
    "phi4_mini": (
        "phi3",
        {
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 96,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75},
            **SMALL_IDS,
        },
    ),
    "seed_oss": ("seed_oss", {"num_key_value_heads": 2, "head_dim": 24}),
    "seed_oss_biased": ("seed_oss", {"num_key_value_heads": 2, "attention_out_bias": True, "mlp_bias": True}),
    "olmo2": ("olmo2", {"num_key_value_heads": 2}),
    "olmo2_tied": ("olmo2", {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True}),
    "olmo3": (
        "olmo3",
        {
            "num_key_value_heads": 2,
            "sliding_window": 8,
            "layer_types": LOCAL_GLOBAL,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
    ),
    "ministral3": ("ministral3", {"num_key_value_heads": 2, "head_dim": 24, "rope_parameters": MINISTRAL, **SMALL_IDS}),
    "ministral3_tied": (
        "ministral3",
        {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_parameters": {**MINISTRAL, "llama_4_scaling_beta": 0.7, "mscale": 0.5, "truncate": False},
            "sliding_window": 24,
            "tie_word_embeddings": True,
            **SMALL_IDS,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_key_value_heads": 2,
            "head_dim": 24,
            "query_pre_attn_scalar": 17,
            "sliding_window": 8,
            "layer_types": LOCAL_GLOBAL,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3_untied": (
        "gemma3_text",
        {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "attention_bias": True,
            "sliding_window": 8,
            "sliding_window_pattern": 2,
            "tie_word_embeddings": False,
        },
    ),
    "three_kv_heads": (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "attention_bias": True},
    ),
}
# Of the families after Mixtral one each, for tests that take a while.
NEWER = [
    "qwen3_moe", "smollm3", "granite_tied", "granite4", "phi4_mini", "seed_oss_biased", "olmo2_tied", "olmo3",
    "ministral3", "gemma3",
]  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
BATCH, LENGTH = 3, 48


@dataclass(frozen=True)
class HubCheckpoint:
    """A folder as `save_pretrained` writes it, and what `transformers` computes with it in fp32."""

    path: Path
    tokens: Tensor  # [B, S]
    logits: Tensor  # [B, S, V]


def randomize_(model: torch.nn.Module, seed: int) -> None:
    """Draw weights under which every parameter shows in the logits, as those of a fresh model do not."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            offset = 1 - parameter.data.flatten()[0]  # Gemma's norms add 1 to their weights
            parameter.data.uniform_(0.5, 1.5, generator=generator).sub_(offset)
        else:
            std = parameter.shape[-1] ** -0.5 if parameter.ndim >= 2 and "embed" not in name else 0.5
            parameter.data.normal_(0, std, generator=generator)


def make_hub_model(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, extra = FAMILIES[family]
    extra = {key: dict(value) if isinstance(value, dict) else value for key, value in extra.items()}
    config = AutoConfig.for_model(kind, **{**SIZES, **extra})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomize_(model, seed=list(FAMILIES).index(family))
    return model.float().eval()


@pytest.fixture(scope="session")
def hub_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], HubCheckpoint]:
    made: dict[str, HubCheckpoint] = {}

    def get(family: str) -> HubCheckpoint:
        if family not in made:
            with torch.inference_mode(False), torch.no_grad():  # whichever test asks first
                model = make_hub_model(family)
                path = tmp_path_factory.mktemp(family) / "model"
                model.save_pretrained(path)
                tokens = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
                made[family] = HubCheckpoint(path, tokens, model(tokens).logits)
        return made[family]

    return get


@pytest.fixture
def gqa_tensors(hub_checkpoint: Callable[[str], HubCheckpoint]) -> dict[str, Tensor]:
    return load_file(hub_checkpoint("gqa").path / "model.safetensors")


@pytest.fixture
def gqa_config(hub_checkpoint: Callable[[str], HubCheckpoint]) -> dict[str, Any]:
    return json.loads((hub_checkpoint("gqa").path / "config.json").read_text())


# The files that take longest, which begin first: else one of them would go on alone at the end.
LONGEST = [
    "tp", "bench", "inductor_interpreted", "speculation", "quantize", "model", "generate", "kernels_triton",
    "docs",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


def shared_data(name: str) -> Path:
    path = SHARED / "data" / name
    if not path.is_dir():
        pytest.skip(f"{path} is not on this machine")
    return path


def run_command(script: str, *args: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one of the repository's commands as its user would."""
    return subprocess.run(
        [sys.executable, str(REPO / script), *map(str, args)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=HANG,
    )


def run_forked(
    main: Callable[[list[str]], Any], *args: object, cwd: Path, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command's main in a child that is forked, which spares a test the seconds of importing torch again.

    It may not compile: inductor would wait there for threads that this process has.
    """
    assert not {"--compile", "--compile_prefill"} & set(args)
    with tempfile.TemporaryFile() as typed, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        typed.write(stdin.encode())
        typed.seek(0)
        if (child := os.fork()) == 0:
            status: Any = 1
            try:
                signal.alarm(HANG)
                os.chdir(cwd)
                for descriptor, file in enumerate((typed, stdout, stderr)):
                    os.dup2(file.fileno(), descriptor)
                sys.stdin = os.fdopen(0)  # pytest has its own
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
                main(list(map(str, args)))
                status = 0
            except SystemExit as end:
                status = end.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status if isinstance(status, int) else 1 if status else 0)
        _, ended = os.waitpid(child, 0)
        for file in (stdout, stderr):
            file.seek(0)
        said = (file.read().decode() for file in (stdout, stderr))
        return subprocess.CompletedProcess([], os.waitstatus_to_exitcode(ended), *said)


def assert_user_error(result: subprocess.CompletedProcess[str], *fragments: str | Path) -> None:
    """Check that the command ended as a user's mistake does: status 2, no traceback, one line that says `fragments`."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and errors[0].startswith("error: "), result.stderr
    assert result.stderr.splitlines()[-1] == errors[0], result.stderr
    for fragment in fragments:
        assert str(fragment) in errors[0]


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    """Mount a file system of so many bytes."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)
