"""Print the code that inductor writes for CUDA, of the product with an int8 weight: its Triton code, without a GPU.

test_kernels_triton.py starts it, as a process of its own: inductor is told that its CPU is such a GPU.
"""

import contextlib
import json
import sys

import torch
import triton
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from triton.backends.compiler import GPUTarget

import model
from kernels_triton import Int8Linear

H100 = DeviceProperties(
    type="cuda", index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
)  # fmt: skip


class Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def code_of(rows: int, N: int, K: int) -> str:
    written: list[str] = []
    GraphLowering.save_output_code = staticmethod(written.append)
    DeviceProperties.create = classmethod(lambda cls, device: H100)  # type: ignore[assignment]
    triton.runtime.driver.set_active(Driver())
    x, scales = torch.randn(rows, K).bfloat16(), torch.rand(N).bfloat16()
    codes = torch.zeros(N, K, dtype=torch.int8)
    with contextlib.suppress(RuntimeError), config.patch(cpu_backend="triton", force_disable_caches=True):
        torch.compile(Int8Linear.product)(x, codes, scales)  # once the code is written, there is no GPU to load it
    return written[0]


if __name__ == "__main__":
    model.num_partial_sums = lambda size: 1  # as on a GPU
    print(json.dumps(code_of(*map(int, sys.argv[1:]))))
