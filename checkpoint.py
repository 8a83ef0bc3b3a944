"""A checkpoint folder on disk -> a model on a device.

Two layouts are read, told apart by `layout` in config.json:
- the Hub's: config.json and model.safetensors, or model.safetensors.index.json with its shards;
- ours (`"layout": "fused"`): the same config.json and one model.safetensors that holds the model's own parameters,
  q, k, v and gate, up each stacked into one matrix, so that loading maps the file and copies nothing.

    model = load_model("checkpoints/demo", device="cpu", dtype=torch.float32)
"""

import contextlib
import json
import math
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from compressed import hub_tensors
from config import OLDER_FILES, parse_config, parse_dtype, read_config
from files import FLOAT_DTYPES, Spec, TensorFiles, own_file, write_safetensors
from formats import OTHER_SCALES, Packed, find_packed
from kernels.cpu import release_file_pages, start_to_compile
from kernels.optimize import optimize_
from linears import Form, empty_stored, is_router, quantizable_linears
from model import ONE_RANK, Embedding, Experts, Linear, ModelConfig, Ranks, Transformer
from names import expert_names, family_name, hub_parts, hub_shapes, is_stack
from quantization import read_quantization
from tp import check_group, check_sizes, is_row_parallel, local_part

# Files beside the weights that influence the text too.
TEXT_FILES = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "vocab.json", "merges.txt", "tekken.json",
)  # fmt: skip
# All that a text depends on.
READ_FILES = ("config.json", *OLDER_FILES, *TEXT_FILES, "*.safetensors*")  # an index may name shards as it likes
# Files beside the weights that are copied with them into another form.
COMPANIONS = (*TEXT_FILES, "README*", "LICENSE*", "USE_POLICY*")

# ---------------------------------------------------------------------------------------------------------------------
# Tensors by name


# Buffers that old releases of transformers stored, the heads of classifiers and reward models, and what sees.
UNUSED_NAMES = re.compile(
    r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$|^(score|classifier|qa_outputs|(v|value|reward)_head)\."
    r"|^(model\.)?(vision_tower|multi_modal_projector)\."
)

# Experts as transformers 5 has them in memory, and the scales of FP8 as it saves them.
FUSED_EXPERTS = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?")


def checked_tensor(files: TensorFiles, name: str, spec: Spec) -> Tensor:
    """Map a tensor, whose shape must be that of `spec`; its dtype too, unless both are floats."""
    tensor = files.get(name)
    dtype, shape = spec
    if (tensor.dtype != dtype and not {tensor.dtype, dtype} <= FLOAT_DTYPES) or tensor.layout != torch.strided:
        expected = f"{'floats' if dtype in FLOAT_DTYPES else dtype}; is config.json the model's own?"
        raise ValueError(f"{files.path}: tensor {name} is {tensor.dtype}, expected {expected}")
    if tensor.shape != shape:
        raise ValueError(f"{files.path}: tensor {name} has shape {[*tensor.shape]}, config.json asks for {[*shape]}")
    return tensor


def check_depth(files: TensorFiles, config: ModelConfig) -> None:
    """Raise ValueError where the weights have fewer layers than config.json says, before that many are made."""
    layers = {match[1] for name in files.files if (match := re.match(r"(?:model\.)?layers\.(\d+)\.", name))}
    if len(layers) < config.num_hidden_layers:
        asked = f"config.json has num_hidden_layers {config.num_hidden_layers}"
        held = f"the weights have tensors of {len(layers)} layers, the first {min(files.files, default='none')}"
        raise ValueError(f"{files.path}: {asked} and {held}; is config.json the model's own?")


def name_first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def check_names(files: TensorFiles, expected: Collection[str], optional: Collection[str] = ()) -> list[str]:
    """Return the tensors that no text depends on. optional: those that may be there or not.

    Raises ValueError where a tensor is missing, or is not the model's.
    """

    def is_unused(name: str) -> bool:  # auto-gptq wrote a bias of zeros for each linear
        return bool(UNUSED_NAMES.search(name)) or (name.endswith(".bias") and not bool(files.get(name).any()))

    others = [name for name in sorted({*files.files} - {*expected, *optional}) if not OTHER_SCALES.search(name)]
    unused = [name for name in others if is_unused(name)]
    for what, names in (("lacks", {*expected} - {*files.files}), ("has unexpected", {*others} - {*unused})):
        if names:
            raise ValueError(f"{files.path} {what} tensor {name_first(sorted(names))}; is config.json the model's own?")
    return unused


def meta_model(raw: dict[str, Any], ranks: Ranks = ONE_RANK, forms: Mapping[str, Form] | None = None) -> Transformer:
    """Make the model that config.json describes, or this rank's share, on the meta device: shapes without memory.

    forms: of its quantized linears, by name; None: those of which config.json speaks. Raises ValueError where its sizes
    cannot be divided among the ranks.
    """
    quantization = read_quantization(raw)
    config = parse_config(raw)
    check_sizes(config, quantization.form() if quantization and forms is None else None, ranks.count)
    with torch.device("meta"):
        model = Transformer(config, ranks)
    for name, child in quantizable_linears(model).items():
        own = quantization.form(name == "lm_head") if quantization and forms is None else (forms or {}).get(name)
        if own:
            model.set_submodule(name, empty_stored(child, own))
    return model


def tensor_specs(model: Transformer, dtype: torch.dtype) -> dict[str, Spec]:
    """Return what each parameter of a meta model is stored as: floats in `dtype`, codes and scales in their own."""
    return {
        name: (dtype if p.is_floating_point() and not name.endswith(".scales") else p.dtype, p.shape)
        for name, p in model.named_parameters()
    }


class ModelReader:
    """The parameters of a folder's model, in either layout: their specs, and this rank's share of one at a time."""

    def __init__(
        self,
        checkpoint_path: Path,
        dtype: torch.dtype | None = None,
        ranks: Ranks = ONE_RANK,
        keep_codes: bool = True,
        files_class: type[TensorFiles] = TensorFiles,
    ):
        """dtype: None for that of the checkpoint. keep_codes: False dequantizes what is quantized. files_class: of the
        files that are read.

        Raises FileNotFoundError or ValueError where the folder's tensors are not those that config.json asks for.
        """
        self.path, self.ranks = checkpoint_path, ranks
        self.raw = read_config(checkpoint_path)  # tie_word_embeddings becomes false where the weights have another head
        self.config = parse_config(self.raw)  # first, since a family that is not read may have other weights
        check_sizes(self.config, None, ranks.count)
        self.is_fused = self.raw.get("layout") == "fused"
        self.dtype = dtype or checkpoint_dtype(checkpoint_path, self.raw, files_class)
        self.files = files_class(checkpoint_path)
        if (checkpoint_path / "adapter_config.json").is_file():
            self._say("the adapter beside the weights is not applied; merge it with peft's merge_and_unload")
        self.packed: dict[str, list[Packed | None]] = {}  # by module, what its parts are held as where it is quantized
        self.forms: dict[str, Form] = {}  # of those whose codes are kept
        self._last_packed: tuple[str, list[dict[str, Tensor]]] = ("", [])  # a module, and what its parts hold
        self.stacked: tuple[str, ...] | None = None  # as in `hub_shapes`
        if not self.is_fused:
            self._adopt_names()
        check_depth(self.files, self.config)
        self._find_packed(keep_codes)
        model = meta_model(self.raw, forms=self.forms)
        self.specs = tensor_specs(model, self.dtype)
        names = [part for name in self.specs for part in self._stored_names(name)]
        tied = ["lm_head.weight"] if model.tied and not self.is_fused else []
        if unused := check_names(self.files, names, tied):
            self._say(f"ignored {name_first(unused)}, which no text depends on")
        self._say_dequantized(": there is no kernel for their form" * keep_codes)

    def _find_packed(self, keep_codes: bool) -> None:
        """Find out which modules are quantized, and in which form they can be kept."""
        quantization = read_quantization(self.raw)
        model = meta_model(self.raw, forms={})
        for name, child in model.named_modules():
            if not isinstance(child, Linear | Experts | Embedding):
                continue
            shapes = self._shapes(f"{name}.weight", child.weight.shape)
            parts = [
                find_packed(self.files, part.removesuffix(".weight"), shape, quantization)
                for part, shape in shapes.items()
            ]
            if any(parts):
                self.packed[name] = parts
                if keep_codes and (form := self._common_form(name, child, parts)):
                    self.forms[name] = form
        if "lm_head" in self.packed and self.raw.get("tie_word_embeddings"):
            self.raw = {**self.raw, "tie_word_embeddings": False}

    def _common_form(self, name: str, child: Linear | Experts | Embedding, parts: list[Packed | None]) -> Form | None:
        """Return the form of all parts of a module; None where there is none, so that its weight is dequantized."""
        forms = {part.form if part else None for part in parts}
        form = forms.pop()
        if forms or form is None or isinstance(child, Embedding) or is_router(name):
            return None
        if form.is_ordered:
            orders = [part.order for part in parts if part and part.order is not None]
            cut = self.ranks.count > 1 and is_row_parallel(name)  # a rank's inputs are columns all over the order
            if isinstance(child, Experts) or cut or not all(torch.equal(orders[0], order) for order in orders):
                return None
        if is_row_parallel(name):
            check_group(name, child.weight.shape[-1], form.group_size or 8 // form.bits, self.config, self.ranks.count)
        return form

    def _say_dequantized(self, why: str) -> None:
        """Say how much larger the weights become of which no codes are kept."""
        names = [name for name in self.packed if name not in self.forms]
        parts = [part for name in names for part in self.packed[name] if part]
        held = [self.files.spec(tensor) for part in parts for tensor in part.names]
        before = sum(shape.numel() * held_as.itemsize for held_as, shape in filter(None, held))
        after = sum(self.specs[f"{name}.weight"][1].numel() * self.dtype.itemsize for name in names)
        if names:
            sizes = f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB of {str(self.dtype).removeprefix('torch.')}"
            self._say(f"{len(names)} weights are dequantized, {sizes}{why}")

    def _shapes(self, name: str, shape: torch.Size | None = None) -> dict[str, torch.Size]:
        """Return the tensors that a parameter is made of in this layout, where none is quantized."""
        shape = self.specs[name][1] if shape is None else shape
        return {name: shape} if self.is_fused else hub_shapes(name, shape, self.config, self.stacked)

    def _stored_names(self, name: str) -> list[str]:
        """Name the folder's tensors that parameter `name` is made of."""
        module, _, suffix = name.rpartition(".")
        parts = self.packed.get(module)
        if parts is None or suffix == "bias":
            return [*self._shapes(name)]
        hub = self._shapes(f"{module}.weight")
        return [tensor for part, own in zip(parts, hub, strict=True) for tensor in (part.names if part else [own])]

    def _say(self, words: str) -> None:
        if self.ranks.rank == 0:
            print(f"{self.path}: {words}", file=sys.stderr)

    def _adopt_names(self) -> None:
        """Take in what other programs write: names without `model.`, and a tied head that is stored."""
        files, embedding, head = self.files, "model.embed_tokens.weight", "lm_head.weight"
        for name in list(files.files):  # those of the text in a model that sees too
            if match := re.match(r"(model\.)?language_model\.", name):
                files.alias((match[1] or "") + name[match.end() :], name)
            elif re.search(r"\.(mlp\.gate|experts\.\d+)\.", name):  # Mixtral's, as transformers 5 has them in memory
                files.alias(family_name(name, self.config), name)
            elif self.config.num_local_experts and (match := FUSED_EXPERTS.fullmatch(name)):
                parts = expert_names(match[1], match[2], f"weight{match[3] or ''}", self.config.num_local_experts)
                files.cut([family_name(part, self.config) for part in parts], name)
        if "norm.weight" in files.files:
            for name in [name for name in files.files if name.startswith(("layers.", "embed_tokens.", "norm."))]:
                files.alias(f"model.{name}", name)
        if self.config.model_type == "phi3" and any(".mlp.up_proj." in name for name in files.files):
            self.stacked = ("qkv_proj",)  # gptqmodel takes gate and up apart
        if not self.config.tie_word_embeddings or head not in files.files:
            return
        if embedding not in files.files:  # safetensors.torch.save_model keeps one of two names
            files.alias(embedding, head)
        elif files.spec(embedding) != files.spec(head) or not torch.equal(files.get(embedding), files.get(head)):
            self.raw = {**self.raw, "tie_word_embeddings": False}
            self._say(f"{head} is used, which is not the embedding, though tie_word_embeddings is true")

    def read(self, name: str) -> Tensor:
        """Read this rank's share of a parameter. Raises ValueError where it is mis-shaped or not finite."""
        dtype = self.specs[name][0]
        if self.is_fused and self.ranks.count == 1:  # it stays unread on the disk: the converter has checked it
            return checked_tensor(self.files, name, self.specs[name]).to(dtype)
        stored = self._stored_parts(name)
        parts = [local_part(name, i, part, self.config, self.ranks).to(dtype) for i, part in enumerate(stored)]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not is_finite(value):
            large = " or too large for it; give --dtype bfloat16" if dtype == torch.float16 else ""
            what = f"{name} has values that are not finite in {dtype}"
            raise ValueError(f"{self.path}: {what}; the checkpoint is damaged{large}")
        if is_stack(name, self.config) and not name.endswith(".order"):
            value = value.unflatten(0, (self.config.num_local_experts, -1))
        return value

    def _stored_parts(self, name: str) -> Iterable[Tensor]:
        """Map the tensors that a parameter is stored as, or is cut into for several ranks."""
        module, _, suffix = name.rpartition(".")
        stored: Iterable[Tensor]
        if module in self.forms and suffix != "bias":
            stored = [part[suffix] for part in self._read_packed(module)]
            stored = stored[:1] if suffix == "order" else stored  # all have the same
        else:
            stored = self._dense_parts(name)
        if self.ranks.count == 1 or suffix == "order" or len(self._shapes(name)) > 1:
            return stored
        [whole] = stored
        return hub_parts(name, whole, self.config, ()).values()

    def _read_packed(self, module: str) -> list[dict[str, Tensor]]:
        """Read what the parts of a module hold. The last module's is kept: its parameters are read one by one."""
        if self._last_packed[0] != module:
            self._last_packed = module, [part.parameters() for part in self.packed[module] if part]
        return self._last_packed[1]

    def _dense_parts(self, name: str) -> Iterator[Tensor]:
        """Map the tensors that a parameter is made of; those that are quantized are dequantized."""
        shapes = self._shapes(name)
        packed = self.packed.get(name.removesuffix(".weight"), [None] * len(shapes))
        for (part, shape), held in zip(shapes.items(), packed, strict=True):
            yield held.dense() if held else checked_tensor(self.files, part, (self.specs[name][0], shape))


def checkpoint_dtype(path: Path, raw: dict[str, Any], files_class: type[TensorFiles] = TensorFiles) -> torch.dtype:
    """Return the dtype of a checkpoint: config.json's, else its weights', else, without weights, bfloat16."""
    if (dtype := parse_dtype(raw)) is None:
        with contextlib.suppress(FileNotFoundError):
            dtype = files_class(path).dtype()
    return dtype or torch.bfloat16


def is_finite(tensor: Tensor) -> bool:
    """Say whether no value is NaN or infinite; codes never are. Unlike isfinite(), one pass at memory speed."""
    return not tensor.is_floating_point() or all(math.isfinite(bound) for bound in tensor.aminmax())


def load_model(
    checkpoint_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    ranks: Ranks = ONE_RANK,
    optimize: bool = True,
) -> Transformer:
    """Load a checkpoint folder, or this rank's share of it; dtype None keeps the one that config.json names.

    optimize: False leaves the plain model, without kernels; its parameters have the names that are stored. Raises
    FileNotFoundError or ValueError, each naming the file, key or tensor.
    """
    reader = ModelReader(Path(checkpoint_path), dtype, ranks)
    model = meta_model(reader.raw, ranks, reader.forms)
    if optimize and torch.device(device).type == "cpu":
        start_to_compile()
    hidden = True if ranks.rank else None  # None: shown on a terminal
    bar = tqdm(reader.specs, desc="load", unit="tensor", delay=2, leave=False, dynamic_ncols=True, disable=hidden)
    load_parameters_(model, {name: reader.read(name).to(device) for name in bar}, device)
    release_file_pages(model.embed_tokens.weight)  # it has been looked through, and a text takes a few rows
    if optimize:
        optimize_(model)
    return model


def load_parameters_(model: Transformer, parameters: dict[str, Tensor], device: str | torch.device) -> None:
    """Give a model made on the meta device its parameters, the tied head and the buffers."""
    tied = model.tied
    head = {"lm_head.weight": parameters["embed_tokens.weight"]} if tied else {}
    model.load_state_dict(parameters | head, assign=True)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    model.set_rope_(device)
    model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def read_files(checkpoint_path: Path) -> list[Path]:
    """Return the files of a folder that a text depends on."""
    return [file for pattern in READ_FILES for file in checkpoint_path.glob(pattern) if file.is_file()]


def write_config(raw_config: dict[str, Any], dtype: torch.dtype, path: Path) -> None:
    """Write config.json of weights in a dtype into the folder `path`."""
    raw_config = {key: value for key, value in raw_config.items() if key != "torch_dtype"}
    raw_config |= {"dtype": str(dtype).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n")


def companions(source: Path) -> list[Path]:
    """Return the files beside the weights of a folder. Raises ValueError where one is a link that leads out of it."""
    files = [file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()]
    return [own_file(source, file.name) for file in files]


def copy_texts(source: Path, path: Path) -> None:
    """Copy the files beside the weights of a folder into the folder `path`, which is made of it."""
    for file in companions(source):
        shutil.copyfile(file, path / file.name)


def save_hub_checkpoint(model: Transformer, raw_config: dict[str, Any], path: Path, dtype: torch.dtype) -> None:
    """Write model.safetensors and config.json in the Hub's layout into the folder `path`."""
    if not isinstance(model.layers[0].self_attn.qkv_proj, Linear):
        raise ValueError("the model's linears are not plain floats; load an unquantized folder with optimize=False")
    tensors = hub_tensors(model, {name: value.detach() for name, value in model.named_parameters()})
    specs = {name: (dtype, value.shape) for name, value in tensors.items()}
    write_safetensors(path / "model.safetensors", specs, lambda name: tensors[name].to(dtype))
    write_config(raw_config, dtype, path)
