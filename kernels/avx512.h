// What cpu.cpp needs of AVX-512 with bf16 and VNNI: products in fp32 sums of pairs of bf16 (vdpbf16ps), of codes in sums
// of pairs of int16 (vpdpwssd), and attention in fp32 sums. x in fp16 is multiplied in fp32 (wide.h).
//
// Included by cpu.cpp, whose helpers and forms of weights it uses.

constexpr char INSTRUCTION_SET[] = "avx512";
constexpr bool HAS_BF16 = true;
constexpr int GEMM_ABOVE = 16;        // of x, as in layers.py; above, GEMM is faster
constexpr int PARALLEL_SUMS = 20;   // vectors of them, in codes.h
constexpr int REGISTER_ROWS = 8;    // of x, whose sums stay in registers there

using Floats = __m512;
constexpr int LANES = 16;

struct Wide;
struct Pairs;
template <class T>  // what values of x are multiplied as, where they are multiplied again and again
using Operands = std::conditional_t<std::is_same_v<T, bf16>, Pairs, Wide>;

static inline __m512 load_wide(const bf16* p) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
static inline __m512 load_wide(const half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline __m512 load_wide(const float* p) { return _mm512_loadu_ps(p); }

static inline void store_narrow(bf16* p, __m512 values) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(values));
}

static inline void store_narrow(half* p, __m512 values) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store_narrow(float* p, __m512 values) { _mm512_storeu_ps(p, values); }

// 32 values in two vectors.
struct Two {
    __m512 first, second;
};

static inline Two load_two(const half* p) { return {load_wide(p), load_wide(p + 16)}; }

static inline __m512bh load_bf16(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

// Bytes with a sign, as many as a vector takes.
static inline __m512i widen_to_shorts(const uint8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
static inline __m512i widen_to_ints(const uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }

// The same numbers, int16, in bf16, which has 8 bits of them.
template <class Shorts>
static inline Shorts to_bf16(Shorts values) {
    const __m512i v = (__m512i)values;
    const __m512i low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(v)), high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(v, 1));
    return (Shorts)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
}

// Add the products of pairs of int16, one of which all lanes share.
template <class Ints, class Shorts>
static inline void add_products(Ints& sum, Shorts a, int32_t pair) {
    sum = (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, _mm512_set1_epi32(pair));
}

// The same of bf16.
template <class Shorts>
static inline void add_products(__m512& sum, Shorts a, int32_t pair) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(pair));
}

template <class Ints>
static inline int32_t largest_of(Ints v) { return _mm512_reduce_max_epi32((__m512i)v); }

static inline float largest_of(__m512 v) { return _mm512_reduce_max_ps(v); }
static inline float sum_of(__m512 v) { return _mm512_reduce_add_ps(v); }

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

// Put x [M, K] in the order in which it is read, [K / 32, M, 32]: rows whose distance is a power of two do not stay in the
// first cache. Each thread does so for itself: what another has written takes longer to read than to make.
static const bf16* pack(const bf16* x, int64_t M, int64_t K) {
    if (M == 1) return x;
    bf16* packed = room<12, bf16>(M * K);
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k += 32) std::memcpy(packed + k * M + m * 32, x + m * K + k, 32 * sizeof(bf16));
    return packed;
}

// ---------------------------------------------------------------------------------------------------------------------
// bf16

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
    __m512 totals[M][SUMMED_ROWS / SHARING] = {};
    for (int64_t n = first * BLOCK_ROWS; n < last * BLOCK_ROWS; n += SUMMED_ROWS) {
        const int rows = std::min<int64_t>(SUMMED_ROWS, last * BLOCK_ROWS - n);
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
            __m512 pairs[SUMMED_ROWS / 2];
            for (int i = 0; i < SUMMED_ROWS / 2; i++) {
                const __m512* two = totals[m] + 2 * i / SHARING;
                pairs[i] = SHARING == 2 ? two[0] : sums_of_two(two[0], two[1]);
            }
            const __m256i sums = (__m256i)_mm512_cvtneps_pbh(sums_of_pairs(pairs));
            _mm256_mask_storeu_epi16(y + m * N + n, (1 << rows) - 1, sums);
        }
    }
}

// Do the same by tiles, and say whether they are for so many rows.
static bool bf16_by_tiles(const bf16* x, const bf16* w, bf16* y, int64_t M, int64_t N, int64_t K);

static void dense_product(const bf16* x, const bf16* w, bf16* y, int64_t M, int64_t N, int64_t K,
                         const int64_t* experts) {
    if (!experts && bf16_by_tiles(x, w, y, M, N, K)) return;
    if (M > GEMM_ABOVE && !experts)
        return gemm(x, y, M, N, K, [=](int64_t first, int64_t count) {
            if (M <= 64 && count % 16 == 0) return std::pair(w + first * K, K);  // they are read too seldom for a copy to pay
            const int64_t stride = distance_of_rows(K);
            bf16* copy = room<11, bf16>((count + 15) / 16 * 16 * stride);
            for (int64_t r = 0; r < count; r++) std::memcpy(copy + r * stride, w + (first + r) * K, K * sizeof(bf16));
            return std::pair<const bf16*, int64_t>(copy, stride);
        });
    over_rows<BLOCK_ROWS, pack>(x, M, N, K, experts, [=](const Pass& pass, const bf16* packed, int64_t first, int64_t last) {
        with_rows(pass.rows, [&](auto M) { bf16_blocks<M>(packed, w, y + pass.out(N), N, K, first, last); });
    });
}

#include "codes.h"
#include "wide.h"

static void dense_product(const half* x, const half* w, half* y, int64_t M, int64_t N, int64_t K, const int64_t* experts) {
    wide_product(x, w, y, M, N, K, experts);
}

// ---------------------------------------------------------------------------------------------------------------------
// What is multiplied again and again: pairs of bf16, and fp16 in fp32

constexpr int SLOTS = 64;  // of attention, taken together
constexpr int SUMS = 16;   // vectors of them, in gemm.h

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

// A bit for each of 64 bytes: whether it is not 0.
static inline uint64_t flags_of(const uint8_t* seen) {
    const __m512i flags = _mm512_loadu_si512(seen);
    return _mm512_test_epi8_mask(flags, flags);
}

static inline void transpose(__m512* v) { transpose((__m512i*)v); }

struct Pairs {  // as `Wide` (gemm.h)
    using Value = bf16;
    using Cell = int32_t;
    using Cells = __m512i;
    static constexpr int PER_CELL = 2;

    static bf16 value_of(bf16 value) { return value; }

    static __m512i load(const bf16* p, int64_t count) {
        return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << std::max<int64_t>(0, count)) - 1, p);
    }

    // Turn two rows into pairs: those of the first half of the columns, and those of the second.
    static void pair_up(__m512i* rows) {
        const __m512i low = _mm512_set_epi32(0x2f000f, 0x2e000e, 0x2d000d, 0x2c000c, 0x2b000b, 0x2a000a, 0x290009, 0x280008,
                                             0x270007, 0x260006, 0x250005, 0x240004, 0x230003, 0x220002, 0x210001, 0x200000);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16)), first = rows[0];
        rows[0] = _mm512_permutex2var_epi16(first, low, rows[1]);
        rows[1] = _mm512_permutex2var_epi16(first, high, rows[1]);
    }
};
// ---------------------------------------------------------------------------------------------------------------------
// Codes, for GEMM

template <int BITS>
static void unpack(const uint8_t* w, Scales scales, const uint8_t* zeros, int64_t K, int64_t group, int64_t block, bf16* out,
                   int64_t stride) {
    alignas(64) float scale[CODE_ROWS], zero[CODE_ROWS];
    for (int64_t k = 0; k < K; k += STEP) {
        if (k % group == 0) {
            const int64_t at = (block * (K / group) + k / group) * CODE_ROWS;
            zeros_of<BITS, BITS == 8>(zeros, at, (Floats*)zero);
            for (int h = 0; h < VECTORS; h++) _mm512_store_ps(scale + LANES * h, scales.vector(at + LANES * h));
        }
        __m512i columns[VECTORS][LANES];
        const uint8_t* p = w + (block * K + k) * CODE_ROWS * BITS / 8;
        each_pair<BITS, BITS == 8>(p, [&](int i, const Shorts* codes) __attribute__((always_inline)) {
            for (int h = 0; h < VECTORS; h++) columns[h][i] = (__m512i)codes[h];
        });
        for (int r = 0; r < CODE_ROWS; r++) {
            if (r % LANES == 0) transpose(columns[r / LANES]);  // now rows
            const __m512i codes = columns[r / LANES][r % LANES];
            bf16* row = out + r * stride + k;
            if constexpr (BITS == 4) {  // there are 16 values: the codes choose
                const __m512 all = _mm512_set_ps(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16);
                const __m256i values = (__m256i)_mm512_cvtneps_pbh((all - zero[r]) * scale[r]);
                const __m512i places = _mm512_srli_epi16(codes, 3);  // of which four bits count
                _mm512_storeu_si512(row, _mm512_permutexvar_epi16(places, _mm512_broadcast_i64x4(values)));
            } else {
                const __m512 low = (__m512)to_floats((Ints)_mm512_cvtepi16_epi32(_mm512_castsi512_si256(codes)));
                const __m512 high = (__m512)to_floats((Ints)_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(codes, 1)));
                _mm512_storeu_si512(row, (__m512i)_mm512_cvtne2ps_pbh((high - zero[r]) * scale[r], (low - zero[r]) * scale[r]));
            }
        }
    }
}

#include "tiles.h"
