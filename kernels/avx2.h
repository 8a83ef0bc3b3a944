// What cpu.cpp needs of AVX2 with FMA and F16C, for x in bf16 and fp16.
//
// Weights in bf16 and fp16 are multiplied in fp32, above MAX_ROWS rows of x by GEMM. Codes of int8 and int4 are
// multiplied in whole numbers.
//
// Included by cpu.cpp, whose helpers and forms of weights it uses.

constexpr char INSTRUCTION_SET[] = "avx2";
constexpr bool TAKES_HALF = true;  // models in float16
constexpr bool HAS_BF16 = false;
constexpr bool UNPACKS = false;    // codes take these products at any number of rows, which are faster than GEMM in fp32
constexpr int PARALLEL_SUMS = 4;   // vectors of them, in codes.h
constexpr int REGISTER_ROWS = 4;   // of x, whose sums stay in registers there; with 5 GCC keeps some on the stack
constexpr int MAX_ROWS = 32;       // of x; above, GEMM of bf16 and fp16 is faster

using Floats = __m256;
constexpr int LANES = 8;

static inline __m256 load_wide(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline __m256 load_wide(const half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline __m256 load_wide(const float* p) { return _mm256_loadu_ps(p); }

template <class T>
static inline void store_narrow(T* p, __m256 values) {
    alignas(32) float wide[8];
    _mm256_store_ps(wide, values);
    for (int i = 0; i < 8; i++) set(p[i], wide[i]);
}

// Of 8 values the first `count`, all where they are more; 0 for the others, whose memory is not read.
template <class T>
static inline __m256 load_cells(const T* p, int64_t count) {
    if (count >= 8) return load_wide(p);
    T values[8] = {};
    if (count > 0) std::memcpy(values, p, count * sizeof(T));
    return load_wide(values);
}

// 16 values in two vectors, in an order that is the same for x and w: bf16 as even and odd ones, which takes no shuffle.
struct Two {
    __m256 first, second;
};

static inline Two load_two(const bf16* p) {
    const __m256i pairs = _mm256_loadu_si256((const __m256i*)p), odd = _mm256_set1_epi32(0xffff0000);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), _mm256_castsi256_ps(_mm256_and_si256(pairs, odd))};
}
static inline Two load_two(const half* p) { return {load_wide(p), load_wide(p + 8)}; }

// Bytes with a sign, as many as a vector takes.
static inline __m256i widen_to_shorts(const uint8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
static inline __m256i widen_to_ints(const uint8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }

// Add the products of pairs of int16, one of which all lanes share.
template <class Ints, class Shorts>
static inline void add_products(Ints& sum, Shorts a, int32_t pair) {
#ifdef __AVXVNNI__
    sum = (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, _mm256_set1_epi32(pair));
#else
    sum += (Ints)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi32(pair));
    asm("" : "+x"(sum));  // else GCC adds up many products first, for which there are no registers
#endif
}

template <class Ints>
static inline int32_t largest_of(Ints v) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return std::max(_mm_cvtsi128_si32(four), _mm_extract_epi32(four, 1));
}

static inline float sum_of(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

static inline float largest_of(__m256 v) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

// ---------------------------------------------------------------------------------------------------------------------
// bf16, and fp16

// Put x [M, K] in the order in which it is read, in fp32: [K / 16, M, 16].
template <class T>
static const float* pack_wide(const T* x, int64_t M, int64_t K) {
    static thread_local Room<float> room;
    float* packed = room.of(M * K);
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k += 16) {
            const Two two = load_two(x + m * K + k);
            _mm256_store_ps(packed + k * M + m * 16, two.first);
            _mm256_store_ps(packed + k * M + m * 16 + 8, two.second);
        }
    return packed;
}

// Add the products of C rows of x, of M that are packed, and R rows of w, over `width` columns, to sums [C, 16]. Fetched
// is what comes `ahead` of w: of `whole` rows in the order of memory, else at the same columns.
template <int R, int C, int M, class T>
static inline void bf16_tile(const float* x, const T* w, int64_t K, int64_t width, int64_t ahead, bool whole,
                             float* sums) {
    const int64_t step = whole ? R : 1, gap = whole ? 32 : K;
    __m256 parts[R][C][2] = {};
    for (int64_t k = 0; k < width; k += 32) {
        for (int j = 0; j < R; j++) _mm_prefetch((const char*)(w + ahead + step * k + gap * j), _MM_HINT_T0);
        for (int i = 0; i < 2; i++) {
            Two weights[R];
            for (int j = 0; j < R; j++) weights[j] = load_two(w + j * K + k + 16 * i);
            auto add = [&](int half) __attribute__((always_inline)) {
                for (int c = 0; c < C; c++) {
                    const __m256 inputs = _mm256_load_ps(x + (k + 16 * i) * M + 16 * c + 8 * half);
                    for (int j = 0; j < R; j++) {
                        __m256& sum = parts[j][c][R * C < 4 ? half : 0];  // where sums are few, two for each
                        sum = _mm256_fmadd_ps(half ? weights[j].second : weights[j].first, inputs, sum);
                    }
                }
            };
            add(0), add(1);
        }
    }
    for (int j = 0; j < R; j++)
        for (int c = 0; c < C; c++)
            sums[c * SUMMED_ROWS + j] += sum_of(_mm256_add_ps(parts[j][c][0], parts[j][c][1]));
}

// The sums of `rows` rows of w, an even number: [M, 16]. x is taken in parts of its columns, which stay in the first
// cache.
template <int M, class T>
__attribute__((noinline)) static void bf16_sums(const float* x, const T* w, int64_t K, int rows, float* sums) {
    constexpr int R = M > 1 ? 2 : 1, C = M > 5 ? (M + 1) / 2 : M;
    const int64_t pieces = M * K * int64_t(sizeof(float)) / X_PART_BYTES + 1, width = (K / 32 + pieces - 1) / pieces * 32;
    std::fill(sums, sums + M * SUMMED_ROWS, 0);
    for (int64_t k = 0; k < K; k += width)
        for (int r = 0; r < rows; r += R) {
            const T* p = w + r * K + k;
            const int64_t columns = std::min(width, K - k);
            const int64_t ahead = R == 1 && pieces == 1 ? PREFETCH_BYTES / int64_t(sizeof(T)) : R * K;
            bf16_tile<R, C, M>(x + k * M, p, K, columns, ahead, pieces == 1, sums + r);
            if constexpr (M > C)
                bf16_tile<R, M - C, M>(x + k * M + 16 * C, p, K, columns, ahead, pieces == 1, sums + r + C * SUMMED_ROWS);
        }
}

template <class T>
static void bf16_product(const T* x, const T* w, T* y, int64_t M, int64_t N, int64_t K, const int64_t* experts) {
    if (M > MAX_ROWS && !experts)
        return gemm(x, y, M, N, K, [=](int64_t first, int64_t count) {
            static thread_local Room<float> room;
            const int64_t stride = distance_of_rows(K);
            float* rows = room.of(count * stride);
            for (int64_t r = 0; r < count; r++)
                for (int64_t k = 0; k < K; k += 8) _mm256_store_ps(rows + r * stride + k, load_wide(w + (first + r) * K + k));
            return std::pair<const float*, int64_t>(rows, stride);
        });
    over_rows<BLOCK_ROWS, pack_wide<T>>(x, M, N, K, experts, [=](const Pass& pass, const float* packed, int64_t first, int64_t last) {
        alignas(32) float sums[MAX_M * SUMMED_ROWS];
        for (int64_t n = first * BLOCK_ROWS; n < last * BLOCK_ROWS; n += SUMMED_ROWS) {
            const int count = int(std::min<int64_t>(SUMMED_ROWS, last * BLOCK_ROWS - n));
            WITH_M(pass.rows, bf16_sums<M>(packed, w + n * K, K, count, sums))
            for (int i = 0; i < pass.rows; i++)
                for (int r = 0; r < count; r++) set(y[pass.out(N) + i * N + n + r], sums[i * SUMMED_ROWS + r]);
        }
    });
}

#include "codes.h"

#include "tiles.h"  // where there are none

// ---------------------------------------------------------------------------------------------------------------------
// Attention, in fp32

constexpr int SLOTS = 32;  // taken together
constexpr int PER_CELL = 1;
constexpr int SUMS = 8;  // vectors of them, in gemm.h
using Cell = float;
using Cells = __m256;
using Weight = float;

static inline void add_products(__m256& sum, __m256 a, float b) { sum += a * b; }
static inline void store_narrow(float* p, __m256 values) { _mm256_storeu_ps(p, values); }
static inline void pair_up(__m256*) {}

template <class T>
static inline Weight weight_of(T value) { return widen(value); }

// Transpose 8 x 8 values.
static inline void transpose(__m256* v) {
    __m256 twos[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        twos[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        twos[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm256_shuffle_ps(twos[i + j], twos[i + 2 + j], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(twos[i + j], twos[i + 2 + j], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x20);
        v[4 + i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x31);
    }
}

// A bit for each of SLOTS bytes: whether it is not 0.
static inline uint64_t flags_of(const uint8_t* seen) {
    const __m256i zero = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i*)seen), _mm256_setzero_si256());
    return uint32_t(~_mm256_movemask_epi8(zero));
}
