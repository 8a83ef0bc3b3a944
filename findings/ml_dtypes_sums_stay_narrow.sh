#!/usr/bin/env bash
# ml_dtypes 0.6.0 with numpy 2.4.6: sums, means and np.dot of arrays of int4 and bfloat16.
#
# Common belief: numpy adds small dtypes in wide ones, as it does its own: a sum of int8 is int64, a mean of float16 is
# taken in float32. And np.dot and @ are one product for two vectors or matrices.
# Behaviour: sum, mean and np.dot stay in the dtype. int4 wraps at 4 bits, so 40 ones add up to -8 and their mean is 0.
# bfloat16 adds one by one and stops growing: 4,096 ones add up to 256, and their mean is 0.0625. @ has a wider result
# than np.dot, int8 and float32. dtype=np.int64 and dtype=np.float32 give the right sums and means.
# Seen: «40 ones: int4 sum -8, mean 0, np.dot -8, @ 40 (int8); int8 sum 40, mean 1.0, ...», «4096 ones: bfloat16 sum
# 256.0, mean 0.0625, np.dot 4096.0, @ 4096.0 (float32); float16 sum 4096.0, mean 1.0, ...».
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q numpy==2.4.6 ml_dtypes==0.6.0
cat > "$folder/sums.py" <<'PY'
import ml_dtypes
import numpy as np

FEW, MANY = 40, 4096


def reduce(count, dtype):
    ones = np.ones(count, dtype)
    return [float(value) for value in (ones.sum(), ones.mean(), np.dot(ones, ones), ones @ ones)]


def show(count, dtype):
    ones = np.ones(count, dtype)
    product = ones @ ones
    sums = f"sum {ones.sum()}, mean {ones.mean()}, np.dot {np.dot(ones, ones)}"
    return f"{np.dtype(dtype)} {sums}, @ {product} ({product.dtype})"


print(f"{FEW} ones: {show(FEW, ml_dtypes.int4)}; {show(FEW, np.int8)}")
print(f"{MANY} ones: {show(MANY, ml_dtypes.bfloat16)}; {show(MANY, np.float16)}")
assert reduce(FEW, np.int8) == [FEW, 1, FEW, FEW] and reduce(MANY, np.float16)[:2] == [MANY, 1]
assert np.ones(FEW, ml_dtypes.int4).sum(dtype=np.int64) == FEW
assert np.ones(MANY, ml_dtypes.bfloat16).mean(dtype=np.float32) == 1
assert reduce(FEW, ml_dtypes.int4) == [-8, 0, -8, FEW], "this has changed"
assert reduce(MANY, ml_dtypes.bfloat16) == [256, 256 / MANY, MANY, MANY], "this has changed"
PY
"$folder/env/bin/python" "$folder/sums.py"
