"""Products and attention at the speed of x86 CPUs, and of their memory: cpu.cpp and its layers.

cpu.cpp is compiled when a model first needs it, and kept in the user's cache: for AVX-512 with bf16 and VNNI where the
CPU has them, else for AVX2. LLAMA_KERNELS_MARCH holds it to less, as the compiler's -march (x86-64-v3: AVX2). The plain
twin of each product is `F.linear` with the dequantized weight, that of attention `model.attention`.
"""

import contextlib
import ctypes
import hashlib
import mmap
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.layers import MAX_ROWS, KernelLinear, Reordered, is_llama_block
from linears import frozen_parameter
from model import MLP, Block, BlockContext, ModelConfig, MoE, RMSNorm, Transformer, run_blocks

SOURCES = [
    Path(__file__).with_name(name)
    for name in ("cpu.cpp", "threads.h", "codes.h", "wide.h", "gemm.h", "attention.h", "avx512.h", "tiles.h", "avx2.h")
]
NEEDED = {"avx2", "fma", "f16c"}  # of a CPU, as Linux names them
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # of torch 2.11
BLOCK_ROWS = 4  # rows of a bf16 weight that the kernels take together


lock = threading.Lock()


def library() -> Path | None:
    """Compile and load cpu.cpp, once, and return the library's path.

    None on a CPU that it is not for, and, with a line on stderr, where it cannot be compiled or loaded.
    """
    with lock:
        return make_library()


def start_to_compile() -> None:
    """Let `library` begin, in a thread: what compiles for the first time does so while the weights load."""
    threading.Thread(target=library, daemon=True).start()


@cache
def make_library() -> Path | None:
    compiler, info = shlex.split(os.environ.get("CXX") or "g++"), Path("/proc/cpuinfo")
    cpu = info.read_text() if info.is_file() else ""
    program = shutil.which(compiler[0])
    if not set(cpu.split()) >= NEEDED:
        return None
    if program is None:
        print(f"cpu.cpp is not used, products will be slower: there is no compiler {compiler[0]!r}", file=sys.stderr)
        return None
    march = os.environ.get("LLAMA_KERNELS_MARCH") or "native"
    version = Path(program).stat()  # of the link's target; to ask the compiler would take a process
    home = Path(torch.__file__).parent
    command = [*compiler, "-O3", f"-march={march}", "-fopenmp", "-shared", "-fPIC", "-std=c++17", STABLE_ABI]
    command += ["-DMADE_BY_AMD"] * ("AuthenticAMD" in cpu)
    command += [f"-I{home / 'include'}", str(SOURCES[0]), f"-L{home / 'lib'}", "-ltorch_cpu"]
    features = sorted({line for line in cpu.splitlines() if line.startswith(("model name", "flags"))})
    made_by = [program, str(version.st_size), str(version.st_mtime_ns), torch.__version__]
    sources = [path.read_text() for path in SOURCES]
    key = hashlib.sha256("\n".join([*sources, *command, *made_by, *features]).encode()).hexdigest()
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-kernels"
        path = folder / f"{key[:16]}.so"
        if not path.is_file():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if sys.stderr.isatty():
                print("compiling kernels/cpu.cpp for this CPU, once: 5 to 20 s", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:  # other processes may be compiling it too
                built = Path(temporary, path.name)
                subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, text=True)
                with built.open("rb") as file:
                    os.fsync(file.fileno())
                built.replace(path)
        if path.stat().st_uid != os.getuid():
            raise OSError(f"{path} belongs to another user")
        torch.ops.load_library(str(path))
        return path
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or ["no reason given"]
        reason = next((line for line in said if "error:" in line), said[-1])  # of a compiler, which also warns
        print(f"cpu.cpp is not used, products will be slower: {reason}", file=sys.stderr)
        return None


# The models of which all products are cpu.cpp's.
served = weakref.WeakSet[nn.Module]()


@contextlib.contextmanager
def own_threads(num_rows: int, *models: nn.Module) -> Iterator[None]:
    """While models run products of so many rows, let these do so on threads of cpu.cpp's own, and torch on one.

    OpenMP's threads, which torch has, wait for each other after each product; beside another busy program that takes a
    time slice of it. MKL's loops, such as the cosines of a long prompt, keep all threads. Changes nothing where a
    model has other products, or for many rows where torch's operators stand between them.
    """
    few = num_rows <= MAX_ROWS or all(isinstance(getattr(model, "run_blocks", None), CpuBlocks) for model in models)
    if not few or not all(model in served for model in models) or (num_threads := torch.get_num_threads()) == 1:
        yield
        return
    take_threads = functions().take_threads
    take_threads(num_threads, 1)
    try:
        yield
    finally:
        take_threads(0, num_threads)


@cache
def functions() -> ctypes.PyDLL:
    return ctypes.PyDLL(str(library()))


MADV_DONTNEED, MADV_HUGEPAGE = 4, 14  # of linux/mman.h


def advise(tensor: Tensor, advice: int) -> None:
    """Tell Linux how the pages are used that a tensor on a CPU begins in and goes on to."""
    if sys.platform == "linux" and tensor.device.type == "cpu":
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(start, tensor.data_ptr() + tensor.nbytes - start, advice)


def empty_weight(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Allocate a weight, on a CPU in pages of 2 MiB where Linux grants them.

    It is streamed with fewer page lookups, 1.1 to 1.3 times as fast as with pages of 4 KiB. A mapped file has large
    pages already, where its file system does.
    """
    weight = torch.empty(shape, dtype=dtype, device=device)
    advise(weight, MADV_HUGEPAGE)
    return weight


def release_file_pages(tensor: Tensor) -> None:
    """Take the pages of a mapped file out of memory, as which they count, until they are read again.

    What has been written to them since is lost. A tensor that lies elsewhere is left alone.
    """
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.is_file() else []:
        span, _, _, _, inode = line.split()[:5]
        begin, end = (int(address, 16) for address in span.split("-"))
        if begin <= tensor.data_ptr() < end and inode != "0":
            advise(tensor, MADV_DONTNEED)


def release_freed_memory() -> None:
    """Give the system what is free between tensors: glibc keeps it, some 10 % of a model whose weights are repacked."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def packed_weight(values: Tensor, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Copy values into a weight; dtype: as which its bytes are seen."""
    weight = empty_weight(values.shape, values.dtype, values.device).copy_(values)
    return frozen_parameter(weight.view(dtype or values.dtype))


@cache
def instruction_set() -> str | None:
    """Return what cpu.cpp uses: «amx» (AVX-512 and tiles), «avx512» or «avx2»; None where there is no library."""
    if library() is None:
        return None
    functions().instruction_set.restype = ctypes.c_char_p
    return functions().instruction_set().decode()


def dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes of the models that cpu.cpp serves on this CPU."""
    return (torch.bfloat16, torch.float16) if library() else ()


def has_kernel(dtype: torch.dtype, weight: Tensor, rows: int, columns: int) -> bool:
    """Say whether cpu.cpp takes a weight [N, K], in tiles of so many rows and columns, in a model of this dtype."""
    N, K = weight.shape[-2:]
    return weight.device.type == "cpu" and N % rows == 0 and K % columns == 0 and dtype in dtypes()


# ---------------------------------------------------------------------------------------------------------------------
# The operators, `torch.ops.kernels.*`, opaque to torch.compile. x [M, K]; weights as the layers pack them. With experts
# [M, A], x is [M, A, K] and weights are stacks, of which each row takes one.
# `torch.library.custom_op` would import the compiler at the first call: an eager run's first token came a second later.

SUBLAYER = "Tensor? norm, Tensor? output_norm, float eps, float? offset, float multiplier, Tensor[] first,"
SUBLAYER += " Tensor? first_bias, Tensor? first_order, Tensor[] last, Tensor? last_bias, Tensor? last_order"
OPERATORS = {
    "product": "(Tensor x, Tensor[] weight, *, Tensor? experts=None) -> Tensor",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor mask) -> Tensor",
    "rms_norm": "(Tensor x, Tensor weight, float eps, float? offset) -> Tensor",
    "describe_attention": f"({SUBLAYER}, int context, Tensor? q_norm, Tensor? k_norm, float query_multiplier,"
    " float query_scaling_beta, int original_length, Tensor? feature_norm, bool adds_normed) -> Tensor",
    "describe_feed_forward": f"({SUBLAYER}, bool gelu, Tensor? router, int num_chosen, bool shares_of_chosen)"
    " -> Tensor",
    "forget_sublayers": "(Tensor sublayers) -> ()",
    "run_sublayers": "(Tensor x, Tensor sublayers, int width, int[] taps, Tensor[] cos, Tensor[] sin, Tensor positions,"
    " Tensor[] masks, Tensor(a!)[] caches) -> (Tensor, Tensor)",
}
for name, schema in OPERATORS.items():
    torch.library.define(f"kernels::{name}", schema)


@torch.library.register_fake("kernels::product")
def _(x: Tensor, weight: list[Tensor], experts: Tensor | None = None) -> Tensor:
    N = weight[0].shape[-2] if len(weight) == 1 else weight[1].shape[-3] * weight[1].shape[-1]
    return x.new_empty(*x.shape[:-1], N)


@torch.library.register_fake("kernels::attention")
def _(q: Tensor, *_: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("kernels::rms_norm")
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("kernels::run_sublayers")
def _(x: Tensor, sublayers: Tensor, width: int, taps: list[int], *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], width), x.new_empty(len(taps), *x.shape[:-1], width)


# ---------------------------------------------------------------------------------------------------------------------
# The layers


class CpuLinear(KernelLinear):
    """A linear whose kernel tells by its tensors what form they have."""

    kept_outputs: int | None = None  # where the weight has been given more rows: so many are its own

    @staticmethod
    def product(rows: Tensor, *tensors: Tensor, experts: Tensor | None = None) -> Tensor:
        return torch.ops.kernels.product(rows, tensors, experts=experts)

    gemm: Callable[..., Tensor] = product


class CpuDense(CpuLinear):
    """bf16 or fp16, the weight [N, K] as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(bias)
        self.weight = weight


def code_rows() -> int:
    """Return R, how many rows of int8 and int4 are interleaved: two vectors of 32 bits."""
    return 16 if instruction_set() == "avx2" else 32


def takes_codes(dtype: torch.dtype, weight: Tensor) -> bool:
    """Say whether cpu.cpp takes codes [N, K] in a model of this dtype: of any N, in a stack of multiples of R."""
    return has_kernel(dtype, weight, code_rows() if weight.ndim > 2 else 1, columns=1)


def interleave(values: Tensor) -> Tensor:
    """Put what R rows of a weight have in a column beside each other: [N, C] -> [N / R, C, R].

    Rows of zeros fill the last block.
    """
    rows = F.pad(values, (0, 0, 0, -values.shape[-2] % code_rows()))
    return rows.unflatten(-2, (-1, code_rows())).mT


class CpuCodes(CpuLinear):
    """int8 and int4, of any N outputs."""

    def __init__(self, N: int, bias: Tensor | None):
        missing = -N % code_rows()
        super().__init__(frozen_parameter(F.pad(bias, (0, missing))) if bias is not None and missing else bias)
        self.kept_outputs = N if missing else None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.kept_outputs is None else y[..., : self.kept_outputs]


class CpuInt8(CpuCodes):
    """codes int8 [N, K]; scales and zeros, int8 or None, [N, groups]. Pairs of codes are interleaved."""

    names: tuple[str, ...] = ("weight", "scales")

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None, zeros: Tensor | None = None):
        super().__init__(codes.shape[-2], bias)
        pairs = codes.contiguous().view(torch.int16)
        self.weight = packed_weight(interleave(pairs), torch.int8)  # [N / R, K / 2, R * 2]
        self.scales = packed_weight(interleave(scales))
        if zeros is not None:
            self.zeros, self.names = packed_weight(interleave(zeros)), ("weight", "scales", "zeros")


class CpuInt4(CpuCodes):
    """nibbles uint8 [N, K / 2], two codes each, the even column in the low half; zeros uint8 and scales [N, groups]."""

    names = ("weight", "scales", "zeros")

    def __init__(self, nibbles: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None):
        super().__init__(nibbles.shape[-2], bias)
        # Eight columns of a row are four bytes: four even ones, two to a byte, then four odd ones.
        first, second = (nibbles[..., i::2].unflatten(-1, (-1, 2)) for i in (0, 1))  # [N, K / 8, 2]
        columns = torch.stack((first & 15 | second << 4, first >> 4 | second & 240), dim=-2)
        words = interleave(columns.flatten(-3).view(torch.int32))  # [N / R, K / 8, R]
        self.weight = packed_weight(words, torch.uint8)
        self.scales = packed_weight(interleave(scales))
        first, second = interleave(zeros).unflatten(-1, (2, -1)).unbind(-2)
        self.zeros = packed_weight(first | second << 4)


# ---------------------------------------------------------------------------------------------------------------------
# The blocks


class CpuRMSNorm(RMSNorm):
    """A norm in one call, where the plain one is eight; compiled, inductor makes one loop of these."""

    def __init__(self, norm: RMSNorm):
        nn.Module.__init__(self)  # not RMSNorm's: the weight exists already
        self.__dict__.update(norm.__dict__)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        plain = torch.compiler.is_compiling() or x.requires_grad or x.device.type != "cpu"
        if plain or x.dtype != weight.dtype or x.dtype not in dtypes():
            return super().forward(x)
        return torch.ops.kernels.rms_norm(x, weight, self.eps, self.offset)


def optimize_blocks_(model: Transformer) -> None:
    """Give a model in one of `dtypes` norms and attention of cpu.cpp and, where it takes them, all of the blocks."""
    norms = {name: norm for name, norm in model.named_modules() if type(norm) is RMSNorm and norm.ranks.count == 1}
    for name, norm in norms.items():
        model.set_submodule(name, CpuRMSNorm(norm))
    for block in model.layers:
        block.self_attn.attend = attention
    if takes_blocks(model.layers):
        model.run_blocks = CpuBlocks(model.config, model.layers)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Do what `model.attention` does."""
    return torch.ops.kernels.attention(q, k, v, mask)


class CpuBlocks:
    """`model.run_blocks` for one rank, all in one call.

    The steps of a few rows take less time than so many calls; between the products of many, torch would read and write
    x more often.

    The call is told once which modules and tensors there are: to hand over some hundred at each token takes a good part
    of a small model's step. So a parameter that is replaced by another one and hooks of the blocks do nothing; what is
    written into a parameter, or its `data`, always counts.
    """

    def __init__(self, config: ModelConfig, blocks: Sequence[Block]):
        self.blocks, self.width = list(blocks), config.hidden_size
        self.attentions = [block.self_attn for block in blocks]
        kinds = [(config.is_local(layer), config.window(layer)) for layer in range(len(blocks))]
        firsts = {kind: kinds.index(kind) for kind in kinds}
        self.context_layers = list(firsts.values())  # the first layers of each kind of attention
        sublayers = []
        for block, kind in zip(blocks, kinds, strict=True):
            sublayers.append(describe_attention(block, list(firsts).index(kind)))
            sublayers.append(describe_feed_forward(block))
        self.sublayers = torch.cat(sublayers)  # by their addresses
        weakref.finalize(self, torch.ops.kernels.forget_sublayers, self.sublayers).atexit = False

    def __call__(
        self, blocks: Sequence[Block], contexts: list[BlockContext], x: Tensor, taps: Sequence[int]
    ) -> list[Tensor]:
        # Not `attention.cache.k`: for each tensor a module looks in three places, which takes a microsecond. There is
        # no module of that name before the first setup_caches.
        caches = [attention._modules.get("cache") for attention in self.attentions]
        are_others = not torch.compiler.is_compiling() and list(blocks) != self.blocks
        if None in caches or are_others:
            return run_blocks(blocks, contexts, x, taps)
        tensors = [cache._buffers[name] for cache in caches for name in ("k", "v")]  # type: ignore[union-attr]
        kinds = [contexts[layer] for layer in self.context_layers]
        # In fp32, also where the whole model has been moved to another dtype.
        cos, sin = [kind.cos.float() for kind in kinds], [kind.sin.float() for kind in kinds]
        positions, masks = kinds[0].positions.long(), [kind.mask for kind in kinds]
        halves = [2 * layer for layer in taps]
        run = torch.ops.kernels.run_sublayers.default
        x, tapped = run(x, self.sublayers, self.width, halves, cos, sin, positions, masks, tensors)
        return [x, *tapped] if taps else [x]

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a copy of the model run its blocks one by one: this object knows the original's, and no other process."""
        return partial, (run_blocks,)


def describe_attention(block: Block, context: int) -> Tensor:
    """context: which of the contexts that the call gets is this layer's."""
    attn, config, rope = block.self_attn, block.self_attn.config, block.self_attn.config.rope_scaling
    scaling = (config.query_scaling_beta, rope.original_max_position_embeddings) if rope else (0, 1)
    return torch.ops.kernels.describe_attention(
        **describe_linears(block, block.input_layernorm, block.attn_output_norm, linears_of(block)[:2]),
        context=context,
        q_norm=weight_of(attn.q_norm),
        k_norm=weight_of(attn.k_norm),
        query_multiplier=config.query_multiplier,
        query_scaling_beta=scaling[0],
        original_length=scaling[1],
        feature_norm=weight_of(getattr(block, "hidden_norm", None)),
        adds_normed=getattr(block, "norm_before_residual", False),
    )


def describe_feed_forward(block: Block) -> Tensor:
    mlp, config = block.mlp, block.self_attn.config
    experts = mlp.gate.weight if isinstance(mlp, MoE) else None
    return torch.ops.kernels.describe_feed_forward(
        **describe_linears(block, block.post_attention_layernorm, block.mlp_output_norm, linears_of(block)[2:]),
        gelu=config.gelu,
        router=experts,
        num_chosen=config.num_experts_per_tok,
        shares_of_chosen=config.norm_topk_prob,
    )


def describe_linears(block: Block, norm: nn.Module, output_norm: nn.Module, linears: list[nn.Module]) -> dict[str, Any]:
    """Return what both halves of a block are described by: two linears, and what stands around them."""
    config = block.self_attn.config
    described: dict[str, Any] = {
        "norm": weight_of(norm),
        "output_norm": weight_of(output_norm),
        "eps": config.rms_norm_eps,
    }
    described |= {"offset": config.norm_offset, "multiplier": block.multiplier}
    for name, linear in zip(("first", "last"), linears, strict=True):
        layer = cast("CpuLinear", layer_of(linear))
        order = linear.order.int() if isinstance(linear, Reordered) else None
        described |= {name: layer.tensors, f"{name}_bias": layer.bias, f"{name}_order": order}
    return described


def linears_of(block: Block) -> list[nn.Module]:
    attn, mlp = block.self_attn, cast("MLP", block.mlp)
    return [attn.qkv_proj, attn.o_proj, mlp.gate_up_proj, mlp.down_proj]


def layer_of(linear: nn.Module) -> nn.Module:
    """Return the layer that holds the tensors of a linear, or of a stack of experts."""
    return linear.layer if isinstance(linear, Reordered) else getattr(linear, "stack", linear)


def takes_blocks(blocks: Sequence[Block]) -> bool:
    """Say whether `CpuBlocks` has all that these blocks need."""
    layers = [layer_of(linear) for block in blocks for linear in linears_of(block)]
    routers = [block.mlp.gate.weight for block in blocks if isinstance(block.mlp, MoE)]
    fit = all(isinstance(layer, CpuLinear) and layer.kept_outputs is None for layer in layers)
    fit = fit and all(has_kernel(router.dtype, router, BLOCK_ROWS, 32) and router.is_contiguous() for router in routers)
    return fit and blocks[0].self_attn.ranks.count == 1 and all(map(has_known_forward, blocks))


def has_known_forward(block: Block) -> bool:
    """Say whether a block is `model.Block`, or the first of an EAGLE-3 head, which norms and adds as Llama's."""
    return type(block) is Block or (hasattr(block, "hidden_norm") and is_llama_block(block.self_attn.config))


def weight_of(norm: object) -> Tensor | None:
    return norm.weight if isinstance(norm, RMSNorm) else None
