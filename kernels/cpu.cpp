// Products of a few rows of activations with a weight that is streamed once from memory, for CPUs with AVX-512 and bf16.
//
// y[M, N] = x[M, K] w[N, K]^T, x and y in bf16, sums in fp32. cpu.py compiles this file, packs the weights, and has
// the plain twin of each function. N is a multiple of 4 and K of 32; with int8 weights K is of 64, with int4 N of 16.
//
// And attention over the slots of a cache, where the heads that share keys and values read them once.
//
// The bytes of w lie in the order in which they are read: one stream a thread, fetched ahead of its use. That is what
// reaches memory speed; with a stream for each of four rows the same arithmetic reaches half of it.

#include <immintrin.h>
#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "threads.h"

using bf16 = uint16_t;
constexpr int BLOCK_ROWS = 4;  // rows of w in a block of bf16 and int8
// Rows of w in a block of int4; and those of bf16 that are summed up together, since short ones, one by one, would take
// longer than their product.
constexpr int INT4_BLOCK_ROWS = 16;
constexpr int MAX_M = 8;  // rows of x in one pass; their sums stay in registers
constexpr int MAX_ROWS = 16;  // of x, as in layers.py; above, GEMM is faster
constexpr int64_t UNPACK_BYTES = 8 << 20;  // of w, which are unpacked together
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

// Scales come in one of three types, as the checkpoint has them: bf16, fp16 and fp32.
struct half {
    uint16_t bits;
};

static inline float widen(half value) { return _cvtsh_ss(value.bits); }
static inline float widen(float value) { return value; }

static inline __m512 load_wide(const bf16* p) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
static inline __m512 load_wide(const half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline __m512 load_wide(const float* p) { return _mm512_loadu_ps(p); }

static inline bf16 narrow(float value) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline __m512bh load_bf16(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

// Of 32 values the first `count`, all where they are more; 0 for the others, whose memory is not read.
static inline __m512bh load_first(const bf16* p, int64_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << count) - 1, p);
}

// Replace each index in 0 to 15 (its higher bits do not count) by that of the 16 values, rounded to bf16.
static inline __m512bh look_up(__m512 values, __m512i indices) {
    __m256i half = (__m256i)_mm512_cvtneps_pbh(values);
    return (__m512bh)_mm512_permutexvar_epi16(indices, _mm512_broadcast_i64x4(half));
}

// The first half of adding up two vectors, each in itself: what is left of them takes turns in the lanes.
static inline __m512 sums_of_two(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

// The second half, of eight such pairs: 16 sums in order.
static inline __m512 sums_of_pairs(const __m512* pairs) {
    __m512 fours[4], halves[2];
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; i++)
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x44),
                                  _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                         _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

static inline void fetch(const void* p) { _mm_prefetch((const char*)p + PREFETCH_BYTES, _MM_HINT_T0); }

using torch::stable::Tensor;

template <class T = bf16>
static const T* data(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

static bf16* data(Tensor& tensor) { return static_cast<bf16*>(tensor.mutable_data_ptr()); }

static Tensor in_order(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// torch::stable::new_empty looks its operator up by name at each call, which takes longer than a small product.
static Tensor empty(std::initializer_list<int64_t> sizes) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; i--) strides[i - 1] = strides[i] * sizes.begin()[i];
    AtenTensorHandle tensor;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.data(), aoti_torch_dtype_bfloat16(),
                                                    aoti_torch_device_type_cpu(), 0, &tensor));
    return Tensor(tensor);
}

static Tensor view(const bf16* data, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides) {
    AtenTensorHandle tensor;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(const_cast<bf16*>(data), sizes.size(), sizes.begin(),
                                                              strides.begin(), 0, aoti_torch_dtype_bfloat16(),
                                                              aoti_torch_device_type_cpu(), 0, &tensor));
    return Tensor(tensor);
}

struct alignas(64) Line {
    bf16 values[32];
};

// Put x [M, K] in the order in which it is read, [K / 32, M, 32]: rows whose distance is a power of two do not stay in the
// first cache. Each thread does so for itself: what another has written takes longer to read than to make.
static const bf16* pack(const bf16* x, int64_t M, int64_t K) {
    if (M == 1) return x;
    static thread_local std::vector<Line> buffer;
    if (int64_t(buffer.size()) < M * K / 32) buffer.resize(M * K / 32);
    bf16* packed = buffer.data()->values;
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k += 32) std::memcpy(packed + k * M + m * 32, x + m * K + k, 32 * sizeof(bf16));
    return packed;
}

// While a step runs, torch works on one thread, and our products on so many of our own; 0: on torch's, as GEMM does.
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

struct alignas(64) Share {
    std::atomic<int64_t> next;  // the first block that nobody has taken
};

// Call run(M, x row, packed rows, first block, last block) on all threads, for at most MAX_M rows of x [M, K] at a time.
// A thread takes its own share of the blocks, a step at a time, and then what is left of the others': it may have
// started earlier, or have a faster core.
template <int BLOCK, class Run>
static void over_rows(const bf16* x, int64_t M, int64_t N, int64_t K, Run run) {
    const int64_t blocks = N / BLOCK, T = num_threads();
    static_assert(INT4_BLOCK_ROWS % BLOCK == 0);
    const int64_t several = std::max(N / (T * STEPS_PER_SHARE), MIN_WEIGHTS_PER_STEP / K) / INT4_BLOCK_ROWS * INT4_BLOCK_ROWS;
    const int64_t step = std::max<int64_t>(INT4_BLOCK_ROWS, several) / BLOCK;
    static thread_local std::vector<Share> buffer;
    if (int64_t(buffer.size()) < T) buffer = std::vector<Share>(T);
    Share* shares = buffer.data();
    for (int64_t m = 0; m < M; m += MAX_M) {
        int rows = int(std::min<int64_t>(MAX_M, M - m));
        for (int64_t t = 0; t < T; t++) shares[t].next.store(blocks * t / T, std::memory_order_relaxed);
        on_threads([&](int thread) {
            const bf16* packed = nullptr;
            int64_t taken = 0;
            for (int64_t i = 0; i < T; i++) {
                const int64_t t = (thread + i) % T, last = blocks * (t + 1) / T;
                int64_t first;
                while ((first = shares[t].next.fetch_add(step, std::memory_order_relaxed)) < last) {
                    if (!packed) packed = pack(x + m * K, rows, K);
                    run(rows, m, packed, first, std::min(last, first + step));
                    taken++;
                }
            }
            return taken;
        });
    }
}

// y = x w^T for many rows of x by GEMM: w is unpacked piece by piece, each used while it is in the cache.
// unpack(block, out): write the BLOCK rows of a block.
template <int BLOCK, class Unpack>
static void gemm(const bf16* x, bf16* y, int64_t M, int64_t N, int64_t K, Unpack unpack) {
    static thread_local std::vector<Line> buffer;
    const int64_t most = std::min(N, std::max<int64_t>(INT4_BLOCK_ROWS, UNPACK_BYTES / (K * sizeof(bf16)) / INT4_BLOCK_ROWS * INT4_BLOCK_ROWS));
    buffer.resize(most * K / 32);
    bf16* piece = buffer.data()->values;
    const Tensor inputs = view(x, {M, K}, {K, 1});
    for (int64_t n = 0; n < N; n += most) {
        const int64_t rows = std::min(most, N - n);
        for_each(rows / BLOCK, [&](int64_t i) { unpack(n / BLOCK + i, piece + i * BLOCK * K); });
        const Tensor weights = view(piece, {K, rows}, {1, K}), outputs = view(y + n, {M, rows}, {N, 1});
        TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(outputs.get(), inputs.get(), weights.get()));
    }
}

// Choose the instance of a template for a number of rows.
#define WITH_M(rows, ...)                                                                   \
    switch (rows) {                                                                          \
        case 1: { constexpr int M = 1; __VA_ARGS__; break; } case 2: { constexpr int M = 2; __VA_ARGS__; break; } \
        case 3: { constexpr int M = 3; __VA_ARGS__; break; } case 4: { constexpr int M = 4; __VA_ARGS__; break; } \
        case 5: { constexpr int M = 5; __VA_ARGS__; break; } case 6: { constexpr int M = 6; __VA_ARGS__; break; } \
        case 7: { constexpr int M = 7; __VA_ARGS__; break; } case 8: { constexpr int M = 8; __VA_ARGS__; break; } \
    }

// ---------------------------------------------------------------------------------------------------------------------
// bf16: w [N, K] as it is

template <int M>
static void bf16_blocks(const bf16* x, const bf16* w, bf16* y, int64_t N, int64_t K, int64_t first, int64_t last) {
    constexpr int SHARING = M > 2 ? 2 : 1;           // rows of w that share what is loaded of x
    constexpr int PARTS = M == 1 ? 4 : 2 / SHARING;  // sums side by side, since adding to one has to wait for itself
    // Where x is too large for the first cache, a part of its columns after the other.
    const bool whole = M * K * int64_t(sizeof(bf16)) < FIRST_CACHE;
    const int64_t pieces = whole ? 1 : (M + 2 * (SHARING - 1)) * K * int64_t(sizeof(bf16)) / X_PART_BYTES + 1;
    const int64_t width = (K / 32 + pieces - 1) / pieces * 32;
    // Fetched are the rows that come next, of a part at the same columns and else in the order of memory: one stream is
    // faster than several. A single row of w goes on in its stream; two of x take longer, and are fetched for earlier.
    const int64_t ahead = SHARING > 1 || !whole ? SHARING * K : M * PREFETCH_BYTES / int64_t(sizeof(bf16));
    const int64_t step = whole ? SHARING : 1, gap = whole ? 32 : K;
    __m512 totals[M][INT4_BLOCK_ROWS / SHARING] = {};
    for (int64_t n = first * BLOCK_ROWS; n < last * BLOCK_ROWS; n += INT4_BLOCK_ROWS) {
        const int rows = std::min<int64_t>(INT4_BLOCK_ROWS, last * BLOCK_ROWS - n);
        for (int64_t begin = 0; begin < K; begin += width)
            for (int r = 0; r < rows; r += SHARING) {
                __m512 sums[SHARING][M][PARTS] = {};
                const bf16* p = w + (n + r) * K;
                auto add = [&](int64_t k, int i) __attribute__((always_inline)) {
                    __m512bh weights[SHARING];
                    for (int j = 0; j < SHARING; j++) {
                        _mm_prefetch((const char*)(p + ahead + step * k + gap * j), _MM_HINT_T0);
                        weights[j] = load_bf16(p + j * K + k);
                    }
                    for (int m = 0; m < M; m++) {
                        const __m512bh inputs = load_bf16(x + k * M + m * 32);
                        for (int j = 0; j < SHARING; j++)
                            sums[j][m][i] = _mm512_dpbf16_ps(sums[j][m][i], weights[j], inputs);
                    }
                };
                const int64_t end = std::min(K, begin + width);
                int64_t k = begin;
                for (; k + 32 * PARTS <= end; k += 32 * PARTS)
                    for (int i = 0; i < PARTS; i++) add(k + 32 * i, i);
                for (; k < end; k += 32) add(k, 0);
                for (int m = 0; m < M; m++) {
                    __m512 sum = sums[0][m][0];
                    for (int i = 1; i < PARTS; i++) sum = _mm512_add_ps(sum, sums[0][m][i]);
                    if (SHARING == 2) sum = sums_of_two(sum, sums[SHARING - 1][m][0]);  // while the next ones are read
                    __m512& total = totals[m][r / SHARING];
                    total = begin ? _mm512_add_ps(total, sum) : sum;
                }
            }
        for (int m = 0; m < M; m++) {
            __m512 pairs[INT4_BLOCK_ROWS / 2];
            for (int i = 0; i < INT4_BLOCK_ROWS / 2; i++) {
                const __m512* two = totals[m] + 2 * i / SHARING;
                pairs[i] = SHARING == 2 ? two[0] : sums_of_two(two[0], two[1]);
            }
            const __m256i sums = (__m256i)_mm512_cvtneps_pbh(sums_of_pairs(pairs));
            _mm256_mask_storeu_epi16(y + m * N + n, (1 << rows) - 1, sums);
        }
    }
}

static void bf16_product(const bf16* x, const bf16* w, bf16* y, int64_t M, int64_t N, int64_t K) {
    over_rows<BLOCK_ROWS>(x, M, N, K, [=](int rows, int64_t m, const bf16* packed, int64_t first, int64_t last) {
        WITH_M(rows, bf16_blocks<M>(packed, w, y + m * N, N, K, first, last))
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// int8: w [N / 4, K / 64, 4, 64], scales [N / 4, groups, 4], and zeros, int8 or none, as scales. A code c stands for
// (c - zero) * scale. Groups are of a multiple of 32 columns.

// Without groups, which are whole rows, the sums are scaled at the end.
template <int M, bool GROUPS, class Scale>
static void int8_blocks(const bf16* x, const float* wide_x, const float* totals, const int8_t* w, const Scale* scales,
                        const int8_t* zeros, bf16* y, int64_t N, int64_t K, int64_t group, int64_t first, int64_t last) {
    const int64_t G = K / group;
    for (int64_t n = first; n < last; n++) {
        __m512 sums[BLOCK_ROWS][M] = {}, parts[BLOCK_ROWS][M] = {};
        const int8_t* p = w + n * BLOCK_ROWS * K;
        int64_t g = n * G, left = group;
        auto add = [&](int64_t k, int r, int half) __attribute__((always_inline)) {  // 32 columns of a row
            __m512 codes[2];
            for (int i = 0; i < 2; i++)
                codes[i] = _mm512_cvtepi32_ps(
                    _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + 64 * r + 32 * half + 16 * i))));
            if constexpr (M == 1) {
                for (int i = 0; i < 2; i++)
                    parts[r][0] = _mm512_fmadd_ps(codes[i], _mm512_loadu_ps(wide_x + k + 32 * half + 16 * i), parts[r][0]);
            } else {  // codes are exact in bf16, and one instruction takes 32 of them
                const __m512bh weights = _mm512_cvtne2ps_pbh(codes[1], codes[0]);
                for (int m = 0; m < M; m++)
                    parts[r][m] = _mm512_dpbf16_ps(parts[r][m], weights, load_bf16(x + (k + 32 * half) * M + m * 32));
            }
        };
        auto end_group = [&]() __attribute__((always_inline)) {
            for (int r = 0; r < BLOCK_ROWS; r++) {
                const __m512 scale = _mm512_set1_ps(widen(scales[g * BLOCK_ROWS + r]));
                const __m512 zero = _mm512_set1_ps(zeros ? zeros[g * BLOCK_ROWS + r] / 16.f : 0);  // in each of 16 lanes
                for (int m = 0; m < M; m++) {
                    if (zeros) parts[r][m] = _mm512_fnmadd_ps(zero, _mm512_set1_ps(totals[m * G + g - n * G]), parts[r][m]);
                    sums[r][m] = _mm512_fmadd_ps(parts[r][m], scale, sums[r][m]);
                    parts[r][m] = _mm512_setzero_ps();
                }
            }
            g++, left = group;
        };
        for (int64_t k = 0; k < K; k += 64, p += BLOCK_ROWS * 64) {
            for (int r = 0; r < BLOCK_ROWS; r++) fetch(p + 64 * r);
            if constexpr (GROUPS) {
                _mm_prefetch((const char*)(scales + g * BLOCK_ROWS) + PREFETCH_BYTES / 16, _MM_HINT_T0);
                for (int half = 0; half < 2; half++) {
                    for (int r = 0; r < BLOCK_ROWS; r++) add(k, r, half);
                    if (!(left -= 32)) end_group();
                }
            } else {
                for (int r = 0; r < BLOCK_ROWS; r++)
                    for (int half = 0; half < 2; half++) add(k, r, half);
            }
        }
        if (!GROUPS) end_group();
        for (int r = 0; r < BLOCK_ROWS; r++)
            for (int m = 0; m < M; m++) y[m * N + n * BLOCK_ROWS + r] = narrow(_mm512_reduce_add_ps(sums[r][m]));
    }
}

template <class Scale>
static void int8_unpack(const int8_t* w, const Scale* scales, const int8_t* zeros, int64_t K, int64_t group, int64_t block,
                        bf16* out) {
    for (int64_t k = 0; k < K; k += 64)
        for (int r = 0; r < BLOCK_ROWS; r++) {
            const int8_t* p = w + block * BLOCK_ROWS * K + k * BLOCK_ROWS + 64 * r;
            for (int half = 0; half < 64; half += 32) {
                const int64_t at = (block * (K / group) + (k + half) / group) * BLOCK_ROWS + r;
                const float scale = widen(scales[at]);
                const int zero = zeros ? zeros[at] : 0;
                for (int i = half; i < half + 32; i++) out[r * K + k + i] = narrow((p[i] - zero) * scale);
            }
        }
}

// The sums of each group of the rows of x: [M, K / group].
static const float* group_totals(const bf16* x, int64_t M, int64_t K, int64_t group) {
    static thread_local std::vector<float> buffer;
    buffer.resize(M * (K / group));
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (int64_t i = 0; i < M * (K / group); i++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < group; k += 32) sum = _mm512_dpbf16_ps(sum, load_bf16(x + i * group + k), ones);
        buffer[i] = _mm512_reduce_add_ps(sum);
    }
    return buffer.data();
}

template <class Scale>
static void int8_product(const bf16* x, const int8_t* w, const Scale* scales, const int8_t* zeros, bf16* y, int64_t M,
                         int64_t N, int64_t K, int64_t group) {
    if (M > MAX_ROWS)
        return gemm<BLOCK_ROWS>(
            x, y, M, N, K, [=](int64_t block, bf16* out) { int8_unpack(w, scales, zeros, K, group, block, out); });
    static thread_local std::vector<float> buffer;
    buffer.resize(K);
    float* wide_x = buffer.data();
    if (M % MAX_M == 1)  // the last pass has one row
        for (int64_t k = 0; k < K; k++) wide_x[k] = widen(x[(M - 1) * K + k]);
    const int64_t G = K / group;
    const float* totals = zeros ? group_totals(x, M, K, group) : wide_x;
    over_rows<BLOCK_ROWS>(x, M, N, K, [=](int rows, int64_t m, const bf16* packed, int64_t first, int64_t last) {
        WITH_M(rows, (G == 1 ? int8_blocks<M, false, Scale> : int8_blocks<M, true, Scale>)(
                         packed, wide_x, totals + (zeros ? m * G : 0), w, scales, zeros, y + m * N, N, K, group, first, last))
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// int4: w [N / 16, K / 32, 4, 16] words of 32 bits, each of 8 columns of a row: from the low end, the codes of the even
// ones in its low half and of the odd ones in its high half. scales [N / 16, groups, 16]. A code c stands for
// (c - zero) * scale, the zeros as codes too: [N / 16, groups, 8], byte i holds those of rows i and i + 8.
//
// The lanes of a vector are rows of w: pairs of x are broadcast, and nothing is summed across lanes. What the codes have
// too much, 16 and the zero point, is taken off the sums: where x is inf, all outputs are NaN.

// The codes number i of each half, as the upper bits of a mantissa: 16 + code.
static inline __m512bh int4_weights(__m512i words, int i) {
    const __m512i mantissa = _mm512_set1_epi16(15 << 3), sixteen = _mm512_set1_epi16(0x4180);
    const __m512i moved = i ? _mm512_srli_epi16(words, 4 * i - 3) : _mm512_slli_epi16(words, 3);
    return (__m512bh)_mm512_ternarylogic_epi32(moved, mantissa, sixteen, 0xea);  // a & b | c
}

// 16 + zero of INT4_BLOCK_ROWS rows.
static inline __m512 int4_zeros(const uint8_t* zeros) {
    const __m512i mantissa = _mm512_set1_epi32(15 << 19), sixteen = _mm512_set1_epi32(0x41800000);
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)zeros);
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(bytes, _mm_srli_epi16(bytes, 4)));
    return (__m512)_mm512_ternarylogic_epi32(_mm512_slli_epi32(codes, 19), mantissa, sixteen, 0xea);
}

template <int M, class Scale>
static void int4_blocks(const bf16* x, const float* totals, const uint8_t* w, const Scale* scales, const uint8_t* zeros,
                        bf16* y, int64_t N, int64_t K, int64_t group, int64_t first, int64_t last) {
    constexpr int PARTS = M == 1 ? 4 : M <= 4 ? 2 : 1;  // sums side by side, since adding to one has to wait for itself
    const int64_t G = K / group;
    for (int64_t n = first; n < last; n++) {
        __m512 sums[M] = {};
        const uint8_t* p = w + n * INT4_BLOCK_ROWS * K / 2;
        for (int64_t g = 0; g < G; g++) {
            // A block's scales and zeros have an eighth of its codes' bytes at most, and are fetched at least as early.
            _mm_prefetch((const char*)(scales + (n * G + g) * INT4_BLOCK_ROWS) + PREFETCH_BYTES / 4, _MM_HINT_T0);
            _mm_prefetch((const char*)(zeros + (n * G + g) * INT4_BLOCK_ROWS / 2) + PREFETCH_BYTES / 8, _MM_HINT_T0);
            __m512 parts[M][PARTS] = {};
            for (int64_t k = g * group; k < (g + 1) * group; k += 32)
                for (int v = 0; v < 4; v++, p += 64) {
                    fetch(p);
                    const __m512i words = _mm512_loadu_si512(p);
                    for (int i = 0; i < 4; i++) {
                        const __m512bh weights = int4_weights(words, i);
                        for (int m = 0; m < M; m++) {
                            int32_t pair;
                            std::memcpy(&pair, x + k * M + m * 32 + 8 * v + 2 * i, 4);
                            __m512& sum = parts[m][i % PARTS];
                            sum = _mm512_dpbf16_ps(sum, weights, (__m512bh)_mm512_set1_epi32(pair));
                        }
                    }
                }
            const __m512 zero = int4_zeros(zeros + (n * G + g) * INT4_BLOCK_ROWS / 2);
            const __m512 scale = load_wide(scales + (n * G + g) * INT4_BLOCK_ROWS);
            for (int m = 0; m < M; m++) {
                for (int i = 1; i < PARTS; i++) parts[m][0] = _mm512_add_ps(parts[m][0], parts[m][i]);
                parts[m][0] = _mm512_fnmadd_ps(zero, _mm512_set1_ps(totals[m * G + g]), parts[m][0]);
                sums[m] = _mm512_fmadd_ps(parts[m][0], scale, sums[m]);
            }
        }
        for (int m = 0; m < M; m++)
            _mm256_storeu_si256((__m256i*)(y + m * N + n * INT4_BLOCK_ROWS), (__m256i)_mm512_cvtneps_pbh(sums[m]));
    }
}

template <class Scale>
static void int4_unpack(const uint8_t* w, const Scale* scales, const uint8_t* zeros, int64_t K, int64_t group, int64_t block,
                        bf16* out) {
    // Of four rows, each a quarter of a vector, the word that has a column, and where in the word its code is.
    alignas(64) uint16_t places[4][32], nibbles[32];
    for (int column = 0; column < 32; column++) {
        nibbles[column] = column % 8 / 2 * 4;
        for (int row = 0; row < 4; row++) places[row][column] = 8 * row + column / 8 * 2 + column % 2;
    }
    const __m512 codes = _mm512_set_ps(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16);  // with 16 added
    alignas(64) float scale[INT4_BLOCK_ROWS], offset[INT4_BLOCK_ROWS];  // what 16 + zero stands for
    for (int64_t k = 0; k < K; k += 32) {
        if (k % group == 0) {
            const int64_t g = block * (K / group) + k / group;
            const __m512 wide = load_wide(scales + g * INT4_BLOCK_ROWS);
            _mm512_store_ps(scale, wide);
            _mm512_store_ps(offset, _mm512_mul_ps(wide, int4_zeros(zeros + g * INT4_BLOCK_ROWS / 2)));
        }
        const __m512i* p = (const __m512i*)(w + (block * K + k) * INT4_BLOCK_ROWS / 2);
        __m512i twos[4], fours[4];  // the words of rows i, i + 4, i + 8 and i + 12
        for (int i = 0; i < 2; i++) {
            twos[2 * i] = _mm512_unpacklo_epi32(_mm512_loadu_si512(p + 2 * i), _mm512_loadu_si512(p + 2 * i + 1));
            twos[2 * i + 1] = _mm512_unpackhi_epi32(_mm512_loadu_si512(p + 2 * i), _mm512_loadu_si512(p + 2 * i + 1));
        }
        for (int i = 0; i < 2; i++) {
            fours[2 * i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
            fours[2 * i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
        }
        for (int r = 0; r < INT4_BLOCK_ROWS; r++) {
            const __m512i words = _mm512_permutexvar_epi16(_mm512_load_si512(places[r / 4]), fours[r % 4]);
            // Exact in fp32 where scales are of 16 bits: codes have 5 bits, scales 11.
            const __m512 values = _mm512_fmsub_ps(codes, _mm512_set1_ps(scale[r]), _mm512_set1_ps(offset[r]));
            const __m512i indices = _mm512_srlv_epi16(words, _mm512_load_si512(nibbles));
            _mm512_storeu_si512(out + r * K + k, (__m512i)look_up(values, indices));
        }
    }
}

template <class Scale>
static void int4_product(const bf16* x, const uint8_t* w, const Scale* scales, const uint8_t* zeros, bf16* y, int64_t M,
                             int64_t N, int64_t K, int64_t group) {
    if (M > MAX_ROWS)
        return gemm<INT4_BLOCK_ROWS>(x, y, M, N, K,
                          [=](int64_t block, bf16* out) { int4_unpack(w, scales, zeros, K, group, block, out); });
    const int64_t G = K / group;
    const float* totals = group_totals(x, M, K, group);
    over_rows<INT4_BLOCK_ROWS>(x, M, N, K, [=](int rows, int64_t m, const bf16* packed, int64_t first, int64_t last) {
        WITH_M(rows, int4_blocks<M, Scale>(packed, totals + m * G, w, scales, zeros, y + m * N, N, K, group, first, last))
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention: q [B, S, H, D], out the same; of k and v [B, K, slots, D] the first T slots; mask [B, S, T], not 0 where a
// query sees a slot. The G = H / K heads that share a kv head, of some queries, are the rows of a tile.

constexpr int SLOTS = 64;      // taken together; softmax is carried on from such a block to the next (arXiv:1805.02867)
constexpr int TILE_ROWS = 64;  // unless the heads of one query are more

// exp(x) for x <= 0, to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
static inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-100), x);  // below, nothing in bf16; NaN stays, as the second operand
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.f / 720);
    for (float c : {1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, n);
}

static inline int64_t whole_vectors(int64_t D) { return (D + 31) / 32 * 32; }

struct Tile {
    const bf16 *q, *k, *v;  // the first query's first head; slot 0
    const uint8_t* mask;    // of the first query
    int64_t queries, H, G, D, T;
    int64_t rows() const { return queries * G; }
    int64_t width() const { return whole_vectors(D); }
    const bf16* row(int64_t r) const { return q + (r / G * H + r % G) * D; }
};

// Buffers of a thread, for a tile.
struct Scratch {
    std::vector<uint8_t> seen;    // [T], by any query of the tile, and as many zeros as a block may go beyond
    std::vector<float> scores;    // [rows, SLOTS]
    std::vector<bf16> weights;    // [rows, SLOTS]
    std::vector<Line> keys;       // [width / 2, SLOTS] of k, two channels beside each other
    std::vector<uint32_t> pairs;  // [SLOTS / 2, width] of v, two slots beside each other
};

// Transpose 16 x 16 values of 32 bits.
static inline void transpose(__m512i* v) {
    __m512i twos[16], fours[16];
    for (int i = 0; i < 16; i += 2) {
        twos[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        twos[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm512_unpacklo_epi64(twos[i + j], twos[i + 2 + j]);
            fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(twos[i + j], twos[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {  // of four quarters, each has a column of four rows
        __m512i even[2], odd[2];
        for (int j = 0; j < 2; j++) {
            even[j] = _mm512_shuffle_i32x4(fours[8 * j + i], fours[8 * j + 4 + i], 0x88);
            odd[j] = _mm512_shuffle_i32x4(fours[8 * j + i], fours[8 * j + 4 + i], 0xdd);
        }
        v[i] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        v[i + 4] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        v[i + 12] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
}

// Put k of slots [first, first + SLOTS) in columns. Where there is none, `last` - 1 stands for it.
static void columns_of(const Tile& tile, int64_t first, int64_t last, uint32_t* keys) {
    for (int64_t t = 0; t < SLOTS; t += 16)
        for (int64_t d = 0; d < tile.D; d += 32) {
            __m512i rows[16];
            for (int64_t i = 0; i < 16; i++) {
                const bf16* k = tile.k + std::min(first + t + i, last - 1) * tile.D;
                fetch(k + d);
                rows[i] = (__m512i)load_first(k + d, tile.D - d);
            }
            transpose(rows);
            for (int64_t i = 0; i < 16; i++) _mm512_store_si512(keys + (d / 2 + i) * SLOTS + t, rows[i]);
        }
}

// Call run(row, how many) for rows [row, rows): as many together as MOST says, and the last ones in halves of it.
template <int MOST, class Run>
static void by_rows(int64_t row, int64_t rows, Run run) {
    for (; row + MOST <= rows; row += MOST) run(row, std::integral_constant<int, MOST>());
    if constexpr (MOST > 1) by_rows<MOST / 2>(row, rows, run);
}

// Write the scores of rows x slots [first, first + SLOTS), -inf where masked or not below `last`.
static void score(const Tile& tile, int64_t first, int64_t last, const uint32_t* keys, float* scores) {
    const __m512 scale = _mm512_set1_ps(1 / std::sqrt(float(tile.D)));
    by_rows<4>(0, tile.rows(), [&](int64_t r0, auto count) {
        constexpr int R = count;
        __m512 sums[R][SLOTS / 16] = {};
        for (int64_t d = 0; d < tile.D; d += 2)
            for (int i = 0; i < R; i++) {
                int32_t pair;
                std::memcpy(&pair, tile.row(r0 + i) + d, 4);
                for (int j = 0; j < SLOTS / 16; j++) {
                    const __m512bh k = load_bf16((const bf16*)(keys + d / 2 * SLOTS + 16 * j));
                    sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)_mm512_set1_epi32(pair), k);
                }
            }
        for (int i = 0; i < R; i++)
            for (int64_t t = first, j = 0; t < first + SLOTS; t += 16, j++) {
                const int64_t left = std::max<int64_t>(0, last - t);
                const __mmask16 there = left >= 16 ? 0xffff : (1 << left) - 1;
                __m128i bytes = _mm_maskz_loadu_epi8(there, tile.mask + (r0 + i) / tile.G * tile.T + t);
                __m512 score = _mm512_set1_ps(-INFINITY);
                score = _mm512_mask_mul_ps(score, _mm_test_epi8_mask(bytes, bytes), sums[i][j], scale);
                _mm512_storeu_ps(scores + (r0 + i) * SLOTS + t - first, score);
            }
    });
}

// Turn a row's scores into weights, relative to the largest score so far. Returns what earlier weights shrink by.
static float soften(const float* scores, bf16* weights, float& largest, float& total) {
    __m512 most = _mm512_set1_ps(largest);
    for (int i = 0; i < SLOTS; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
    float now = _mm512_reduce_max_ps(most), shrink = largest == now ? 1 : std::exp(largest - now);
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < SLOTS; i += 16) {
        __m512 score = _mm512_loadu_ps(scores + i);
        __mmask16 seen = _mm512_cmp_ps_mask(score, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
        __m512 weight = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(score, _mm512_set1_ps(now))));
        _mm256_storeu_si256((__m256i*)(weights + i), (__m256i)_mm512_cvtneps_pbh(weight));
        sum = _mm512_add_ps(sum, weight);
    }
    largest = now;
    total = total * shrink + _mm512_reduce_add_ps(sum);
    return shrink;
}

// Put slots [first, first + SLOTS) of v in pairs; 0 for those that no query sees: they may hold anything, NaN too.
// seen: a bit for each, none from `last` on, whose memory is not even asked for: what is not mapped takes long.
static void pair_up(const Tile& tile, int64_t first, int64_t last, uint64_t seen, uint32_t* pairs) {
    alignas(64) uint16_t places[2][32];  // of two vectors beside each other: the first halves in turn, and the second ones
    for (int i = 0; i < 32; i++)
        for (int half = 0; half < 2; half++) places[half][i] = i / 2 + 16 * half + i % 2 * 32;
    const __m512i low = _mm512_load_si512(places[0]), high = _mm512_load_si512(places[1]);
    for (int64_t t = 0; t < SLOTS; t += 2)
        for (int64_t d = 0; d < tile.D; d += 32) {
            __m512i v[2];
            for (int i = 0; i < 2; i++) {
                const bf16* p = tile.v + std::min(first + t + i, last - 1) * tile.D + d;
                fetch(p);
                v[i] = (__m512i)load_first(p, seen >> (t + i) & 1 ? tile.D - d : 0);
            }
            _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(v[0], low, v[1]));
            _mm512_storeu_si512(pairs + 16, _mm512_permutex2var_epi16(v[0], high, v[1]));
            pairs += 32;
        }
}

// Add weights x v of a block of slots to the rows' outputs [rows, width].
static void accumulate(const Tile& tile, const bf16* weights, const uint32_t* all_pairs, float* out) {
    const int64_t width = tile.width();
    by_rows<8>(0, tile.rows(), [&](int64_t r0, auto count) {
        constexpr int R = count;
        for (int64_t d = 0; d < width; d += 32) {
            __m512 sums[R][2];
            for (int i = 0; i < R; i++)
                for (int j = 0; j < 2; j++) sums[i][j] = _mm512_loadu_ps(out + (r0 + i) * width + d + 16 * j);
            for (int64_t t = 0; t < SLOTS; t += 2) {
                const uint32_t* pairs = all_pairs + t / 2 * width + d;
                const __m512bh low = load_bf16((const bf16*)pairs), high = load_bf16((const bf16*)(pairs + 16));
                for (int i = 0; i < R; i++) {
                    int32_t pair;
                    std::memcpy(&pair, weights + (r0 + i) * SLOTS + t, 4);
                    const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
                    sums[i][0] = _mm512_dpbf16_ps(sums[i][0], weight, low);
                    sums[i][1] = _mm512_dpbf16_ps(sums[i][1], weight, high);
                }
            }
            for (int i = 0; i < R; i++)
                for (int j = 0; j < 2; j++) _mm512_storeu_ps(out + (r0 + i) * width + d + 16 * j, sums[i][j]);
        }
    });
}

// Attend to the slots of part `split` of `splits` of those that the tile sees: outputs [rows, width], not yet divided
// by the total weights, and each row's largest score and total weight.
static void attend(const Tile& tile, int64_t split, int64_t splits, float* out, float* largest, float* total) {
    static thread_local Scratch scratch;
    scratch.seen.assign(tile.T + SLOTS, 0);
    scratch.keys.resize(tile.width() / 2 * SLOTS / 16);
    scratch.scores.resize(tile.rows() * SLOTS);
    scratch.weights.resize(tile.rows() * SLOTS);
    scratch.pairs.resize(SLOTS / 2 * tile.width());
    // Found once: where a thread's own variable is takes a call to find out.
    uint8_t* seen = scratch.seen.data();
    uint32_t *keys = (uint32_t*)scratch.keys.data(), *pairs = scratch.pairs.data();
    float* scores = scratch.scores.data();
    bf16* weights = scratch.weights.data();
    for (int64_t s = 0; s < tile.queries; s++)
        for (int64_t t = 0; t < tile.T; t++) seen[t] |= tile.mask[s * tile.T + t];
    int64_t begin = 0, end = tile.T;
    while (end > 0 && !seen[end - 1]) end--;
    while (begin < end && !seen[begin]) begin++;
    const int64_t length = end - begin;
    end = begin + length * (split + 1) / splits;
    begin += length * split / splits;
    for (int64_t t = begin; t < end; t += SLOTS) {
        columns_of(tile, t, end, keys);
        score(tile, t, end, keys, scores);
        for (int64_t r = 0; r < tile.rows(); r++) {
            float shrink = soften(scores + r * SLOTS, weights + r * SLOTS, largest[r], total[r]);
            if (shrink != 1)
                for (int64_t d = 0; d < tile.D; d++) out[r * tile.width() + d] *= shrink;
        }
        const __m512i flags = _mm512_loadu_si512(seen + t);
        const uint64_t before_end = end - t < SLOTS ? (1ull << (end - t)) - 1 : ~0ull;  // another split's are not ours
        pair_up(tile, t, end, _mm512_test_epi8_mask(flags, flags) & before_end, pairs);
        accumulate(tile, weights, pairs, out);
    }
}

static void attention(const bf16* q, const bf16* k, const bf16* v, const uint8_t* mask, bf16* out, int64_t B,
                          int64_t S, int64_t H, int64_t K, int64_t T, int64_t D, int64_t batch_stride,
                          int64_t head_stride) {
    if (!B || !S) return;
    const int64_t G = H / K, queries = std::min(S, std::max<int64_t>(1, TILE_ROWS / G)), tiles = (S + queries - 1) / queries;
    const int64_t tasks = B * K * tiles, threads = num_threads();
    const int64_t width = whole_vectors(D), size = queries * G * (width + 2);
    // Where there are fewer tasks than threads, several share the slots of one.
    const int64_t splits = std::max<int64_t>(1, std::min((threads + tasks - 1) / tasks, T / (2 * SLOTS)));
    std::vector<float> parts(tasks * splits * size);
    auto tile_of = [=](int64_t task) {
        const int64_t b = task / tiles / K, head = task / tiles % K, s = task % tiles * queries;
        const int64_t at = b * batch_stride + head * head_stride;
        return Tile{q + ((b * S + s) * H + head * G) * D, k + at, v + at, mask + (b * S + s) * T,
                    std::min(queries, S - s), H, G, D, T};
    };
    auto finish = [=, first_part = parts.data()](int64_t task) {
        const Tile tile = tile_of(task);
        float *first = first_part + task * splits * size, *largest = first + queries * G * width;
        for (int64_t r = 0; r < tile.rows(); r++) {
            float most = largest[r], total = 0;
            for (int64_t i = 1; i < splits; i++) most = std::max(most, largest[i * size + r]);
            for (int64_t i = 0; i < splits; i++) {
                const float share = largest[i * size + r] == -INFINITY ? 0 : std::exp(largest[i * size + r] - most);
                float* sums = first + i * size + r * width;
                total += share * largest[i * size + queries * G + r];
                for (int64_t d = 0; d < D; d++) first[r * width + d] = (i ? first[r * width + d] : 0) + share * sums[d];
            }
            bf16* y = out + (tile.row(r) - q);
            for (int64_t d = 0; d < D; d++) y[d] = narrow(total == 0 ? 0 : first[r * width + d] / total);  // 0 where nothing is seen
        }
    };
    for_each(tasks * splits, [&](int64_t i) {
        float *sums = parts.data() + i * size, *largest = sums + queries * G * width, *total = largest + queries * G;
        std::fill(largest, total, -INFINITY);
        attend(tile_of(i / splits), i % splits, splits, sums, largest, total);
        if (splits == 1) finish(i);
    });
    if (splits > 1) for_each(tasks, finish);
}

// ---------------------------------------------------------------------------------------------------------------------
// The operators, through torch's stable ABI: one library serves every torch from 2.11 on. cpu.py has their schemas,
// and sees to it that weights have a type and a size that these take.

namespace operators {

static Tensor bf16_product(const Tensor& x, const Tensor& weight) {
    const int64_t M = x.size(0), N = weight.size(0), K = weight.size(1);
    Tensor rows = in_order(x), y = empty({M, N});
    ::bf16_product(data(rows), data(weight), data(y), M, N, K);
    return y;
}

// Call run(pointer to the scales, in their type).
template <class Run>
static void with_type(const Tensor& scales, Run run) {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(scales.get(), &type));
    if (type == aoti_torch_dtype_float16()) run(data<half>(scales));
    else if (type == aoti_torch_dtype_float32()) run(data<float>(scales));
    else run(data<bf16>(scales));
}

static Tensor int8_product(const Tensor& x, const Tensor& weight, const Tensor& scales, std::optional<Tensor> zeros) {
    const int64_t M = x.size(0), N = scales.size(0) * BLOCK_ROWS, K = x.size(1);
    Tensor rows = in_order(x), y = empty({M, N});
    with_type(scales, [&](auto* values) {
        ::int8_product(data(rows), data<int8_t>(weight), values, zeros ? data<int8_t>(*zeros) : nullptr, data(y), M, N, K,
                       K / scales.size(1));
    });
    return y;
}

static Tensor int4_product(const Tensor& x, const Tensor& weight, const Tensor& scales, const Tensor& zeros) {
    const int64_t M = x.size(0), N = scales.size(0) * INT4_BLOCK_ROWS, K = x.size(1);
    Tensor rows = in_order(x), y = empty({M, N});
    with_type(scales, [&](auto* values) {
        ::int4_product(data(rows), data<uint8_t>(weight), values, data<uint8_t>(zeros), data(y), M, N, K, K / scales.size(1));
    });
    return y;
}

// As `model.attention`.
static Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask) {
    bool cached = k.stride(2) == k.size(3) && k.stride(3) == 1;  // the first slots of a cache
    for (int64_t i = 0; i < 4; i++) cached &= k.stride(i) == v.stride(i);
    Tensor queries = in_order(q), keys = cached ? k : in_order(k), values = cached ? v : in_order(v);
    Tensor seen = in_order(mask), y = empty({q.size(0), q.size(1), q.size(2), q.size(3)});
    ::attention(data(queries), data(keys), data(values), data<uint8_t>(seen), data(y), q.size(0), q.size(1), q.size(2),
                k.size(1), k.size(2), q.size(3), keys.stride(0), keys.stride(1));
    return y;
}

}  // namespace operators

// Let our products run on `count` threads of our own, and what else this thread runs on one. Returns how many threads
// torch had; with 0 and that number, both are as before.
extern "C" int take_threads(int own, int others) {
    const int before = omp_get_max_threads();
    own_threads = own;
    omp_set_num_threads(others);
    return before;
}

STABLE_TORCH_LIBRARY_IMPL(kernels, CPU, library) {
    library.impl("bf16_product", TORCH_BOX(&operators::bf16_product));
    library.impl("int8_product", TORCH_BOX(&operators::int8_product));
    library.impl("int4_product", TORCH_BOX(&operators::int4_product));
    library.impl("attention", TORCH_BOX(&operators::attention));
}
