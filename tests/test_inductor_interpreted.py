"""The steps as inductor writes them for a GPU, run without one: what comes out is what the plain eager model gives."""

import pytest

pytest.importorskip("triton", reason="triton is not installed; it has no build for this system")

from tests.test_kernels_triton import said_by

# Over the largest value, of models whose twins are in fp32. A row of int4 is right to 3e-5, all else in fp32 to 2e-6.
TOLERANCE = {"fp32": 4e-5, "bf16": 8e-2}
NUM_CASES = 12


@pytest.fixture(scope="module")
def said():
    found = said_by("inductor_interpreted", TRITON_INTERPRET="1")
    assert len(found) == NUM_CASES
    return found


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_steps_written_for_a_gpu_have_the_logits_and_caches_of_their_twins(said, dtype):
    ours = {name: far for name, (far, *_) in said.items() if name.endswith(dtype)}
    assert ours and not {name: far for name, far in ours.items() if not far <= TOLERANCE[dtype]}  # nan is far


def test_steps_written_for_a_gpu_choose_the_ids_of_their_twins(said):
    assert not [name for name, (_, same, _) in said.items() if not same]


def test_steps_written_for_a_gpu_call_our_operators(said):
    """Which is to say that what was compared is what a GPU would run."""
    for name, (*_, operators) in said.items():
        expected = set() if name.startswith("prefill") else {"cuda_attention"}
        if "int4" in name:
            expected.add("cuda_int4_product")
        # Inductor writes the products of one row and of two by itself; the head of an int4 model is int8.
        if ("int4" in name or "int8" in name) and name.startswith(("4 tokens", "round")):
            expected.add("cuda_int8_product")
        assert set(operators) == expected, name
