// Products of activations with a weight: of a few rows, which stream it once from memory, and of many.
//
// y[M, N] = x[M, K] w[N, K]^T, x and y in bf16 or fp16. cpu.py compiles this file, packs the weights, and has the plain
// twin of each function. N is a multiple of 4 and K of 32; with int8 and int4 N of CODE_ROWS. Of a stack of weights
// [X, N, K], the experts of a layer, each row of x takes one: those that are chosen are read where they lie.
//
// And attention over the slots of a cache, where the heads that share keys and values read them once; and the halves of
// a block, which are these with what stands between them.
//
// Here is what all instruction sets share: threads, pieces of work, the operators; products of int8 and int4 are in
// codes.h, those of many rows in gemm.h and attention in attention.h, all three for all of them. What differs is in a
// header for each instruction set, of which the compiler takes one:
//
//                          AVX-512 with bf16 and VNNI, x in bf16           AVX2 with FMA and F16C; AVX-512, x in fp16
//   w as x, 1 to 8 rows    bf16_blocks, pairs of bf16                       wide_sums, in fp32
//   int8, 1 to 8 rows      code_blocks, x in 16-bit fixed point             the same
//   int4, 1 to 8 rows      the same; AMD's processors, codes as bf16        code_blocks, x in 16-bit fixed point
//   more rows              8 at a time; above 16, GEMM in bf16              8 at a time; w as x above GEMM_ABOVE, GEMM in fp32
//   attention              pairs of bf16                                    in fp32
//
// With AMX, tiles.h has, for x in bf16, w as x from 4 rows on, codes from 8 on, and GEMM and attention from 6 rows on.
//
// w of bf16 and fp16 is [N, K] as it is. Of int8 and int4, R = CODE_ROWS rows, two vectors of 32 bits, are interleaved:
// int8 w [N / R, K / 2, R, 2]; int4 w [N / R, K / 8, R] words of 32 bits, each of 8 columns of a row: from the low end,
// the codes of the even ones in its low half and of the odd ones in its high half. Scales are [N / R, groups, R], in
// groups of a multiple of 32 columns, and zeros as scales: int8 or none, with int4 codes, [N / R, groups, R / 2], of
// which byte i holds those of rows i and i + R / 2. A code c stands for (c - zero) * scale.
//
// The bytes of w lie in the order in which they are read: one stream a thread, fetched ahead of its use. That is what
// reaches memory speed; with a stream for each of four rows the same arithmetic reaches half of it.

#include <immintrin.h>
#include <omp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "threads.h"

#ifdef MADE_BY_AMD  // the processor: what it does fast is not what Intel's do
constexpr bool IS_AMD = true;
#else
constexpr bool IS_AMD = false;
#endif

using bf16 = uint16_t;
constexpr int BLOCK_ROWS = 4;  // rows of w in a block of bf16
constexpr int SUMMED_ROWS = 16;  // of bf16, together: to sum up short ones one by one would take longer than their product
constexpr int MAX_M = 8;  // rows of x in one pass; their sums stay in registers
constexpr int STEPS_PER_SHARE = 32;  // a thread takes its share of a product in these, and others what is left of it
constexpr int MIN_WEIGHTS_PER_STEP = 1 << 16;  // about: taking a step costs time too
constexpr int PREFETCH_BYTES = 4096;  // between what is read and what is fetched
constexpr int FIRST_CACHE = 40 << 10;  // bytes of it that x may take
constexpr int X_PART_BYTES = 24 << 10;  // of a part of x, where x is larger, and of the rows of w beside it

static inline float widen(bf16 value) {
    uint32_t bits = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

// x is bf16 or fp16. Scales come as the checkpoint has them: bf16, fp16 and fp32.
struct half {
    uint16_t bits;
};

static inline float widen(half value) { return _cvtsh_ss(value.bits); }
static inline float widen(float value) { return value; }

static inline bf16 narrow(float value) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline void set(bf16& place, float value) { place = narrow(value); }
static inline void set(half& place, float value) { place.bits = _cvtss_sh(value, 0); }

static inline void fetch(const void* p) { _mm_prefetch((const char*)p + PREFETCH_BYTES, _MM_HINT_T0); }

using torch::stable::Tensor;

template <class T>
static const T* data(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

static int32_t type_of(const Tensor& tensor) {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &type));
    return type;
}

template <class T>
static int32_t type_of() {
    return std::is_same_v<T, bf16> ? aoti_torch_dtype_bfloat16()
           : std::is_same_v<T, half> ? aoti_torch_dtype_float16() : aoti_torch_dtype_float32();
}

static Tensor in_order(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// torch::stable::new_empty looks its operator up by name at each call, which takes longer than a small product.
static Tensor empty(const std::vector<int64_t>& sizes, int32_t type) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; i--) strides[i - 1] = strides[i] * sizes[i];
    AtenTensorHandle tensor;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), type,
                                                    aoti_torch_device_type_cpu(), 0, &tensor));
    return Tensor(tensor);
}

struct alignas(64) Line {
    unsigned char bytes[64];
};

// Memory for values that stays from call to call, and grows. What it has held may be lost.
template <class T>
struct Room {
    std::vector<Line> lines;
    T* of(int64_t count) {
        const size_t needed = count * sizeof(T) / sizeof(Line) + 1;
        if (lines.size() < needed) lines = std::vector<Line>(needed);
        return (T*)lines.data();
    }
};

// A thread's memory of that kind; number: of several.
template <int NUMBER, class T>
static T* room(int64_t count) {
    static thread_local Room<T> room;
    return room.of(count);
}

// While a step runs, torch works on one thread, and our products on so many of our own; 0: on torch's.
static thread_local int own_threads = 0;

static int64_t num_threads() { return own_threads ? own_threads : omp_get_max_threads(); }

// Call run(thread) on all threads, or, if they are our own, on those that come. run takes pieces of work until there
// are none, whoever calls it, and returns how many it took.
template <class Run>
static void on_threads(const Run& run) {
    if (own_threads) return threads::pool->call(own_threads, run);
#pragma omp parallel
    run(omp_get_thread_num());
}

// Call body(i) for each i < count.
template <class Body>
static void for_each(int64_t count, const Body& body) {
    std::atomic<int64_t> next{0};
    on_threads([&](int) {
        int64_t taken = 0;
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; taken++) body(i);
        return taken;
    });
}

// Call body(row, how many) for parts of M rows; a few rows are one part, which is done before other threads have begun.
template <class Body>
static void for_rows(int64_t M, const Body& body) {
    constexpr int64_t TOGETHER = 8;
    for (int64_t m = 0; M <= 2 * TOGETHER && m < M; m++) body(m);
    if (M > 2 * TOGETHER)
        for_each((M + TOGETHER - 1) / TOGETHER, [&](int64_t i) {
            for (int64_t m = i * TOGETHER; m < std::min(M, (i + 1) * TOGETHER); m++) body(m);
        });
}

struct alignas(64) Share {
    std::atomic<int64_t> next;  // the first block that nobody has taken
};

// Rows of x that are multiplied together, and with which weight of a stack.
struct Pass {
    int64_t row, expert;
    int rows;
    int64_t out(int64_t N) const { return (row - expert) * N; }  // from y to where row 0 of the stack would be written
};

// Call run(pass, PACKed rows, first block, last block) on all threads, for so many passes over x; blocks are counted
// through the stack. A thread takes its own share of the blocks, a step at a time, and then what is left of the others':
// it may have started earlier, or have a faster core.
template <int BLOCK, auto PACK, class T, class Run>
static void over_passes(const Pass* passes, int64_t count, const T* x, int64_t N, int64_t K, Run run) {
    const int64_t blocks = N / BLOCK, all = count * blocks, threads = num_threads();
    const int64_t several = std::max(N / (threads * STEPS_PER_SHARE), MIN_WEIGHTS_PER_STEP / K) / SUMMED_ROWS * SUMMED_ROWS;
    const int64_t step = std::max<int64_t>({1, SUMMED_ROWS / BLOCK, several / BLOCK});
    static thread_local std::vector<Share> buffer;
    if (int64_t(buffer.size()) < threads) buffer = std::vector<Share>(threads);
    Share* shares = buffer.data();
    for (int64_t t = 0; t < threads; t++) shares[t].next.store(all * t / threads, std::memory_order_relaxed);
    on_threads([&](int thread) {
        decltype(PACK(x, 1, K)) packed = nullptr;
        const Pass* latest = nullptr;
        int64_t taken = 0;
        for (int64_t i = 0; i < threads; i++) {
            const int64_t t = (thread + i) % threads, last = all * (t + 1) / threads;
            int64_t first;
            while ((first = shares[t].next.fetch_add(step, std::memory_order_relaxed)) < last) {
                for (int64_t n = first, end; n < std::min(last, first + step); n = end) {
                    const Pass& pass = passes[n / blocks];
                    end = std::min({last, first + step, (n / blocks + 1) * blocks});
                    if (latest != &pass) packed = PACK(x + pass.row * K, pass.rows, K);
                    latest = &pass;
                    const int64_t block = pass.expert * blocks + n % blocks;
                    run(pass, packed, block, block + end - n);
                }
                taken++;
            }
        }
        return taken;
    });
}

// The same for all rows of x [M, K]. experts [M]: which weight of the stack each takes, equal ones beside each other, and
// all of them are shared out at once; nullptr: there is one weight, which each pass finds in the cache that the one
// before has filled. most: rows of x in one pass.
template <int BLOCK, auto PACK, class T, class Run>
static void over_rows(const T* x, int64_t M, int64_t N, int64_t K, const int64_t* experts, Run run, int most = MAX_M) {
    std::vector<Pass> passes;
    for (int64_t m = 0; m < M; m += passes.back().rows) {
        int rows = 1;
        while (rows < most && m + rows < M && (!experts || experts[m + rows] == experts[m])) rows++;
        passes.push_back({m, experts ? experts[m] : 0, rows});
    }
    const int64_t together = experts ? passes.size() : 1;
    for (size_t i = 0; i < passes.size(); i += together)
        over_passes<BLOCK, PACK>(passes.data() + i, together, x, N, K, run);
}

// Values between rows of w that are copied for GEMM: no power of two, at which rows would share few places of the cache.
static inline int64_t distance_of_rows(int64_t K) { return K + 32; }

// The same for many rows of x, by GEMM (gemm.h).
template <class T, class RowsOf>
static void gemm(const T* x, T* y, int64_t M, int64_t N, int64_t K, RowsOf rows_of);

// Call run with a number of rows as a constant.
template <int M = MAX_M, class Run>
static void with_rows(int rows, Run run) {
    if (rows == M) run(std::integral_constant<int, M>());
    else if constexpr (M > 1) with_rows<M - 1>(rows, run);
}

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include "avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "avx2.h"
#else
#error "kernels for AVX-512 with bf16 and VNNI, or AVX2 with FMA and F16C"
#endif
#include "gemm.h"
#include "attention.h"

// ---------------------------------------------------------------------------------------------------------------------
// What is between products and attention, rounded where the plain model rounds

// As `model.RMSNorm`, M rows in place.
template <class T>
static void rms_norm(T* x, const T* weight, int64_t M, int64_t K, float eps, std::optional<double> offset) {
    for (T* end = x + M * K; x < end; x += K) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < K; k++) sum += widen(x[k]) * widen(x[k]);
        const float scale = 1 / std::sqrt(sum / K + eps);
        if (offset)
            for (int64_t k = 0; k < K; k++) set(x[k], widen(x[k]) * scale * (float(*offset) + widen(weight[k])));
        else
            for (int64_t k = 0; k < K; k++) set(x[k], widen(x[k]) * scale), set(x[k], widen(x[k]) * widen(weight[k]));
    }
}

// As `model.rotate`, one head in place; cos and sin [2, R].
template <class T>
static void rotate(T* head, const float* cos, const float* sin, int64_t R) {
    for (int64_t i = 0; i < R; i++) {
        const float a = widen(head[i]), b = widen(head[R + i]);
        set(head[i], a * cos[i] + b * sin[i]);
        set(head[R + i], b * cos[R + i] + a * sin[R + i]);
    }
}

// As `model.swiglu`; size: a multiple of LANES.
template <class T>
static void swiglu(const T* gate, const T* up, T* y, int64_t size, bool gelu) {
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats x = load_wide(gate + i), z = gelu ? 1.5957691f * (x + 0.044715f * x * x * x) : x;
        const Floats shrink = exponential(z < 0 ? z : -z);  // e^-|z|, of which x / (1 + e^-z) is made
        store_narrow(y + i, (z < -87 ? 0.f : z < 0 ? shrink : 1.f) * x / (shrink + 1));
        store_narrow(y + i, load_wide(y + i) * load_wide(up + i));
    }
}

template <class T>
static void scale(T* x, float factor, int64_t size) {
    for (int64_t i = 0; factor != 1 && i < size; i++) set(x[i], widen(x[i]) * factor);
}

template <class T>
static void add(T* x, const T* y, int64_t size) {
    for (int64_t i = 0; i < size; i++) set(x[i], widen(x[i]) + widen(y[i]));
}

// ---------------------------------------------------------------------------------------------------------------------
// The operators, through torch's stable ABI: one library serves every torch from 2.11 on. cpu.py has their schemas,
// and sees to it that weights have a type and a size that these take.

namespace operators {

// Call run(pointer to y, in the type of x's values), and return y.
template <class Run>
static Tensor with_floats(const Tensor& x, const std::vector<int64_t>& sizes, Run run) {
    const int32_t type = type_of(x);
    Tensor y = empty(sizes, type);
    if (type == aoti_torch_dtype_float16()) return run(static_cast<half*>(y.mutable_data_ptr())), y;
    STD_TORCH_CHECK(
        type == aoti_torch_dtype_bfloat16(), "x is neither in bfloat16 nor in float16; load the model in its dtype");
    return run(static_cast<bf16*>(y.mutable_data_ptr())), y;
}

template <class T>
static const T* like(T*, const Tensor& tensor) { return data<T>(tensor); }

static Scales scales_of(const Tensor& scales) {
    const int32_t type = type_of(scales);
    return {scales.const_data_ptr(), type == aoti_torch_dtype_float16() ? 1 : type == aoti_torch_dtype_float32() ? 2 : 0};
}

using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

// Values in the type of x.
template <class T>
static const T* values_of(const Tensor& tensor) {
    STD_TORCH_CHECK(type_of(tensor) == type_of<T>(), "norms, biases, weights and caches have another dtype than x");
    return data<T>(tensor);
}

// A weight [N, K], or a stack, as its layer's `tensors`: [w] in the type of x, [int8 codes, scales] and zeros, or
// [int4 codes, scales, zeros].
struct __attribute__((visibility("hidden"))) Weight {  // as torch's Tensor is
    Tensors tensors;
    OptionalTensor bias, order;  // order [K], int32: of the columns, into which x is put first
    int64_t outputs, inputs, group = 0;
    int bits = 16;

    explicit Weight(Tensors of_layer, OptionalTensor added = std::nullopt, OptionalTensor of_columns = std::nullopt)
        : tensors(std::move(of_layer)), bias(added), order(of_columns) {
        const Tensor& w = tensors[0];
        if (tensors.size() == 1) {
            outputs = w.size(w.dim() - 2), inputs = w.size(w.dim() - 1);
            return;
        }
        bits = type_of(w) == aoti_torch_dtype_uint8() ? 4 : 8;
        inputs = w.size(w.dim() - 2) * (bits == 4 ? 8 : 2);
        const Tensor& scale = tensors[1];  // those of a block's rows lie beside each other
        outputs = scale.size(scale.dim() - 3) * scale.size(scale.dim() - 1);
        group = inputs / scale.size(scale.dim() - 2);
    }

    // y [M, N] = x w^T with a weight of the stack, or experts: as `over_rows` has them.
    template <class T>
    void multiply_with(int64_t number, const T* x, T* y, int64_t M, const int64_t* experts = nullptr) const {
        const int64_t N = outputs, K = inputs;
        if (bits == 16) return ::dense_product(x, values_of<T>(tensors[0]) + number * N * K, y, M, N, K, experts);
        const int64_t at = number * N * (K / group);
        const auto* codes = (const uint8_t*)tensors[0].const_data_ptr() + number * N * K * bits / 8;
        const auto* zeros = tensors.size() == 3 ? (const uint8_t*)tensors[2].const_data_ptr() + at * bits / 8 : nullptr;
        const Scales scales = scales_of(tensors[1]).from(at);
        if (bits == 8) ::code_product<8>(x, codes, scales, zeros, y, M, N, K, group, experts);
        else ::code_product<4>(x, codes, scales, zeros, y, M, N, K, group, experts);
    }

    // y [M, N] = x w^T + bias; experts: as above.
    template <class T>
    void multiply(const T* x, T* y, int64_t M, const int64_t* experts = nullptr) const {
        const int64_t N = outputs, K = inputs;
        if (order) {
            T* ordered = room<8, T>(M * K);
            for_rows(M, [=, columns = data<int32_t>(*order)](int64_t m) {
                for (int64_t k = 0; k < K; k++) ordered[m * K + k] = x[m * K + columns[k]];
            });
            x = ordered;
        }
        auto end_of = [=](int64_t m) {  // of the rows that take the same weight
            int64_t end = m + 1;
            while (end < M && experts[end] == experts[m]) end++;
            return end;
        };
        if (!experts) multiply_with(0, x, y, M);
        for (int64_t m = 0, end; experts && m < M; m = end) {
            end = end_of(m);
            if (end - m > GEMM_ABOVE) {
                multiply_with(experts[m], x + m * K, y + m * N, end - m);  // by GEMM
                continue;
            }
            // All with few rows that are beside each other at once: with a call each, threads would start and stop too often.
            for (int64_t next; end < M && (next = end_of(end)) - end <= GEMM_ABOVE;) end = next;
            multiply_with(0, x + m * K, y + m * N, end - m, experts + m);
        }
        if (bias) for_rows(M, [=, added = values_of<T>(*bias)](int64_t m) { add(y + m * N, added, N); });
    }
};

// Rows in the order of the experts that they take, so that equal ones are beside each other: row i there is order[i] here.
struct ByExpert {
    std::vector<int64_t> order, experts;

    ByExpert(const int64_t* chosen, int64_t count) : order(count), experts(count) {
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [=](int64_t a, int64_t b) { return chosen[a] < chosen[b]; });
        std::transform(order.begin(), order.end(), experts.begin(), [=](int64_t i) { return chosen[i]; });
    }
};

static Tensor product(const Tensor& x, Tensors tensors, OptionalTensor experts) {
    const Weight weight(std::move(tensors));
    const int64_t N = weight.outputs, columns = x.size(x.dim() - 1);
    STD_TORCH_CHECK(columns == weight.inputs, "x has ", columns, " columns and the weight ", weight.inputs);
    STD_TORCH_CHECK(x.dim() == (experts ? 3 : 2), "x has ", x.dim(), " dimensions");
    if (!experts) {
        Tensor rows = in_order(x);
        return with_floats(x, {x.size(0), N}, [&](auto* y) { weight.multiply(like(y, rows), y, x.size(0)); });
    }
    const int64_t M = experts->size(0), A = experts->size(1), K = x.size(2);
    Tensor ids = in_order(*experts), rows = x.stride(2) == 1 ? x : in_order(x);
    const int64_t outer = rows.stride(0), inner = rows.stride(1);
    const ByExpert sorted(data<int64_t>(ids), M * A);
    return with_floats(x, {M, A, N}, [&](auto* y) {
        using T = std::remove_pointer_t<decltype(y)>;
        T *in = room<0, T>(M * A * K), *out = room<1, T>(M * A * N);
        for (int64_t i = 0; i < M * A; i++)
            std::memcpy(in + i * K, like(y, rows) + sorted.order[i] / A * outer + sorted.order[i] % A * inner, K * sizeof(T));
        weight.multiply<T>(in, out, M * A, sorted.experts.data());
        for (int64_t i = 0; i < M * A; i++) std::memcpy(y + sorted.order[i] * N, out + i * N, N * sizeof(T));
    });
}

// As `model.attention`.
static Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask) {
    STD_TORCH_CHECK(mask.size(2) == k.size(2), "a mask of ", mask.size(2), " slots, and keys of ", k.size(2));
    STD_TORCH_CHECK(type_of(mask) == aoti_torch_dtype_bool(), "the mask is not of bool");
    bool cached = k.stride(2) == k.size(3) && k.stride(3) == 1;  // the first slots of a cache
    for (int64_t i = 0; i < 4; i++) cached &= k.stride(i) == v.stride(i);
    Tensor queries = in_order(q), keys = cached ? k : in_order(k), values = cached ? v : in_order(v), seen = in_order(mask);
    const int64_t B = q.size(0), S = q.size(1), H = q.size(2), D = q.size(3);
    return with_floats(q, {B, S, H, D}, [&](auto* y) {
        using T = std::remove_pointer_t<decltype(y)>;
        ::attention(like(y, queries), values_of<T>(keys), values_of<T>(values), data<uint8_t>(seen), y, B, S, H, k.size(1),
                    k.size(2), D, keys.stride(0), keys.stride(1));
    });
}

// As `model.RMSNorm`.
static Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, std::optional<double> offset) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < x.dim(); i++) sizes.push_back(x.size(i));
    STD_TORCH_CHECK(x.dim() && weight.dim() == 1, "x has no columns, or the norm several dimensions");
    const int64_t K = sizes.back(), M = x.numel() / std::max<int64_t>(1, K);
    STD_TORCH_CHECK(K == weight.size(0), "x has ", K, " columns and the norm ", weight.size(0));
    Tensor rows = in_order(x), scales = in_order(weight);
    return with_floats(x, sizes, [&](auto* y) {
        const auto *in = like(y, rows), *factors = values_of<std::remove_pointer_t<decltype(y)>>(scales);
        for_rows(M, [=](int64_t m) {
            std::memcpy(y + m * K, in + m * K, K * sizeof(*y));
            ::rms_norm(y + m * K, factors, 1, K, eps, offset);
        });
    });
}

// Tokens of a call, and what the kinds of attention need to know of their positions, as `model.BlockContext` has it.
struct __attribute__((visibility("hidden"))) Tokens {
    int64_t B, S;
    Tensor positions;
    Tensors cos, sin, masks;
};

// One of the two halves of `model.Block` on one rank: attention, a feed-forward, or experts. cpu.py describes those of a
// model once and then runs all of them together: of a few rows, an operator for each of their steps would take longer
// than they do; of many, torch's operators between products read and write x more often. What they compute is rounded
// where the plain model rounds.
struct __attribute__((visibility("hidden"))) Sublayer {
    OptionalTensor norm, output_norm;
    double eps;
    std::optional<double> offset;
    double multiplier;  // of its output, before x is added
    Weight first, last;  // qkv and o, or gate with up, and down

    // Of attention, and with which of the tokens' contexts; a feed-forward has none.
    std::optional<int64_t> context;
    OptionalTensor q_norm, k_norm;
    double query_multiplier = 1, query_scaling_beta = 0;
    int64_t original_length = 1;  // in which query_scaling_beta counts positions
    // Of the first attention of an EAGLE-3 head, whose x is an embedding and features, side by side: the norm of these,
    // which are what is added, behind it or before.
    OptionalTensor feature_norm;
    bool adds_normed = false;

    bool gelu = false;
    // Of a feed-forward with experts, of which a row takes so many.
    std::optional<Weight> router;
    int64_t num_chosen = 0;
    bool shares_of_chosen = false;

    int64_t width() const { return last.outputs; }

    // Return what norms M rows of x, or parts of a row, in place. The weight is looked at here: what is not taken is an error,
    // which threads may not raise.
    template <class T>
    auto norm_of(const OptionalTensor& weight) const {
        const T* factors = weight ? values_of<T>(*weight) : nullptr;
        return [=, size = weight ? weight->size(0) : 0](T* x, int64_t M) {
            if (factors) ::rms_norm(x, factors, M, size, eps, offset);
        };
    }

    // y [M, E] of x [M, E], or of [M, 2 E] with features; caches: of keys and of values.
    template <class T>
    void run(const T* x, T* y, const Tokens& tokens, const Tensor* caches) const {
        const int64_t M = tokens.B * tokens.S, E = width(), K = feature_norm ? 2 * E : E;
        T* inputs = room<0, T>(M * K);
        const auto norm_x = norm_of<T>(norm), norm_features = norm_of<T>(feature_norm), norm_y = norm_of<T>(output_norm);
        for_rows(M, [=](int64_t m) {
            std::memcpy(inputs + m * K, x + m * K, K * sizeof(T));
            norm_x(inputs + m * K, 1);
            norm_features(inputs + m * K + E, 1);
        });
        // In parts, since a feed-forward is several times as wide as x.
        constexpr int64_t TOGETHER = 512;
        for (int64_t m = 0; !context && m < M; m += TOGETHER) {
            const int64_t rows = std::min(TOGETHER, M - m);
            router ? mix_experts(inputs + m * K, y + m * E, rows) : feed_forward(inputs + m * K, y + m * E, rows);
        }
        if (context) attend(inputs, y, tokens, caches[0], caches[1]);
        for_rows(M, [=](int64_t m) {
            norm_y(y + m * E, 1);
            scale(y + m * E, multiplier, E);
            add(y + m * E, (adds_normed ? inputs : x) + (m + 1) * K - E, E);
        });
    }

    // k and v of the new tokens are written into the caches.
    template <class T>
    void attend(const T* x, T* y, const Tokens& tokens, const Tensor& k_cache, const Tensor& v_cache) const {
        const Tensor &cos = tokens.cos[*context], &sin = tokens.sin[*context], &mask = tokens.masks[*context];
        const int64_t S = tokens.S, M = tokens.B * S, N = first.outputs, R = cos.size(4);
        const int64_t K = k_cache.size(1), D = k_cache.size(3), H = N / D - 2 * K;
        const int64_t batch_stride = k_cache.stride(0), head_stride = k_cache.stride(1), slots = k_cache.size(2);
        const int64_t* place = data<int64_t>(tokens.positions);
        const bool fit = tokens.B <= k_cache.size(0) && mask.size(2) <= slots;
        STD_TORCH_CHECK(N + last.inputs == 2 * (H + K) * D, "the caches have ", K, " heads, which are not the model's");
        STD_TORCH_CHECK(fit && std::all_of(place, place + M, [=](int64_t i) { return i >= 0 && i < slots; }),
                        "rows, positions or slots are outside the caches of ", k_cache.size(0), " rows and ", slots, " slots");
        T *heads = room<1, T>(M * N), *q = room<2, T>(M * H * D), *attended = room<3, T>(M * H * D);
        T *keys = (T*)values_of<T>(k_cache), *values = (T*)values_of<T>(v_cache);
        first.multiply(x, heads, M);
        const auto norm_q = norm_of<T>(q_norm), norm_k = norm_of<T>(k_norm);
        const int64_t q_norms = q_norm ? H * D / q_norm->size(0) : 0, k_norms = k_norm ? K * D / k_norm->size(0) : 0;
        for_rows(M, [&](int64_t m) {
            T *row = heads + m * N, *k = row + H * D, *v = k + K * D;
            norm_q(row, q_norms);
            norm_k(k, k_norms);
            for (T* head = row; head < v; head += D)
                rotate(head, data<float>(cos) + 2 * R * m, data<float>(sin) + 2 * R * m, R);
            scale(row, query_multiplier, H * D);
            if (query_scaling_beta) {
                T growth;
                set(growth, 1 + float(query_scaling_beta) * std::log1p(float(place[m] / original_length)));
                scale(row, widen(growth), H * D);
            }
            std::memcpy(q + m * H * D, row, H * D * sizeof(T));
            const int64_t slot = m / S * batch_stride + place[m] * D;
            for (int64_t h = 0; h < K; h++) {
                std::memcpy(keys + slot + h * head_stride, k + h * D, D * sizeof(T));
                std::memcpy(values + slot + h * head_stride, v + h * D, D * sizeof(T));
            }
        });
        ::attention<T>(q, keys, values, data<uint8_t>(mask), attended, tokens.B, S, H, K, mask.size(2), D, batch_stride, head_stride);
        last.multiply(attended, y, M);
    }

    template <class T>
    void feed_forward(const T* x, T* y, int64_t M, const int64_t* experts = nullptr) const {
        const int64_t F = last.inputs;
        T *both = room<1, T>(M * 2 * F), *gated = room<2, T>(M * F);
        first.multiply(x, both, M, experts);
        for_rows(M, [=](int64_t m) { swiglu(both + m * 2 * F, both + m * 2 * F + F, gated + m * F, F, gelu); });
        last.multiply(gated, y, M, experts);
    }

    // As `model.MoE`. Of equal scores it takes those that ATen's topk does, which sorts in the same way.
    template <class T>
    void mix_experts(const T* x, T* y, int64_t M) const {
        const int64_t X = router->outputs, A = num_chosen, E = width();
        std::vector<int64_t> chosen(M * A);
        std::vector<float> shares(M * A);
        T *scores = room<3, T>(M * X), *rows = room<4, T>(M * A * E), *outputs = room<5, T>(M * A * E);
        router->multiply(x, scores, M);
        for_rows(M, [&](int64_t m) {
            std::vector<int64_t> ids(X);
            auto score = [=](int64_t i) { return widen(scores[m * X + i]); };
            std::iota(ids.begin(), ids.end(), 0);
            auto above = [=](int64_t a, int64_t b) {
                return score(a) > score(b) || (std::isnan(score(a)) && !std::isnan(score(b)));
            };
            const auto last_chosen = ids.begin() + A - 1;
            if (A * 64 <= X) std::partial_sort(ids.begin(), last_chosen + 1, ids.end(), above);
            else std::nth_element(ids.begin(), last_chosen, ids.end(), above), std::sort(ids.begin(), last_chosen, above);
            float sum = 0;
            for (int64_t i = 0; i < (shares_of_chosen ? A : X); i++) sum += std::exp(score(ids[i]) - score(ids[0]));
            for (int64_t a = 0; a < A; a++) {
                chosen[m * A + a] = ids[a];
                shares[m * A + a] = std::exp(score(ids[a]) - score(ids[0])) / sum;
            }
        });
        const ByExpert sorted(chosen.data(), M * A);
        for (int64_t i = 0; i < M * A; i++) std::memcpy(rows + i * E, x + sorted.order[i] / A * E, E * sizeof(T));
        feed_forward(rows, outputs, M * A, sorted.experts.data());
        for (int64_t i = 0; i < M * A; i++) std::memcpy(rows + sorted.order[i] * E, outputs + i * E, E * sizeof(T));
        for_rows(M, [&](int64_t m) {
            std::vector<float> sums(E);
            for (int64_t i = m * A; i < (m + 1) * A; i++)
                for (int64_t e = 0; e < E; e++) sums[e] += shares[i] * widen(rows[i * E + e]);
            for (int64_t e = 0; e < E; e++) set(y[m * E + e], sums[e]);
        });
    }
};

// Return a sublayer's address, [1].
static Tensor address_of(Sublayer sublayer) {
    Tensor address = empty({1}, aoti_torch_dtype_int64());
    *(Sublayer**)address.mutable_data_ptr() = new Sublayer(std::move(sublayer));
    return address;
}

static Tensor describe_attention(OptionalTensor norm, OptionalTensor output_norm, double eps, std::optional<double> offset,
                                 double multiplier, Tensors qkv, OptionalTensor qkv_bias, OptionalTensor qkv_order,
                                 Tensors o, OptionalTensor o_bias, OptionalTensor o_order, int64_t context,
                                 OptionalTensor q_norm, OptionalTensor k_norm, double query_multiplier,
                                 double query_scaling_beta, int64_t original_length, OptionalTensor feature_norm,
                                 bool adds_normed) {
    Sublayer sublayer{norm, output_norm, eps, offset, multiplier,
                      Weight(qkv, qkv_bias, qkv_order), Weight(o, o_bias, o_order)};
    sublayer.context = context;
    sublayer.q_norm = q_norm, sublayer.k_norm = k_norm;
    sublayer.query_multiplier = query_multiplier, sublayer.query_scaling_beta = query_scaling_beta;
    sublayer.original_length = original_length;
    sublayer.feature_norm = feature_norm, sublayer.adds_normed = adds_normed;
    return address_of(std::move(sublayer));
}

static Tensor describe_feed_forward(OptionalTensor norm, OptionalTensor output_norm, double eps, std::optional<double> offset,
                                    double multiplier, Tensors gate_up, OptionalTensor gate_up_bias,
                                    OptionalTensor gate_up_order, Tensors down, OptionalTensor down_bias,
                                    OptionalTensor down_order, bool gelu, OptionalTensor router, int64_t num_chosen,
                                    bool shares_of_chosen) {
    Sublayer sublayer{norm, output_norm, eps, offset, multiplier,
                      Weight(gate_up, gate_up_bias, gate_up_order), Weight(down, down_bias, down_order)};
    sublayer.gelu = gelu;
    if (router) sublayer.router.emplace(Tensors{*router});
    sublayer.num_chosen = num_chosen, sublayer.shares_of_chosen = shares_of_chosen;
    return address_of(std::move(sublayer));
}

static void forget_sublayers(const Tensor& addresses) {
    auto* const* sublayers = (Sublayer* const*)addresses.const_data_ptr();
    for (int64_t i = 0; i < addresses.size(0); i++) delete sublayers[i];
}

// Run sublayers [count] on x, and return what the last one gives, and [taps, B, S, E] of what enters those that `taps`
// counts; caches: the keys and the values of each attention.
static std::tuple<Tensor, Tensor> run_sublayers(const Tensor& x, const Tensor& addresses, int64_t width,
                                                const std::vector<int64_t>& taps, Tensors cos, Tensors sin,
                                                const Tensor& positions, Tensors masks, const Tensors& caches) {
    for (Tensors* tensors : {&cos, &sin, &masks})
        for (Tensor& tensor : *tensors) tensor = in_order(tensor);
    const Tokens tokens{x.size(0), x.size(1), in_order(positions), std::move(cos), std::move(sin), std::move(masks)};
    const int64_t M = tokens.B * tokens.S, count = addresses.size(0);
    auto* const* sublayers = (Sublayer* const*)addresses.const_data_ptr();
    const int64_t columns = sublayers[0]->feature_norm ? 2 * width : width;
    STD_TORCH_CHECK(x.size(2) == columns, "x has ", x.size(2), " columns and the blocks ", columns);
    const auto attentions = std::count_if(sublayers, sublayers + count, [](Sublayer* s) { return bool(s->context); });
    STD_TORCH_CHECK(2 * attentions == int64_t(caches.size()), attentions, " attentions have ", caches.size(), " caches");
    STD_TORCH_CHECK(std::all_of(taps.begin(), taps.end(), [=](int64_t i) { return i >= (columns > width) && i < count; }),
                    "there are ", count, " halves of blocks, and a tap is at another");
    Tensor inputs = in_order(x), tapped = empty({int64_t(taps.size()), tokens.B, tokens.S, width}, type_of(x));
    Tensor outputs = with_floats(x, {tokens.B, tokens.S, width}, [&](auto* y) {
        using T = std::remove_pointer_t<decltype(y)>;
        T* buffers[] = {room<6, T>(M * width), room<7, T>(M * width)};
        const T* latest = values_of<T>(inputs);
        const Tensor* cache = caches.data();
        for (int64_t i = 0; i < count; i++) {
            for (size_t t = 0; t < taps.size(); t++)
                if (taps[t] == i) std::memcpy((T*)tapped.mutable_data_ptr() + t * M * width, latest, M * width * sizeof(T));
            T* next = i == count - 1 ? y : buffers[i % 2];
            sublayers[i]->run(latest, next, tokens, cache);
            if (sublayers[i]->context) cache += 2;
            latest = next;
        }
    });
    return {outputs, tapped};
}

}  // namespace operators

// Let our products run on `own` threads of our own, 0 for OpenMP's, and what else this thread runs on `others`.
extern "C" void take_threads(int own, int others) {
    own_threads = own;
    omp_set_num_threads(others);
}

extern "C" const char* instruction_set() { return has_tiles() ? "amx" : INSTRUCTION_SET; }

STABLE_TORCH_LIBRARY_IMPL(kernels, CPU, library) {
    library.impl("product", TORCH_BOX(&operators::product));
    library.impl("attention", TORCH_BOX(&operators::attention));
    library.impl("rms_norm", TORCH_BOX(&operators::rms_norm));
    library.impl("describe_attention", TORCH_BOX(&operators::describe_attention));
    library.impl("describe_feed_forward", TORCH_BOX(&operators::describe_feed_forward));
    library.impl("forget_sublayers", TORCH_BOX(&operators::forget_sublayers));
    library.impl("run_sublayers", TORCH_BOX(&operators::run_sublayers));
}
