"""A checkpoint folder on disk -> a model on a device.

Two layouts are read, told apart by `layout` in config.json:
- the Hub's: config.json and model.safetensors, or model.safetensors.index.json with its shards;
- ours (`"layout": "fused"`): the same config.json and one model.safetensors that holds the model's own parameters,
  q, k, v and gate, up each stacked into one matrix, so that loading maps the file and copies nothing.

    model = load_model("checkpoints/demo", device="cpu", dtype=torch.float32)
"""

import contextlib
import ctypes
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import ModelConfig, RopeScaling, Transformer, rope_frequencies

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SAFETENSORS_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}

# What `transformers` assumes where a family's config.json is silent.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
}
COMMON_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
# Keys of config.json that would change the arithmetic, and the values under which they do not.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1, None),
    "logit_scale": (1, None),
    "use_qk_norm": (False, None),
    "num_local_experts": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a user's mistake into one line on stderr and exit status 2; every command runs under it."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our stdout left: `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_config(checkpoint_path: Path) -> dict[str, Any]:
    """Read config.json as it stands. Raises FileNotFoundError where there is none."""
    path = checkpoint_path / "config.json"
    if not checkpoint_path.is_dir():
        raise FileNotFoundError(f"{checkpoint_path} is not a folder; expected a checkpoint folder with a config.json")
    if not path.is_file():
        raise FileNotFoundError(f"{checkpoint_path} has no config.json; download the model's whole folder")
    return read_json(path)


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """Turn the Hub's config.json into a ModelConfig.

    Raises ValueError, with the key and its value, where a key is missing or malformed or asks for arithmetic that
    model.py does not have.
    """
    family = raw.get("model_type")
    if family not in FAMILY_DEFAULTS:
        raise ValueError(
            f"config.json: model_type {family!r} is not supported; supported: {', '.join(FAMILY_DEFAULTS)}"
        )
    values = {**COMMON_DEFAULTS, **FAMILY_DEFAULTS[family], **raw}
    for key, neutral in NEUTRAL_VALUES.items():
        if key in values and values[key] not in neutral:
            raise ValueError(f"config.json: {key} {values[key]!r} is not supported")
    if family == "mistral" and (values["attention_bias"] or values["mlp_bias"]):
        raise ValueError("config.json: attention_bias and mlp_bias are not supported for model_type 'mistral'")

    def number(key: str, kind: type = int, low: float = 1) -> Any:
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value < 2**31:
            raise ValueError(f"config.json: {key} is {value!r}, expected {kind.__name__} of at least {low:g}")
        return kind(value)

    def flag(key: str) -> bool:
        if not isinstance(values[key], bool):
            raise ValueError(f"config.json: {key} is {values[key]!r}, expected true or false")
        return values[key]

    heads, hidden_size = number("num_attention_heads"), number("hidden_size")
    for key, default in (("num_key_value_heads", heads), ("head_dim", hidden_size // heads)):
        if values.get(key) is None:
            values[key] = default
    kv_heads, head_dim = number("num_key_value_heads"), number("head_dim", low=2)
    if heads % kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise ValueError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need an even one")
    rope_theta, rope_scaling = parse_rope(values)
    return ModelConfig(
        hidden_size=hidden_size,
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=number("vocab_size"),
        max_position_embeddings=number("max_position_embeddings"),
        rms_norm_eps=number("rms_norm_eps", float, 0),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        sliding_window=number("sliding_window") if uses_sliding_window(values) else None,
        attention_bias=flag("attention_bias"),
        mlp_bias=flag("mlp_bias"),
        tie_word_embeddings=flag("tie_word_embeddings"),
    )


def uses_sliding_window(values: dict[str, Any]) -> bool:
    kinds = set(values.get("layer_types") or ())
    if len(kinds) > 1 or not kinds <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"config.json: layer_types {sorted(map(str, kinds))} is not supported; one kind for all layers is"
        )
    return (
        values["sliding_window"] is not None and values.get("use_sliding_window", True) and kinds != {"full_attention"}
    )


def parse_rope(values: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Read rope theta and scaling, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if values.get("rope_parameters") is not None else "rope_scaling"
    rope = values.get(key) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: {key} is {rope!r}, expected an object")

    def number(name: str, default: Any = None) -> float:
        value = rope.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**40:
            raise ValueError(f"config.json: {name} in {key} is {value!r}, expected a positive number")
        return float(value)

    theta = number("rope_theta", values["rope_theta"])
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"config.json: partial_rotary_factor {rope['partial_rotary_factor']!r} is not supported")
    if rope_type == "default":
        return theta, None
    if rope_type == "linear":
        return theta, RopeScaling("linear", number("factor"))
    if rope_type == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            raise ValueError(f"config.json: low_freq_factor {low:g} must be below high_freq_factor {high:g}")
        original = int(number("original_max_position_embeddings", values.get("original_max_position_embeddings")))
        return theta, RopeScaling("llama3", number("factor"), low, high, original)
    raise ValueError(f"config.json: rope type {rope_type!r} is not supported; supported: default, linear, llama3")


def parse_dtype(raw: dict[str, Any]) -> torch.dtype:
    """Return the dtype the weights were saved in: `dtype`, or `torch_dtype` as older configs call it."""
    name = raw.get("dtype", raw.get("torch_dtype")) or "bfloat16"
    if name not in DTYPES:
        raise ValueError(f"config.json: dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def eos_token_ids(checkpoint_path: Path) -> tuple[int, ...]:
    """Return every id that ends a text: generation_config.json's, else config.json's; () where neither has one."""
    path = checkpoint_path / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    if ids is None:
        ids = read_config(checkpoint_path).get("eos_token_id")
    if ids is None:
        return ()
    ids = ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{path.name}: eos_token_id is {ids!r}, expected ids")
    return tuple(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors by name


# A parameter of the model that is several of the Hub's tensors stacked along the output features.
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def hub_names(name: str) -> list[str]:
    """Name the Hub's tensors that make up the model's parameter `name`, in order."""
    if name.startswith("lm_head."):
        return [name]
    for stacked, parts in STACKED.items():
        if f".{stacked}." in name:
            return ["model." + name.replace(stacked, part) for part in parts]
    return ["model." + name]


def part_rows(name: str, config: ModelConfig, total: int) -> list[int]:
    """Return how many rows of parameter `name` each of its Hub tensors has."""
    if "qkv_proj" in name:
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return [q, kv, kv]
    if "gate_up_proj" in name:
        return [config.intermediate_size] * 2
    return [total]


class TensorFiles:
    """The tensors of a checkpoint folder by name, read one at a time.

    Each read opens its file anew, so that nothing but the tensors handed out stays mapped.
    """

    def __init__(self, checkpoint_path: Path, allow_pickle: bool = False):
        self.path = checkpoint_path
        self.allow_pickle = allow_pickle
        self.files: dict[str, str] = self._index()

    def _index(self) -> dict[str, str]:
        patterns = ["model.safetensors"] + ["pytorch_model.bin"] * self.allow_pickle
        for single in patterns:
            index = self.path / f"{single}.index.json"
            if (self.path / single).is_file():
                return dict.fromkeys(self._names_in(single), single)
            if index.is_file():
                return self._sharded(index)
        if any(self.path.glob("*.bin")):
            raise FileNotFoundError(
                f"{self.path} has .bin weights only; convert them: python scripts/convert_hf_checkpoint.py "
                f"--checkpoint_dir {self.path}"
            )
        raise FileNotFoundError(f"{self.path} has no model.safetensors and no model.safetensors.index.json")

    def _sharded(self, index: Path) -> dict[str, str]:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict):
            raise ValueError(f"{index} has no weight_map")
        for file in sorted(set(map(str, files.values()))):
            if Path(file).name != file:
                raise ValueError(f"{index} names {file!r}, expected a file of its own folder")
            if not (self.path / file).is_file():
                raise FileNotFoundError(f"{self.path / file} is missing, but {index.name} names it; download it again")
            present = set(self._names_in(file))
            for name in (name for name, where in files.items() if where == file):
                if name not in present:
                    raise ValueError(f"{self.path / file} lacks tensor {name}, which {index.name} promises")
        return files

    def _names_in(self, file: str) -> list[str]:
        with self._open(file) as tensors:
            return list(tensors.keys())

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        path = self.path / file
        if file.endswith(".bin"):
            try:
                yield torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
            except Exception as error:  # torch.load raises whatever the bytes lead it to
                raise ValueError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from None
            return
        try:
            with safe_open(path, framework="pt") as tensors:
                yield tensors
        except SafetensorError as error:
            size = path.stat().st_size
            raise ValueError(
                f"{path} ({size} bytes) is not a whole safetensors file ({error}); download it again"
            ) from None

    def get(self, name: str) -> Tensor:
        file = self.files[name]
        with self._open(file) as tensors:
            return tensors[name] if file.endswith(".bin") else tensors.get_tensor(name)


def is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def hub_tensor(files: TensorFiles, config: ModelConfig, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Read the model's parameter `name`, of `shape`, from its Hub tensors.

    Raises ValueError where one is missing or has another shape.
    """
    parts = []
    for part, rows in zip(hub_names(name), part_rows(name, config, shape[0]), strict=True):
        parts.append(checked_tensor(files, part, torch.Size([rows, *shape[1:]])).to(dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def checked_tensor(files: TensorFiles, name: str, shape: torch.Size) -> Tensor:
    if name not in files.files:
        raise ValueError(f"{files.path} lacks tensor {name}")
    tensor = files.get(name)
    if tensor.shape != shape:
        raise ValueError(
            f"{files.path}: tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
        )
    return tensor


def check_no_unexpected(files: TensorFiles, expected: Iterable[str]) -> None:
    unexpected = sorted(set(files.files) - set(expected))
    # Buffers of old transformers, and the head of a tied model, which is the embedding once more.
    unexpected = [n for n in unexpected if not n.endswith(".rotary_emb.inv_freq")]
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise ValueError(f"{files.path} has unexpected tensor {unexpected[0]}{more}; is config.json the model's own?")


def model_tensors(
    checkpoint_path: Path, dtype: torch.dtype, allow_pickle: bool = False
) -> tuple[dict[str, torch.Size], Callable[[str], Tensor]]:
    """Return the model's parameters' shapes and the function that reads one, from either layout."""
    raw = read_config(checkpoint_path)
    config = parse_config(raw)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Transformer(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    files = TensorFiles(checkpoint_path, allow_pickle)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    if raw.get("layout") == "fused":
        check_no_unexpected(files, shapes)
        return shapes, lambda name: checked_tensor(files, name, shapes[name]).to(dtype)
    check_no_unexpected(files, [part for name in shapes for part in hub_names(name)] + tied)
    return shapes, lambda name: hub_tensor(files, config, name, shapes[name], dtype)


def load_model(
    checkpoint_path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """Load a checkpoint folder; dtype None keeps the one that config.json names.

    Raises FileNotFoundError or ValueError, each naming the file, key or tensor.
    """
    path = Path(checkpoint_path)
    raw = read_config(path)
    dtype = parse_dtype(raw) if dtype is None else dtype
    shapes, read = model_tensors(path, dtype)
    with torch.device("meta"):
        model = Transformer(parse_config(raw))
    state = {name: read(name).to(device) for name in shapes}
    return assign_parameters(model, state, device)


def assign_parameters(model: Transformer, state: dict[str, Tensor], device: str | torch.device) -> Transformer:
    """Give a model made on the meta device its parameters; the tied head and the buffers follow."""
    if model.config.tie_word_embeddings:
        state = {**state, "lm_head.weight": state["embed_tokens.weight"]}
    model.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.inv_freq = rope_frequencies(model.config).to(device)
    return model.eval().requires_grad_(False)


def random_model(
    checkpoint_path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, seed: int = 0
) -> Transformer:
    """Make a model of the folder's config.json with random weights: for speed work."""
    raw = read_config(Path(checkpoint_path))
    with torch.device("meta"):
        model = Transformer(parse_config(raw))
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, dtype=dtype or parse_dtype(raw), device=device)
        state[name] = value.fill_(1) if name.endswith("norm.weight") else value.normal_(0, 0.02, generator=generator)
    return assign_parameters(model, state, device)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_safetensors(
    path: Path, specs: dict[str, tuple[torch.dtype, torch.Size]], read: Callable[[str], Tensor]
) -> None:
    """Write the tensors that `read` returns, one in memory at a time. Format: the safetensors README."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in specs.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)  # data starts on a cache line
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, (dtype, shape) in specs.items():
            tensor = read(name).to("cpu").contiguous()
            assert tensor.dtype == dtype and tensor.shape == shape, name
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its name when all went well, and is removed when not.

    Raises ValueError where `path` holds something already.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already; remove it or name another output")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_hub_checkpoint(model: Transformer, raw_config: dict[str, Any], path: Path, dtype: torch.dtype) -> None:
    """Write model.safetensors and config.json in the Hub's layout into the folder `path`."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.named_parameters():  # a tied head is named once
        parts = value.detach().split(part_rows(name, model.config, value.shape[0]))
        tensors |= zip(hub_names(name), parts, strict=True)
    specs = {name: (dtype, value.shape) for name, value in tensors.items()}
    write_safetensors(path / "model.safetensors", specs, lambda name: tensors[name].to(dtype))
    raw_config = {**raw_config, "dtype": str(dtype).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n")
